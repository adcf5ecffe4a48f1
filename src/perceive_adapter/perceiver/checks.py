"""Checks of the images that a perceiver is given."""

import torch
from torch import Tensor

from perceive_adapter.errors import ImageError

__all__ = ["check_finite", "check_image"]


def check_image(image: Tensor) -> None:
    """Raise ImageError unless the image is (B, 3, H, W), not empty, and floating point."""
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
