"""Checks of what a loss is given, before anything is computed."""

import math

import torch
from torch import Tensor

from perceive_adapter.errors import ConfigError, LossInputError
from perceive_adapter.perceiver.checks import LARGEST

__all__ = ["check_image", "check_number", "check_unit_range"]


def check_image(
    name: str, image: Tensor, like: Tensor | None = None, whose: str = "restored"
) -> Tensor:
    """Return ``image`` as (B, 3, H, W): a gray one is expanded without a copy.

    Args:
        name: what the message calls the image.
        image: (B, 1, H, W) or (B, 3, H, W), floating point, in [0, 1].
        like: an image whose shape and device ``image`` must share.
        whose: what the message calls that one.

    Raises:
        LossInputError: not a tensor, wrong shape, integer dtype, empty, or unlike ``like``.
    """
    if not isinstance(image, Tensor):
        raise LossInputError(f"{name} must be a tensor (B, 3, H, W), got {type(image).__name__}")
    shape = tuple(image.shape)
    if image.ndim != 4 or shape[1] not in (1, 3):
        raise LossInputError(f"{name} must have shape (B, 3, H, W) or (B, 1, H, W), got {shape}")
    if image.numel() == 0:
        raise LossInputError(f"{name} is empty: shape {shape}")
    if not image.is_floating_point():
        raise LossInputError(
            f"{name} must be floating point in [0, 1], got {image.dtype}; divide uint8 by 255"
        )
    if like is not None and shape != tuple(like.shape):
        raise LossInputError(
            f"{name} has shape {shape}, {whose} has {tuple(like.shape)}: they must be the same"
        )
    if like is not None and image.device != like.device:
        raise LossInputError(f"{name} is on {image.device}, {whose} is on {like.device}")
    return image.expand(-1, 3, -1, -1)


def check_unit_range(name: str, image: Tensor) -> None:
    """Raise where an image has the values of 8-bit ones; a look at those on a GPU would wait.

    Raises:
        LossInputError: the largest value is above 16.
    """
    if image.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if (largest := float(image.detach().amax())) > LARGEST:
        raise LossInputError(
            f"{name} has values up to {largest:.4g}: expected [0, 1]; divide 8-bit images by 255"
        )


def check_number(name: str, value: float, *, positive: bool = False) -> float:
    """Return ``value`` as a float if it is finite and not negative (or above zero).

    Raises:
        ConfigError: it is not.
    """
    number = float(value)
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        bound = "above 0" if positive else "at least 0"
        raise ConfigError(f"{name} must be finite and {bound}, got {value}")
    return number
