"""Captions that say what is wrong with an image and how badly, for contrastive training."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from perceive_adapter.data import KINDS
from perceive_adapter.data.samples import (
    integer_below,
    permutation,
)

__all__ = ["WORDS", "grades", "qualities", "write_captions", "write_quality_captions"]

_NOUNS = ("photo", "image", "picture", "photograph")
_GRADES = ("", "slight", "moderate", "severe")
_BOUNDS = (0.3, 0.65)
_NAMES: Mapping[str, tuple[str, ...]] = {
    "haze": ("haze", "fog"),
    "rain": ("rain", "rain streaks"),
    "low_light": ("darkness", "low light", "underexposure"),
    "blur": ("blur",),
    "motion_blur": ("motion blur",),
    "downsampling": ("pixelation", "low resolution"),
    "noise": ("noise", "grain"),
    "jpeg": ("jpeg artifacts", "compression"),
}
_QUALITIES = (
    ("terrible", "bad"),
    ("mediocre",),
    ("clean", "good", "excellent", "perfect", "sharp", "pristine"),
)
_BAD = 0.42  # severity from which an image is called bad

WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        word
        for text in (
            "a with and",
            *_NOUNS,
            *_GRADES,
            *(name for names in _NAMES.values() for name in names),
            *(word for words in _QUALITIES for word in words),
            "high low medium quality",
        )
        for word in text.split()
    )
)
"""The vocabulary of perceive-tiny's text tower."""


def grades(severity: Tensor) -> Tensor:
    """Grade severities (B, D): 0 absent, 1 slight, 2 moderate, 3 severe."""
    bounds = severity.new_tensor([1e-6, *_BOUNDS])
    return torch.bucketize(severity, bounds, right=True)


def qualities(severity: Tensor) -> Tensor:
    """Rate images by their worst severity, (B, D) to (B,): 0 bad, 1 mediocre, 2 good."""
    worst = severity.amax(dim=1)
    return 2 - (worst > 0).long() - (worst >= _BAD).long()


def write_captions(severity: Tensor, generator: torch.Generator) -> list[str]:
    """Write a caption for each image from the severities (B, D) of its degradations."""
    rows = zip(grades(severity).tolist(), qualities(severity).tolist(), strict=True)
    return [_caption(graded, quality, generator) for graded, quality in rows]


def write_quality_captions(generator: torch.Generator) -> list[str]:
    """Write a caption for each of the three qualities, from bad to good."""
    return [_plain(quality, generator) for quality in range(len(_QUALITIES))]


def _caption(graded: Sequence[int], quality: int, generator: torch.Generator) -> str:
    present = [index for index, grade in enumerate(graded) if grade]
    if not present:
        return _plain(quality, generator)
    rated = integer_below(4, generator) == 0
    start = _plain(quality, generator) if rated else f"a {_choose(_NOUNS, generator)}"
    order = permutation(len(present), generator).tolist()
    parts = [
        f"{_GRADES[graded[index]]} {_choose(_NAMES[KINDS[index]], generator)}"
        for index in (present[place] for place in order)
    ]
    return f"{start} with {' and '.join(parts)}"


def _plain(quality: int, generator: torch.Generator) -> str:
    return f"a {_choose(_QUALITIES[quality], generator)} {_choose(_NOUNS, generator)}"


def _choose(options: Sequence[str], generator: torch.Generator) -> str:
    return options[integer_below(len(options), generator)]
