"""Photographs as tensors, and random crops of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor

# Colour photographs in scikit-image's wheel. The denoiser and the demo's adapter never see them.
HELD_OUT = ("astronaut", "chelsea", "coffee", "rocket")


def load_photos(folder: Path, longest_side: int) -> list[Tensor]:
    """All JPEG files of a folder, in the order of their names."""
    return [_shrink(Image.open(path), longest_side) for path in sorted(folder.glob("*.jpg"))]


def load_held_out(longest_side: int) -> list[Tensor]:
    """The photographs that are only for the report, in the order of ``HELD_OUT``."""
    pixels = (getattr(skimage.data, name)() for name in HELD_OUT)
    return [_shrink(Image.fromarray(array), longest_side) for array in pixels]


def _shrink(photo: Image.Image, longest_side: int) -> Tensor:
    """(3, H, W) in [0, 1], no side longer than ``longest_side``."""
    photo = photo.convert("RGB")
    photo.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS, reducing_gap=None)
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1).contiguous().float().div(255)


def random_crops(
    photos: Sequence[Tensor], count: int, size: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """(count, 3, *size): random places of random photographs, randomly mirrored and turned."""

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    crops = []
    for _ in range(count):
        photo = photos[draw(len(photos))]
        photo = photo.transpose(1, 2) if draw(2) else photo
        top, left = (
            draw(have - want + 1) for have, want in zip(photo.shape[1:], size, strict=True)
        )
        crop = photo[:, top : top + size[0], left : left + size[1]]
        crops.append(crop.flip([axis for axis in (1, 2) if draw(2)]))
    return torch.stack(crops)
