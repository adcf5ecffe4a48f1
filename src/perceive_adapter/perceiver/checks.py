"""Checks of the images that a perceiver is given."""

import math

import torch
from torch import Tensor

from perceive_adapter.errors import ImageError

__all__ = ["check_finite", "check_image", "check_range"]

_LARGEST = 16.0  # far beyond [0, 1], and below what 8-bit images reach


def check_image(image: Tensor) -> None:
    """Raise ImageError unless the image is (B, 3, H, W), not empty, and floating point."""
    if not isinstance(image, Tensor):
        raise ImageError(
            f"the perceiver got a {type(image).__name__}: expected a tensor (B, 3, H, W), RGB in "
            "[0, 1]. Of a PIL image or an array: torch.from_numpy(numpy.array(image)).permute(2, "
            "0, 1)[None] / 255."
        )
    if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
        raise ImageError(
            f"the perceiver got an image of shape {tuple(image.shape)}: expected (B, 3, H, W), "
            "RGB, with at least one image and one pixel. Repeat the channel of a gray image three "
            "times, and drop an alpha channel."
        )
    if not image.is_floating_point():
        raise ImageError(
            f"the perceiver got an image of dtype {image.dtype}: expected floating point in "
            "[0, 1]. Use image.float() / 255 for 8-bit images."
        )


def check_range(views: Tensor) -> None:
    """Raise ImageError where views of an image have the values of 8-bit images.

    A restored image that trains may leave [0, 1] for a while; on another device than the CPU a look
    at the values would wait.
    """
    if views.requires_grad or views.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if _LARGEST < (largest := float(views.amax())) < math.inf:
        raise ImageError(
            f"the perceiver got an image with values up to {largest:.4g}: expected RGB in [0, 1]. "
            "Divide 8-bit images by 255."
        )


def check_finite(tiers: Tensor) -> None:
    """Raise ImageError where an image made the tiers' probabilities NaN.

    These are few, and the pixels many; on another device than the CPU even this would wait.
    """
    if tiers.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not tiers.isfinite().all():
        raise ImageError(
            "the perceiver got an image with NaN or infinite values, or with values too large for "
            "its dtype: expected RGB in [0, 1]. Check what made the image."
        )
