"""Whether an operation runs as a fused kernel."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from perceive_adapter.errors import ConfigError

__all__ = ["INTERPRETED", "READY", "fused"]

NAMES = ("add_low_rank", "reference_distances")
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


# Bytes of features below which, outside torch.compile, a kernel saves less than its launch takes.
LARGE = {"add_low_rank": 2**25, "reference_distances": 2**23}


def fused(name: str, *tensors: Tensor) -> bool:
    """Tell whether an operation on these tensors, the features first, runs as a kernel."""
    return (
        name in READY
        and all((INTERPRETED or tensor.is_cuda) and tensor.dtype in _DTYPES for tensor in tensors)
        and (INTERPRETED or torch.compiler.is_compiling() or tensors[0].nbytes >= LARGE[name])
    )
