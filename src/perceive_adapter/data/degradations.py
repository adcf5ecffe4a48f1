"""Synthetic degradations with a known severity, reproducible from a generator's seed.

Every degradation maps severity 0 (barely visible) to 1 (heavy) onto the parameters of a simple
physical model. The map is fixed, so severity can serve as a training label; only the layout (where
a streak falls, how far a region is) is drawn at random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from perceive_adapter.errors import ConfigError, ImageError

__all__ = ["DEGRADATIONS", "Degradation", "degrade"]

_STREAK_KERNEL = 33  # pixels; odd, and longer than the longest streak


class Degradation(Protocol):
    """Damages a batch; ``degrade`` checks the arguments and clamps the result to [0, 1]."""

    def __call__(
        self, image: Tensor, severity: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Damage ``image`` (B, 3, H, W) by ``severity`` (B, 1, 1, 1)."""
        ...


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
        [0.12, 0.28]
    """
    _check_image(image)
    # Half precision is too coarse for rare drops, and results should not hang on the dtype.
    precise = image.to(torch.promote_types(image.dtype, torch.float32))
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


def noise(image: Tensor, severity: Tensor, generator: torch.Generator | None) -> Tensor:
    """White Gaussian noise, sigma from 5 to 50 on the 8-bit scale."""
    sigma = (5 + 45 * severity) / 255
    return image + sigma * _normal(image.shape, image, generator)


def rain(image: Tensor, severity: Tensor, generator: torch.Generator | None) -> Tensor:
    """Rain streaks: sparse drops, smeared by their motion, screened over the scene.

    With severity the streaks grow more frequent, longer, wider, more slanted and more opaque.
    """
    batch, _, height, width = image.shape
    margin = _STREAK_KERNEL // 2  # drops beyond the border reach into the image
    shape = (batch, 1, height + 2 * margin, width + 2 * margin)
    density = 4e-4 + 5.6e-3 * severity
    drops = (_uniform(shape, image, generator) < density) * (
        0.4 + 0.6 * _uniform(shape, image, generator)
    )
    slant = 2 * _uniform(severity.shape, image, generator) - 1
    streaks = F.conv2d(
        drops.transpose(0, 1), _motion_kernel(severity, slant), groups=batch
    ).transpose(0, 1)
    opacity = (0.25 + 0.55 * severity) * streaks.clamp(max=1)
    return image + opacity * (1 - image)


def haze(image: Tensor, severity: Tensor, generator: torch.Generator | None) -> Tensor:
    """Atmospheric scattering, I t + A (1 - t) with t = exp(-beta d), over a smooth depth map d."""
    depth = _depth_map(image, generator)
    transmission = torch.exp(-(0.05 + 2.45 * severity) * depth)
    batch = len(image)
    brightness = 0.75 + 0.22 * _uniform((batch, 1, 1, 1), image, generator)
    tint = 0.04 * (_uniform((batch, 3, 1, 1), image, generator) - 0.5)
    return image * transmission + (brightness + tint) * (1 - transmission)


def low_light(image: Tensor, severity: Tensor, generator: torch.Generator | None) -> Tensor:
    """Underexposure by up to 3.3 stops, crushed shadows, and the sensor's shot and read noise."""
    exposed = torch.exp2(-3.3 * severity) * image.pow(1 + 0.6 * severity)
    variance = severity * (2e-4 * exposed + (2 / 255) ** 2 * severity)
    return exposed + variance.sqrt() * _normal(image.shape, image, generator)


DEGRADATIONS: Final[Mapping[str, Degradation]] = MappingProxyType(
    {"noise": noise, "rain": rain, "haze": haze, "low_light": low_light}
)


def _motion_kernel(severity: Tensor, slant: Tensor) -> Tensor:
    """Blur kernels (B, 1, K, K), peak 1: soft vertical lines, tilted by ``slant`` in [-1, 1]."""
    angle = torch.deg2rad(slant * (10 + 25 * severity))
    length = 7 + 22 * severity
    width = 0.5 + 0.5 * severity
    axis = torch.arange(_STREAK_KERNEL, device=severity.device) - _STREAK_KERNEL // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    along = (y * angle.cos() + x * angle.sin()).abs()
    across = x * angle.cos() - y * angle.sin()
    faded_ends = (length / 2 + 0.5 - along).clamp(0, 1)
    return (faded_ends * torch.exp(-0.5 * (across / width) ** 2)).to(severity.dtype)


def _depth_map(image: Tensor, generator: torch.Generator | None) -> Tensor:
    """Smooth distances (B, 1, H, W) in [0, 1]: hills of two sizes on ground that recedes upwards.

    The nearest and the farthest distance differ from sample to sample, so that a crop may be
    as evenly hazy as a crop of a large photograph is.
    """
    batch, _, height, width = image.shape
    hills = sum(
        amplitude
        * F.interpolate(
            _uniform((batch, 1, cells, cells), image, generator),
            size=(height, width),
            mode="bicubic",
            align_corners=True,
        )
        for cells, amplitude in ((3, 0.7), (6, 0.3))
    )
    recede = torch.linspace(1, 0, height, device=image.device, dtype=image.dtype).view(-1, 1)
    share = _uniform((batch, 1, 1, 1), image, generator)
    relief = hills + share * recede
    low, high = relief.amin((2, 3), keepdim=True), relief.amax((2, 3), keepdim=True)
    relief = (relief - low) / (high - low).clamp_min(1e-3)
    near = 0.2 + 0.4 * _uniform((batch, 1, 1, 1), image, generator)
    span = (1 - near) * (0.5 + 0.5 * _uniform((batch, 1, 1, 1), image, generator))
    return near + span * relief


def _uniform(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, device=device).to(like)


def _normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=device).to(like)


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
    given = torch.as_tensor(severity).to(image)
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
