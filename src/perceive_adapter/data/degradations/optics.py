"""What a lens, a hand and a resize do: blur of three kinds, and downsampling."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from perceive_adapter.data.degradations.draws import uniform

__all__ = ["convolve", "defocus_blur", "downsampling", "gaussian_blur", "motion_blur"]

_KERNEL = 25  # pixels; odd, and wider than the widest blur
_PATH_POINTS = 49


def gaussian_blur(image: Tensor, severity: Tensor, generator: torch.Generator | None) -> Tensor:
    """Isotropic Gaussian blur, sigma from 0.3 to 4 pixels."""
    sigma = 0.3 + 3.7 * severity[:, 0]
    y, x = _grid(image)
    return convolve(image, torch.exp(-0.5 * (x**2 + y**2) / sigma**2), normalise=True)


def defocus_blur(image: Tensor, severity: Tensor, generator: torch.Generator | None) -> Tensor:
    """Blur by a disc of radius 0.5 to 6 pixels, the image of a point out of focus."""
    radius = 0.5 + 5.5 * severity[:, 0]
    y, x = _grid(image)
    return convolve(image, (radius + 0.5 - torch.hypot(x, y)).clamp(0, 1), normalise=True)


def motion_blur(image: Tensor, severity: Tensor, generator: torch.Generator | None) -> Tensor:
    """Blur along a bent path of 1 to 21 pixels in any direction, the trace of a moving camera."""
    batch = len(image)
    angle = math.pi * uniform((batch, 1), image, generator)
    bend = uniform((batch, 1), image, generator) - 0.5
    length = 1 + 20 * severity[:, 0, 0]
    step = torch.linspace(-0.5, 0.5, _PATH_POINTS, device=image.device, dtype=image.dtype)
    along = step * length
    across = bend * length * (4 * step**2 - 1 / 3) / 2
    path_x = along * angle.cos() - across * angle.sin()
    path_y = along * angle.sin() + across * angle.cos()
    y, x = _grid(image)
    squared = (x - path_x[..., None, None]) ** 2 + (y - path_y[..., None, None]) ** 2
    return convolve(image, torch.exp(-2 * squared).sum(1), normalise=True)


def downsampling(image: Tensor, severity: Tensor, generator: torch.Generator | None) -> Tensor:
    """Antialiased bicubic reduction by a factor of 1 to 6, and bicubic enlargement."""
    height, width = image.shape[-2:]
    factors = (1 + 5 * severity).flatten().tolist()
    coarse = [
        F.interpolate(
            one[None],
            (max(1, round(height / factor)), max(1, round(width / factor))),
            mode="bicubic",
            antialias=True,
        )
        for one, factor in zip(image, factors, strict=True)
    ]
    enlarged = [F.interpolate(one, (height, width), mode="bicubic") for one in coarse]
    return torch.cat(enlarged)


def convolve(
    image: Tensor, kernels: Tensor, *, normalise: bool = False, padded: bool = False
) -> Tensor:
    """Convolve each image (B, C, H, W) with its own kernel (B, K, K), K odd.

    Borders are replicated unless the image is ``padded`` by K // 2 on all sides already. By fast
    Fourier transform, since the kernels are large.
    """
    if normalise:
        kernels = kernels / kernels.sum((1, 2), keepdim=True)
    size = kernels.shape[-1]
    margin = size // 2
    if not padded:
        image = F.pad(image, (margin,) * 4, mode="replicate")
    shape = image.shape[-2:]
    spectrum = torch.fft.rfft2(image) * torch.fft.rfft2(kernels, s=shape)[:, None]
    convolved: Tensor = torch.fft.irfft2(spectrum, s=shape)
    return convolved[..., size - 1 :, size - 1 :]


def _grid(image: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of a kernel, (K, 1) and (K,), with 0 in the middle."""
    axis = torch.arange(_KERNEL, device=image.device, dtype=image.dtype) - _KERNEL // 2
    return axis.view(-1, 1), axis
