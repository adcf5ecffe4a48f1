"""Degraded crops of clean photographs with their labels, drawn anew for every batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from perceive_adapter.data.degradations import (
    DEGRADATIONS,
    FAMILIES,
    FAMILY_OF,
    KIND_OF,
    KINDS,
    mix,
)
from perceive_adapter.data.degradations.sensor import recode, underexpose
from perceive_adapter.data.photos import resized
from perceive_adapter.errors import ConfigError, ImageError

__all__ = [
    "MARGIN",
    "CropSampler",
    "Samples",
    "as_file",
    "as_stored",
    "cut",
    "degrade_each",
    "draw_severities",
    "fractions",
    "integer_below",
    "integers",
    "mirrored_to",
    "permutation",
    "with_surroundings",
]

_OCTAVE: Final = 2**-0.5
_SMALLEST_SIDE: Final = 160  # pixels, of a photograph that is shrunk to be another scene
MARGIN: Final = 12  # pixels; half of the widest blur's kernel
_PHASES: Final = 16  # pixels of a JPEG block whose colours are stored at half resolution
_CODED: Final = 0.25  # share of the images that are stored as JPEG
_FLAT: Final = 0.03  # standard deviation below which a crop shows next to nothing
_NAMES_OF: Final = {
    kind: tuple(name for name in DEGRADATIONS if KIND_OF[name] == kind) for kind in KINDS
}


@dataclass(frozen=True, eq=False)
class Samples:
    """A batch of crops and what was done to them.

    Args:
        clean: (B, 3, H, W) in [0, 1].
        degraded: (B, 3, H, W) in [0, 1].
        severity: (B, K) in [0, 1], one column for each of ``KINDS``, 0 where absent.
    """

    clean: Tensor
    degraded: Tensor
    severity: Tensor

    @property
    def family_severity(self) -> Tensor:
        """Severity (B, D) of each of ``FAMILIES``: of its kinds, the most severe."""
        columns = [
            [index for index, kind in enumerate(KINDS) if FAMILY_OF[_NAMES_OF[kind][0]] == family]
            for family in FAMILIES
        ]
        return torch.stack([self.severity[:, kinds].amax(dim=1) for kinds in columns], dim=1)


class CropSampler:
    """Draws random crops of photographs at random scales, with mild changes of light and colour.

    Every photograph is also kept at smaller scales, since what is sharp, fine or noisy depends on
    the scale. Most crops without any structure are drawn again, since blur does not show in a clear
    sky. A photograph that is smaller than a crop is continued by its mirror images.

    Args:
        photos: (3, H, W) uint8, of any sizes.
        largest: longest side in pixels to which a larger photograph is shrunk first.
        dark: share of the crops that become dark scenes, by half a stop to two. Photographs are
            seldom as dark as underexposure makes them, and a perceiver that never saw any takes
            every dark scene for underexposed.

    Raises:
        ConfigError: there is no photograph.
        ImageError: one has another shape or dtype, or no pixels.
    """

    def __init__(self, photos: Sequence[Tensor], largest: int = 1200, dark: float = 0.0) -> None:
        if not photos:
            raise ConfigError("got no photographs to draw crops from: give at least one.")
        for index, photo in enumerate(photos):
            _check_photo(index, photo)
        self.pyramids = [_pyramid(photo, largest) for photo in photos]
        self.dark = dark

    def draw(self, count: int, side: int, generator: torch.Generator) -> Tensor:
        """Return crops (count, 3, side, side) in [0, 1]."""
        crops = torch.stack([self._crop(side, generator) for _ in range(count)])
        crops = _relight(crops.float() / 255, generator)
        return _darken(crops, self.dark, generator) if self.dark else crops

    def _crop(self, side: int, generator: torch.Generator) -> Tensor:
        for attempt in range(4):
            pyramid = self.pyramids[integer_below(len(self.pyramids), generator)]
            photo = pyramid[integer_below(len(pyramid), generator)]
            if min(photo.shape[1:]) < side:
                photo = pyramid[0]
            if min(photo.shape[1:]) < side:
                photo = mirrored_to(photo, side)
            top, left = (integer_below(have - side + 1, generator) for have in photo.shape[1:])
            crop = photo[:, top : top + side, left : left + side]
            if attempt == 3 or crop.float().std() > 255 * _FLAT or integer_below(8, generator) == 0:
                break
        crop = crop.transpose(1, 2) if integer_below(4, generator) == 0 else crop
        return crop.flip(2) if integer_below(2, generator) else crop


def draw_severities(
    count: int, generator: torch.Generator, *, low: float = 0.05, high: float = 1.0
) -> list[dict[str, float]]:
    """Draw what is wrong with each of ``count`` images: degradations and their severities.

    Of every nine images, one is left clean, six get one degradation, one gets two and one gets
    three. Of every eight, each has its first degradation of another kind, and the degradations of
    a kind are equally likely, so that in the long run every kind is as frequent as the others. A
    second and third degradation is mild more often than not, as what comes on top of what ails a
    photograph is.

    Args:
        count: of images.
        generator: source of randomness.
        low: least severity.
        high: greatest severity.

    Returns:
        For each image the severity of each of its degradations, by name, no two of one kind.
    """
    drawn = []
    offset = integer_below(len(KINDS), generator)
    for index in range(count):
        several = (0, 1, 1, 2, 1, 1, 3, 1, 1)[index % 9]
        others = permutation(len(KINDS), generator).tolist()
        first = (index + offset) % len(KINDS)
        chosen = [first, *(other for other in others if other != first)][:several]
        severities = {}
        for kind in chosen:
            names = _NAMES_OF[KINDS[kind]]
            name = names[integer_below(len(names), generator)]
            share = float(fractions((), generator))
            severities[name] = low + (high - low) * (share if kind == first else share**2)
        drawn.append(severities)
    return drawn


def degrade_each(
    clean: Tensor, drawn: Sequence[dict[str, float]], generator: torch.Generator
) -> Samples:
    """Damage each image of a batch in its own way, and label it.

    Of the noise that comes with too little light some is taken back, all of it in one image of
    three, as cameras' software and reduced copies leave it. Darkness itself is what is to be told:
    a perceiver that never saw it without noise takes real dark photographs for well exposed ones.

    Args:
        clean: (B, 3, H, W) in [0, 1].
        drawn: for each image the severity of each of its degradations, as
            :func:`draw_severities` gives them.
        generator: source of randomness.
    """
    degraded, severity = clean.clone(), clean.new_zeros(len(clean), len(KINDS))
    for name in DEGRADATIONS:
        rows = [row for row, chosen in enumerate(drawn) if name in chosen]
        if not rows:
            continue
        values = torch.tensor(
            [drawn[row][name] for row in rows], dtype=torch.float32, device=clean.device
        )
        damaged = mix(degraded[rows], {name: values}, generator)
        if name == "low_light":
            exposed = underexpose(degraded[rows], values.view(-1, 1, 1, 1))
            noise = 1.5 * fractions((len(rows), 1, 1, 1), generator) - 0.5
            damaged = exposed.lerp(damaged, noise.clamp(min=0))
        degraded[rows] = damaged
        severity[rows, KINDS.index(KIND_OF[name])] = values
    return Samples(clean, degraded, severity)


def as_file(image: Tensor) -> Tensor:
    """Round an image in [0, 1] to the values that a file of 8 bits holds."""
    return image.clamp(0, 1).mul(255).round() / 255


def as_stored(image: Tensor, generator: torch.Generator) -> Tensor:
    """Store an image as photographs are: one in four as a fine JPEG, the others without loss.

    The JPEG's quality, 92 to 98, is above that of the degradation's least severity: what a
    photograph went through on its way must not count as damage, nor hide other damage.

    Args:
        image: (B, 3, H, W) in [0, 1].
        generator: source of which images are coded, and how.
    """
    stored = as_file(image)
    rows = (fractions((len(image),), generator) < _CODED).nonzero().flatten().tolist()
    if rows:
        qualities = integers(92, 99, (len(rows),), generator).tolist()
        stored[rows] = recode(stored[rows], qualities)
    return stored


def with_surroundings(side: int) -> int:
    """Return the side of the crop to damage, from which :func:`cut` takes one of ``side``."""
    return side + 2 * MARGIN + _PHASES - 1


def cut(images: Sequence[Tensor], side: int, generator: torch.Generator) -> list[Tensor]:
    """Cut a smaller crop out of the middle of damaged ones, and flip some either way.

    Each sample's place and flips are the same in all ``images``. A photograph's border shows how a
    blur was made, and its corner where JPEG's blocks begin. A crop of a damaged photograph has
    neither, and a perceiver must not come to depend on them, nor on what was up.

    Args:
        images: (B, 3, S, S) each, S as :func:`with_surroundings` says.
        side: of the crops, (B, 3, side, side).
        generator: source of place and flips, drawn for each sample.
    """
    count = len(images[0])
    places = (integers(0, _PHASES, (count, 2), generator) + MARGIN).tolist()
    flips = integers(0, 2, (count, 2), generator).tolist()
    axes = [[axis for axis, flipped in zip((1, 2), row, strict=True) if flipped] for row in flips]
    return [
        torch.stack(
            [
                sample[:, top : top + side, left : left + side].flip(flipped)
                for sample, (top, left), flipped in zip(batch, places, axes, strict=True)
            ]
        )
        for batch in images
    ]


def _check_photo(index: int, photo: Tensor) -> None:
    if not isinstance(photo, Tensor):
        raise ImageError(
            f"photos[{index}] is a {type(photo).__name__}; expected a tensor (3, H, W), uint8, as "
            "load_photos gives them."
        )
    if photo.ndim != 3 or len(photo) != 3 or not photo.numel() or photo.dtype != torch.uint8:
        raise ImageError(
            f"photos[{index}] has shape {tuple(photo.shape)} and dtype {photo.dtype}; expected "
            "(3, H, W) with at least one pixel, uint8, as load_photos gives them. Put channels "
            "first; of floats in [0, 1], give (photo * 255).round().byte()."
        )


def _pyramid(photo: Tensor, largest: int) -> list[Tensor]:
    """The photograph at full size and at ever smaller ones, half an octave apart."""
    levels: list[Tensor] = []
    scale = min(1.0, largest / max(photo.shape[1:]))
    while not levels or min(photo.shape[1:]) * scale >= _SMALLEST_SIDE:
        levels.append(resized(photo, scale) if scale < 1 else photo)
        scale *= _OCTAVE
    return levels


def mirrored_to(photo: Tensor, side: int) -> Tensor:
    """Mirror an image (C, H, W) outwards until it holds a crop of ``side``."""
    for axis in (1, 2):
        while photo.shape[axis] < side:
            photo = torch.cat([photo, photo.flip(axis)], dim=axis)
    return photo


def _relight(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Change exposure, contrast curve and saturation a little; one crop in ten becomes gray."""
    count = len(crops)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * fractions((count, 1, 1, 1), generator)

    crops = crops ** torch.exp2(draw(-0.5, 0.5)) * draw(0.8, 1.0)
    gray = crops.mean(dim=1, keepdim=True)
    saturation = draw(0.6, 1.2) * (draw(0, 1) > 0.1)
    return (gray + saturation * (crops - gray)).clamp(0, 1)


def _darken(crops: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Make a share of the crops dark scenes, without the noise of a sensor that sees too little."""
    chosen, stops = fractions((2, len(crops), 1, 1, 1), generator)
    return torch.where(chosen < share, crops * torch.exp2(-0.5 - 1.5 * stops), crops)


def fractions(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw from [0, 1), in single precision on the generator's device, whatever the defaults."""
    device = generator.device
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float32, device=device)


def integers(low: int, high: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw integers from ``low`` to ``high`` - 1, on the generator's device."""
    return torch.randint(low, high, tuple(shape), generator=generator, device=generator.device)


def permutation(count: int, generator: torch.Generator) -> Tensor:
    """Draw an order of ``count`` things, (count,), on the generator's device."""
    return torch.randperm(count, generator=generator, device=generator.device)


def integer_below(limit: int, generator: torch.Generator) -> int:
    """Draw an integer from 0 to ``limit`` - 1."""
    return int(integers(0, limit, (), generator))
