"""Photographs and a CLIP small enough to train on in a second."""

from functools import cache
from typing import Any

import skimage.data
import torch
from torch import Tensor

from perceive_adapter.data.samples import CropSampler
from perceive_adapter.perceiver import QualityPerceiver
from perceive_adapter.perceiver.trunk import TRUNK_NAME

CLIP: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"timm_model_name": TRUNK_NAME, "timm_pool": "", "image_size": 64},
    "text_cfg": {"width": 32, "heads": 2, "layers": 2},
}


@cache
def photos() -> tuple[Tensor, ...]:
    """Four photographs (3, 160, 160), uint8."""
    pixels = [
        skimage.data.astronaut()[20:180, 130:290],
        skimage.data.chelsea()[60:220, 120:280],
        skimage.data.coffee()[80:240, 150:310],
        skimage.data.rocket()[200:360, 200:360],
    ]
    return tuple(torch.from_numpy(array.copy()).permute(2, 0, 1) for array in pixels)


@cache
def folds() -> tuple[CropSampler, CropSampler]:
    return CropSampler(photos()[:2]), CropSampler(photos()[2:])


def perceiver(**arguments: Any) -> QualityPerceiver:
    """An untrained perceiver on random towers that take any size."""
    return QualityPerceiver.create(CLIP, None, context_length=4, **arguments)
