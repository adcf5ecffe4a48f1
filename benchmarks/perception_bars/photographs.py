"""Images that no perceiver was trained on: clean photographs and real pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import skimage.data
import torch
from torch import Tensor

from perceive_adapter import QualityPerceiver
from perceive_adapter.data.pairs import find_pairs, read_pair
from perceive_adapter.data.photos import find_images, load_photos

T = TypeVar("T")

CLEAN = "denoise/CBSD68/gt"
BUNDLED = ("astronaut", "chelsea", "coffee", "rocket")
REAL_PAIRS = {
    "derain/Rain100H": "rain",
    "dehaze/SOTS_indoor": "haze",
    "deblur/GoPro": "blur",
    "lowlight/LOLv1": "low_light",
    "lowlight/LOLv1_reduced": "low_light",
    "denoise_real/PolyU": "noise",
}


@dataclass(frozen=True)
class Subject:
    """The perceiver that is measured, and what it is measured on.

    Args:
        perceiver: frozen, with degradation heads.
        name: what it was loaded from.
        clean: (3, H, W) uint8 each, the photographs of ``CLEAN``; none where it is missing.
        bundled: the same, scikit-image's photographs.
        pairs: for each folder of ``REAL_PAIRS`` that exists, its (input, target) images.
    """

    perceiver: QualityPerceiver
    name: str
    clean: list[Tensor]
    bundled: list[Tensor]
    pairs: dict[str, list[tuple[Tensor, Tensor]]]


def load_subject(name: str, data: Path, limit: int | None) -> tuple[Subject, list[str]]:
    """Load everything, and name the folders that are missing; ``limit`` images of each folder."""
    test = data / "test"
    missing = [folder for folder in (CLEAN, *REAL_PAIRS) if not (test / folder).is_dir()]
    clean = [] if CLEAN in missing else load_photos(spread(find_images(test / CLEAN), limit))
    bundled = [to_planes(getattr(skimage.data, one)()) for one in BUNDLED]
    pairs = {
        folder: _load_pairs(test / folder, limit) for folder in REAL_PAIRS if folder not in missing
    }
    perceiver = QualityPerceiver.from_pretrained(name)
    return Subject(perceiver, name, clean, spread(bundled, limit), pairs), missing


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """At most ``limit`` of the items, evenly spread over them."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def to_planes(pixels: object) -> Tensor:
    """Turn an (H, W, 3) uint8 array into a (3, H, W) tensor."""
    return torch.as_tensor(pixels).permute(2, 0, 1).contiguous()


def to_batch(photo: Tensor) -> Tensor:
    """Turn (3, H, W) uint8 into (1, 3, H, W) in [0, 1]."""
    return photo[None].float() / 255


def _load_pairs(folder: Path, limit: int | None) -> list[tuple[Tensor, Tensor]]:
    return [read_pair(pair) for pair in spread(find_pairs(folder).pairs, limit)]
