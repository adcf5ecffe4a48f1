"""What every degradation is, and random numbers that one generator decides on any device."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Degradation", "normal", "uniform"]


class Degradation(Protocol):
    """Damages a batch; ``degrade`` checks the arguments and clamps the result to [0, 1]."""

    def __call__(
        self, image: Tensor, severity: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Damage ``image`` (B, 3, H, W) by ``severity`` (B, 1, 1, 1)."""
        ...


def uniform(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw from [0, 1) on the generator's device, for the device and dtype of ``like``."""
    device = like.device if generator is None else generator.device
    drawn = torch.rand(tuple(shape), generator=generator, device=device, dtype=torch.float32)
    return drawn.to(like)


def normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw from N(0, 1) on the generator's device, for the device and dtype of ``like``."""
    device = like.device if generator is None else generator.device
    drawn = torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32)
    return drawn.to(like)
