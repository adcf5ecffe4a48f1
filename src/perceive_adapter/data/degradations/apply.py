"""Degrade a batch: one degradation, one for each sample, or several on top of each other.

Every degradation maps severity 0 (barely visible) to 1 (heavy) onto the parameters of a simple
physical model. The map is fixed, so severity can serve as a training label; what is drawn at random
is the layout (where a streak falls, how far a region is) and what a camera or the weather would
decide (a streak's slant, the colour of the haze, the grain of the noise).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from perceive_adapter.data.degradations.draws import Degradation
from perceive_adapter.data.degradations.optics import (
    defocus_blur,
    downsampling,
    gaussian_blur,
    motion_blur,
)
from perceive_adapter.data.degradations.sensor import (
    correlated_noise,
    gaussian_noise,
    jpeg,
    low_light,
    poisson_noise,
)
from perceive_adapter.data.degradations.weather import haze, rain
from perceive_adapter.errors import ConfigError, ImageError
from perceive_adapter.precision import full_precision

__all__ = ["DEGRADATIONS", "FAMILIES", "FAMILY_OF", "KINDS", "KIND_OF", "degrade", "mix"]

DEGRADATIONS: Final[Mapping[str, Degradation]] = MappingProxyType(
    {
        "haze": haze,
        "rain": rain,
        "low_light": low_light,
        "gaussian_blur": gaussian_blur,
        "defocus_blur": defocus_blur,
        "motion_blur": motion_blur,
        "downsampling": downsampling,
        "gaussian_noise": gaussian_noise,
        "poisson_noise": poisson_noise,
        "correlated_noise": correlated_noise,
        "jpeg": jpeg,
    }
)
"""Every degradation by name, in the order in which they happen to a photograph."""

KIND_OF: Final[Mapping[str, str]] = MappingProxyType(
    {
        "haze": "haze",
        "rain": "rain",
        "low_light": "low_light",
        "gaussian_blur": "blur",
        "defocus_blur": "blur",
        "motion_blur": "motion_blur",
        "downsampling": "downsampling",
        "gaussian_noise": "noise",
        "poisson_noise": "noise",
        "correlated_noise": "noise",
        "jpeg": "jpeg",
    }
)
"""What a caption calls each degradation; training draws every kind as often."""

KINDS: Final[tuple[str, ...]] = tuple(dict.fromkeys(KIND_OF.values()))

FAMILY_OF: Final[Mapping[str, str]] = MappingProxyType(
    {**KIND_OF, "motion_blur": "blur", "downsampling": "blur"}
)
"""What a perceiver calls each degradation: as KIND_OF, except that every loss of detail is blur.

An image that was reduced and enlarged, or taken by a moving camera, has lost its fine detail, as
one out of focus has. How it lost it shows too little to be told with certainty.
"""

FAMILIES: Final[tuple[str, ...]] = tuple(dict.fromkeys(FAMILY_OF.values()))


@torch.no_grad()
def degrade(
    image: Tensor,
    name: str | Sequence[str],
    severity: float | Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Degrade a batch of clean images.

    Args:
        image: (B, 3, H, W), floating point RGB in [0, 1], on any device.
        name: a key of ``DEGRADATIONS``, or one per sample.
        severity: in [0, 1], one number or (B,).
        generator: source of randomness; its state decides the result. None: torch's global one.
            It may live on another device than the image.

    Returns:
        (B, 3, H, W) in [0, 1], with the image's dtype and device, and without a gradient.

    Raises:
        ImageError: the image has another shape, dtype or range.
        ConfigError: unknown name, severity outside [0, 1], or a wrong number of either.

    Example:
        >>> clean = torch.full((2, 3, 32, 32), 0.5)
        >>> seeded = torch.Generator().manual_seed(0)
        >>> hazy = degrade(clean, "haze", torch.tensor([0.2, 0.9]), seeded)
        >>> [round(change, 2) for change in (hazy - clean).abs().mean((1, 2, 3)).tolist()]
        [0.04, 0.22]
    """
    _check_image(image)
    # Half precision is too coarse for rare drops, and results should not hang on the dtype.
    precise = full_precision(image)
    per_sample = _per_sample_severity(severity, precise)
    if isinstance(name, str):
        damaged = _lookup(name)(precise, per_sample, generator)
    else:
        kinds = [_lookup(one) for one in name]
        if len(kinds) != len(image):
            raise ConfigError(f"got {len(kinds)} names for {len(image)} images: give one each")
        samples = zip(kinds, precise, per_sample, strict=True)
        damaged = torch.cat([kind(one[None], s[None], generator) for kind, one, s in samples])
    return damaged.clamp(0, 1).to(image.dtype)


def mix(
    image: Tensor,
    severities: Mapping[str, float | Tensor],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Apply several degradations in the order in which they happen to a photograph.

    Args:
        image: as for :func:`degrade`.
        severities: severity of each degradation by name, one number or (B,); their order does not
            matter, that of ``DEGRADATIONS`` decides.
        generator: as for :func:`degrade`.

    Returns:
        As :func:`degrade`; the image itself where there is no degradation.

    Raises:
        ImageError: as for :func:`degrade`.
        ConfigError: as for :func:`degrade`.

    Example:
        >>> clean = torch.full((1, 3, 32, 32), 0.5)
        >>> mix(clean, {"jpeg": 0.4, "haze": 0.7}).shape
        torch.Size([1, 3, 32, 32])
    """
    for name in severities:
        _lookup(name)
    for name in DEGRADATIONS:
        if name in severities:
            image = degrade(image, name, severities[name], generator)
    return image


def _check_image(image: Tensor) -> None:
    if image.ndim != 4 or image.shape[1] != 3 or image.numel() == 0:
        raise ImageError(
            f"expected a batch of RGB images, (B, 3, H, W), got the shape {tuple(image.shape)}"
        )
    if not image.is_floating_point():
        raise ImageError(f"expected floating point in [0, 1], got {image.dtype}: divide by 255")
    low, high = image.aminmax()
    if not (low >= 0 and high <= 1):
        raise ImageError(
            f"expected values in [0, 1], got {low.item():.4g} to {high.item():.4g}: "
            "rescale or clamp the image"
        )


def _per_sample_severity(severity: float | Tensor, image: Tensor) -> Tensor:
    """Severity as (B, 1, 1, 1) beside the image."""
    given = torch.as_tensor(severity, dtype=image.dtype, device=image.device)
    if given.ndim > 1 or (given.ndim == 1 and len(given) != len(image)):
        raise ConfigError(
            f"expected one severity or one for each of {len(image)} images, "
            f"got the shape {tuple(given.shape)}"
        )
    if not bool(((given >= 0) & (given <= 1)).all()):
        raise ConfigError(f"expected severity in [0, 1], got {given.tolist()}")
    return given.expand(len(image)).view(-1, 1, 1, 1)


def _lookup(name: str) -> Degradation:
    if name not in DEGRADATIONS:
        raise ConfigError(f"no degradation {name!r}; there are {', '.join(DEGRADATIONS)}")
    return DEGRADATIONS[name]
