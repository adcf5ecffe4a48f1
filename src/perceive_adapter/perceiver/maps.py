"""Quality patch by patch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perceive_adapter.errors import ConfigError
from perceive_adapter.perceiver.checks import check_image

if TYPE_CHECKING:
    from perceive_adapter.perceiver.quality import QualityPerceiver

__all__ = ["quality_map"]

_PATCH = 64
_SMALLEST_PATCH = 16
_PIXELS_AT_ONCE = 2**20


@torch.no_grad()
def quality_map(perceiver: QualityPerceiver, image: Tensor, patch: int | None) -> Tensor:
    """Score overlapping patches; see :meth:`QualityPerceiver.quality_map`."""
    check_image(image)
    towers = perceiver.towers
    if patch is None:
        patch = _PATCH if towers.takes_any_size else max(towers.image_size)
    if patch < _SMALLEST_PATCH:
        raise ConfigError(
            f"patch={patch}: expected at least {_SMALLEST_PATCH} pixels. "
            "Fewer pixels say little about quality."
        )
    height, width = (min(patch, side) for side in image.shape[-2:])
    tops, lefts = _starts(image.shape[-2], height), _starts(image.shape[-1], width)
    corners = [(top, left) for top in tops for left in lefts]
    at_once = max(1, _PIXELS_AT_ONCE // (len(image) * height * width))
    scores = []
    for start in range(0, len(corners), at_once):
        crops = [
            image[..., top : top + height, left : left + width]
            for top, left in corners[start : start + at_once]
        ]
        score = perceiver(torch.stack(crops, dim=1).flatten(0, 1)).score
        scores.append(score.view(len(image), len(crops)))
    return torch.cat(scores, dim=1).view(len(image), len(tops), len(lefts))


def _starts(length: int, patch: int) -> list[int]:
    """Offsets of patches that overlap by half; the last one ends at the border."""
    count = -(-2 * (length - patch) // patch) + 1
    return [(length - patch) * index // max(1, count - 1) for index in range(count)]
