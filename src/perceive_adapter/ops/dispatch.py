"""Whether an operation runs as a fused kernel."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from perceive_adapter.errors import ConfigError

__all__ = ["INTERPRETED", "READY", "fused", "per_row"]

NAMES = ("modulate", "add_low_rank", "reference_distances")
VARIABLE = "PERCEIVE_ADAPTER_KERNELS"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _allowed(told: str) -> frozenset[str]:
    """Return the operations that the environment variable names.

    Raises:
        ConfigError: it names something else.
    """
    names = frozenset(name.strip() for name in told.split(",")) - {"", "none"}
    if unknown := names.difference(NAMES):
        raise ConfigError(
            f"{VARIABLE}={told!r} names {', '.join(sorted(unknown))}: expected none, or some of "
            f"{', '.join(NAMES)}, separated by commas"
        )
    return names


# Triton's interpreter runs kernels on a CPU, which is how they are tested without a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_THERE = importlib.util.find_spec("triton") is not None
_ALLOWED = _allowed(os.environ.get(VARIABLE, ",".join(NAMES)))
READY = _ALLOWED if _THERE and (INTERPRETED or torch.cuda.device_count() > 0) else frozenset()


def fused(name: str, *tensors: Tensor) -> bool:
    """Tell whether an operation on these tensors runs as a kernel."""
    return name in READY and all(
        (INTERPRETED or tensor.is_cuda) and tensor.dtype in _DTYPES for tensor in tensors
    )


def per_row(value: Tensor, features: Tensor, channel_axis: int) -> bool:
    """Tell whether a value broadcasts over features by row and channel alone.

    Args:
        value: of as many axes as the features.
        features: (B, C, ...) or (B, ..., C).
        channel_axis: 1 or -1.
    """
    others = set(range(1, features.ndim)) - {channel_axis % features.ndim}
    return value.shape[0] in (1, features.shape[0]) and all(value.shape[i] == 1 for i in others)
