"""What lies between the scene and the camera: rain and haze."""

import torch
import torch.nn.functional as F
from torch import Tensor

from perceive_adapter.data.degradations.draws import uniform
from perceive_adapter.data.degradations.optics import convolve

__all__ = ["haze", "rain"]

_STREAK_KERNEL = 49  # pixels; odd, and longer than the longest streak
_LAYERS = 2


def rain(image: Tensor, severity: Tensor, generator: torch.Generator | None) -> Tensor:
    """Rain streaks: sparse drops, smeared by their motion, screened over the scene.

    With severity the streaks grow more frequent, longer, wider, more slanted and more opaque. In
    four images of ten, a second layer falls at another slant.
    """
    batch, _, height, width = image.shape
    margin = _STREAK_KERNEL // 2  # drops beyond the border reach into the image
    shape = (batch, 1, height + 2 * margin, width + 2 * margin)
    streaks = image.new_zeros(batch, 1, height, width)
    for layer in range(_LAYERS):
        coarse = 0.6 + 0.9 * uniform(severity.shape, image, generator)
        density = (4e-4 + 5.6e-3 * severity) / coarse
        drops = (uniform(shape, image, generator) < density) * (
            0.4 + 0.6 * uniform(shape, image, generator)
        )
        slant = 2 * uniform(severity.shape, image, generator) - 1
        fallen = convolve(drops, _streak(severity, slant, coarse), padded=True)
        falls = uniform(severity.shape, image, generator) < (1.0 if layer == 0 else 0.4)
        streaks = streaks + falls * fallen
    opacity = (0.25 + 0.55 * severity) * streaks.clamp(0, 1)
    return image + opacity * (1 - image)


def haze(image: Tensor, severity: Tensor, generator: torch.Generator | None) -> Tensor:
    """Atmospheric scattering, I t + A (1 - t) with t = exp(-beta d), over a map of depths d.

    The mean depth is 1, so beta, from 0.03 to 1.4, is the mean optical depth of every image: one
    severity is as much haze on a near scene as on a far one.
    """
    transmission = torch.exp(-(0.03 + 1.37 * severity) * _depth_map(image, generator))
    batch = len(image)
    brightness = 0.65 + 0.33 * uniform((batch, 1, 1, 1), image, generator)
    tint = 0.04 * (uniform((batch, 3, 1, 1), image, generator) - 0.5)
    return image * transmission + (brightness + tint) * (1 - transmission)


def _streak(severity: Tensor, slant: Tensor, coarse: Tensor) -> Tensor:
    """Blur kernels (B, K, K), peak 1: soft vertical lines, tilted by ``slant`` in [-1, 1]."""
    angle = torch.deg2rad(slant * (15 + 30 * severity))
    length = ((7 + 22 * severity) * coarse).clamp(max=_STREAK_KERNEL - 2)
    width = (0.5 + 0.5 * severity) * coarse.sqrt()
    axis = torch.arange(_STREAK_KERNEL, device=severity.device) - _STREAK_KERNEL // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    along = (y * angle.cos() + x * angle.sin()).abs()
    across = x * angle.cos() - y * angle.sin()
    faded_ends = (length / 2 + 0.5 - along).clamp(0, 1)
    return (faded_ends * torch.exp(-0.5 * (across / width) ** 2)).to(severity.dtype)[:, 0]


def _depth_map(image: Tensor, generator: torch.Generator | None) -> Tensor:
    """Distances (B, 1, H, W) of mean 1: hills of two sizes on ground that recedes upwards.

    Things stand at distances of their own, so parts of one colour are moved forwards or backwards
    together. The ratio of the nearest and the farthest distance differs from sample to sample, so
    that a crop may be as evenly hazy as a crop of a large photograph is, and that what is near may
    have no haze.
    """
    batch, _, height, width = image.shape
    hills = sum(
        amplitude
        * F.interpolate(
            uniform((batch, 1, cells, cells), image, generator),
            size=(height, width),
            mode="bicubic",
            align_corners=True,
        )
        for cells, amplitude in ((3, 0.7), (6, 0.3))
    )
    recede = torch.linspace(1, 0, height, device=image.device, dtype=image.dtype).view(-1, 1)
    share = uniform((batch, 1, 1, 1), image, generator)
    relief = hills + share * recede + _things(image, generator)
    low, high = relief.amin((2, 3), keepdim=True), relief.amax((2, 3), keepdim=True)
    relief = (relief - low) / (high - low).clamp_min(1e-3)
    near = 0.05 + 0.55 * uniform((batch, 1, 1, 1), image, generator)
    span = (1 - near) * (0.5 + 0.5 * uniform((batch, 1, 1, 1), image, generator))
    depth = near + span * relief
    return depth / depth.mean((2, 3), keepdim=True)


def _things(image: Tensor, generator: torch.Generator | None) -> Tensor:
    """Distances (B, 1, H, W) in [-1.5, 1.5] that follow the colours of the coarse image."""
    batch, _, height, width = image.shape
    coarse = F.avg_pool2d(image, 4, ceil_mode=True)
    weights = 2 * uniform((batch, 3, 1, 1), image, generator) - 1
    distance = (coarse * weights).sum(dim=1, keepdim=True)
    amount = 0.5 * uniform((batch, 1, 1, 1), image, generator)
    return amount * F.interpolate(distance, size=(height, width), mode="bilinear")
