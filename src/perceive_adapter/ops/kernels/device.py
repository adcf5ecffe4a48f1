"""What the device that a kernel runs on has."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["fits_in_cache", "stages"]

_SHARED = 48 * 2**10  # bytes of shared memory that every GPU has for one program


@functools.cache
def _sizes(device: torch.device) -> tuple[int, int]:
    """Bytes of the cache for all, and of one program's shared memory that tiles may take.

    A quarter of what the device has at most is left to what else the program keeps there.
    """
    if device.type != "cuda":
        return 0, _SHARED
    found = torch.cuda.get_device_properties(device)
    most = getattr(found, "shared_memory_per_block_optin", _SHARED)  # not in torch 2.6
    return found.L2_cache_size, max(_SHARED, most * 3 // 4)


def fits_in_cache(x: Tensor) -> bool:
    """Tell whether what is read twice comes from the cache the second time, beside other data."""
    return 3 * x.nbytes <= _sizes(x.device)[0]


def stages(device: torch.device, of_tile: int, wanted: int) -> int:
    """Return how many tiles of so many bytes a program can have in flight, at most ``wanted``."""
    return max(1, min(wanted, _sizes(device)[1] // of_tile))
