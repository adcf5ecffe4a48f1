"""What a sensor and a codec do: noise, too little light, JPEG."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from perceive_adapter.data.degradations.draws import normal, uniform
from perceive_adapter.data.degradations.optics import convolve

__all__ = [
    "correlated_noise",
    "gaussian_noise",
    "jpeg",
    "low_light",
    "poisson_noise",
    "recode",
    "underexpose",
]

_MID_GRAY = 0.45


def gaussian_noise(image: Tensor, severity: Tensor, generator: torch.Generator | None) -> Tensor:
    """White Gaussian noise, sigma from 2 to 50 on the 8-bit scale, finer where it is faint."""
    return image + _sigma(severity) * normal(image.shape, image, generator)


def poisson_noise(image: Tensor, severity: Tensor, generator: torch.Generator | None) -> Tensor:
    """Shot noise of so few photons that mid-gray is as noisy as with ``gaussian_noise``."""
    photons = _MID_GRAY / _sigma(severity).square()
    expected = image * photons
    if generator is not None:
        expected = expected.to(generator.device)
    return torch.poisson(expected, generator=generator).to(image) / photons


def correlated_noise(image: Tensor, severity: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise as a camera's software leaves it: of the same sigma, smeared over neighbours.

    How far, and how much of it is in the luminance and how much in the colours, differs from image
    to image.
    """
    batch = len(image)
    width = 0.4 + 0.8 * uniform((batch, 1, 1), image, generator)
    angle = math.pi / 2 * uniform((batch, 1, 1, 1), image, generator)
    drawn = normal(image.shape, image, generator)
    luminance = drawn.mean(dim=1, keepdim=True)
    # Either part alone has unit variance, so that the angle leaves sigma as it is.
    mixed = 3**0.5 * angle.cos() * luminance + 1.5**0.5 * angle.sin() * (drawn - luminance)
    axis = torch.arange(-3, 4, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (axis**2 + axis.view(-1, 1) ** 2) / width**2)
    return image + _sigma(severity) * _smeared(mixed, kernel)


def _smeared(noise: Tensor, kernel: Tensor) -> Tensor:
    """Convolve noise (B, C, H, W) with kernels (B, K, K), of one variance up to the border."""
    margin = kernel.shape[-1] // 2
    inside = noise.new_ones(len(noise), 1, *noise.shape[-2:])
    smeared, variance = (
        convolve(F.pad(part, (margin,) * 4), weights, padded=True)
        for part, weights in ((noise, kernel), (inside, kernel.square()))
    )
    return smeared * variance.rsqrt()


def low_light(image: Tensor, severity: Tensor, generator: torch.Generator | None) -> Tensor:
    """Underexposure by up to 3.3 stops, crushed shadows, and the sensor's shot and read noise."""
    exposed = underexpose(image, severity)
    variance = severity * (2e-4 * exposed + (2 / 255) ** 2 * severity)
    return exposed + variance.sqrt() * normal(image.shape, image, generator)


def underexpose(image: Tensor, severity: Tensor) -> Tensor:
    """What :func:`low_light` leaves where its noise is removed."""
    return torch.exp2(-3.3 * severity) * image.pow(1 + 0.6 * severity)


def jpeg(image: Tensor, severity: Tensor, generator: torch.Generator | None) -> Tensor:
    """JPEG with libjpeg's quality falling geometrically from 90 to 6, chroma subsampled.

    Encoded by Pillow on the CPU; there is nothing random in it.
    """
    return recode(image, (90 * (6 / 90) ** severity).flatten().round().int().tolist())


def recode(image: Tensor, qualities: Sequence[int]) -> Tensor:
    """Write each image of a batch (B, 3, H, W) as JPEG of libjpeg's quality, and read it again."""
    pixels = image.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    coded = [_recode(one, quality) for one, quality in zip(pixels, qualities, strict=True)]
    return torch.from_numpy(np.stack(coded)).permute(0, 3, 1, 2).to(image) / 255


def _recode(pixels: np.ndarray[Any, Any], quality: int) -> np.ndarray[Any, Any]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def _sigma(severity: Tensor) -> Tensor:
    return (2 + 48 * severity**1.5) / 255
