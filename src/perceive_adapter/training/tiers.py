"""Which tier an image of a known severity is of."""

from typing import Final

import torch
from torch import Tensor

__all__ = ["tier_shares"]

_LOWEST: Final = 0.6  # severity from which an image is of the lowest tier and no other


def tier_shares(severity: Tensor, tiers: int) -> Tensor:
    """Return how much of each of ``tiers`` tiers images of a severity (B,) are, (B, tiers).

    Undamaged ones are all of the highest, those of 0.6 and more all of the lowest; between, the
    tier falls evenly, and an image between two tiers is part of one and part of the other.

    Example:
        >>> tier_shares(torch.tensor([0.0, 0.15, 0.375]), 3)
        tensor([[0.0000, 0.0000, 1.0000],
                [0.0000, 0.5000, 0.5000],
                [0.2500, 0.7500, 0.0000]])
    """
    place = (1 - severity / _LOWEST).clamp(min=0) * (tiers - 1)
    return (1 - (place[:, None] - torch.arange(tiers, device=place.device)).abs()).clamp(min=0)
