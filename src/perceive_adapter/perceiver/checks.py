"""Checks of the images that a perceiver is given."""

import math
from typing import Final

import torch
from torch import Tensor

from perceive_adapter.errors import ImageError, ImageRangeWarning
from perceive_adapter.warning import warn

__all__ = ["LARGEST", "check_finite", "check_image", "check_range"]

LARGEST: Final = 16.0  # far beyond [0, 1], and below what 8-bit images reach
_LOWEST: Final = -0.25  # what noise may reach in the darkest parts
_NEGATIVE: Final = 0.25  # share of negative values that noise on a photograph does not make


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
    """Raise ImageError where views have the values of 8-bit images, warn where those of [-1, 1].

    An error would not do for the latter: strong noise on a black image has such values too. A
    restored image that trains may leave [0, 1] for a while; on another device than the CPU a look
    at the values would wait.
    """
    if views.requires_grad or views.device.type != "cpu" or torch.compiler.is_compiling():
        return
    lowest, largest = (float(value) for value in views.aminmax())
    if LARGEST < largest < math.inf:
        raise ImageError(
            f"the perceiver got an image with values up to {largest:.4g}: expected RGB in [0, 1]. "
            "Divide 8-bit images by 255; of a network that takes such images, wrap(..., "
            "value_range=(0, 255)) does it."
        )
    if -math.inf < lowest < _LOWEST and (share := float((views < 0).float().mean())) > _NEGATIVE:
        warn(
            f"the perceiver got an image of which {share:.0%} is below 0, down to {lowest:.2g}: "
            "expected RGB in [0, 1]. Of an image in [-1, 1] give (image + 1) / 2; of a network "
            "that takes such images, wrap(..., value_range=(-1, 1)) does it.",
            ImageRangeWarning,
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
