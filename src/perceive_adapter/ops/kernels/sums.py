"""Sums of what several programs found."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["summed"]

_BLOCK_P, _BLOCK = 64, 32


@triton.jit
def _sum(
    parts_ptr, out_ptr, parts, numbers,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P).to(tl.int64)
        mask = (p < parts)[:, None] & (n < numbers)[None, :]
        part = tl.load(parts_ptr + p[:, None] * numbers + n[None, :], mask=mask, other=0)
        total += tl.sum(part, axis=0)
    tl.store(out_ptr + n, total.to(out_ptr.dtype.element_ty), mask=n < numbers)


def summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over the first axis, which has few numbers beside many parts.

    torch gives each of these numbers one thread there, which takes longer than what is summed up.
    """
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    numbers = out.numel()
    with torch.cuda.device_of(parts):
        _sum[(triton.cdiv(numbers, _BLOCK),)](
            parts, out, parts.shape[0], numbers, BLOCK_P=_BLOCK_P, BLOCK=_BLOCK
        )
    return out
