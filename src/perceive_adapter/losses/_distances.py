"""Distances of the restored images' features to those of what they are compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from perceive_adapter.ops import reference_distances
from perceive_adapter.precision import full_precision

__all__ = ["References", "distances", "in_one_pass"]

Level: TypeAlias = Tensor | Sequence[Tensor]
"""Features of n references, (n, B, ...) or n tensors (B, ...)."""


@dataclass(frozen=True)
class References:
    """What restored images are compared with, and the features of it.

    Attributes:
        images: the target, the degraded and the medium images, each (B, C, H, W).
        mask: (B, n), which medium images there are.
        levels: features of all of these images.
    """

    images: list[Tensor]
    mask: Tensor
    levels: list[Level]


def in_one_pass(device: torch.device) -> bool:
    """Whether all references go through the network as one batch.

    An accelerator wants few large launches; on a CPU one reference at a time stays in its caches,
    and what it gives need not be copied together.
    """
    return device.type != "cpu"


def distances(
    levels: Sequence[Tensor], references: Sequence[Level]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d(R, GT) (L, B), d(R, LQ and mediums) (1 + n, L, B) and d(GT, LQ) (L, B)."""
    found, scale = [], []
    for level, of_all in zip(levels, map(_full_precision, references), strict=True):
        found.append(reference_distances(full_precision(level), of_all))
        scale.append(reference_distances(of_all[0], of_all[1:2])[0])
    together = torch.stack(found, dim=1)  # (2 + n, L, B)
    return together[0], together[1:], torch.stack(scale)


def _full_precision(level: Level) -> Level:
    if isinstance(level, Tensor):
        return full_precision(level)
    return [full_precision(maps) for maps in level]
