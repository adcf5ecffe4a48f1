"""Sums of what several programs found."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["summed", "summed_both"]


@triton.jit
def _add_up(parts_ptr, out_ptr, parts, numbers, block, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    n = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P).to(tl.int64)
        mask = (p < parts)[:, None] & (n < numbers)[None, :]
        part = tl.load(parts_ptr + p[:, None] * numbers + n[None, :], mask=mask, other=0)
        total += tl.sum(part, axis=0)
    tl.store(out_ptr + n, total.to(out_ptr.dtype.element_ty), mask=n < numbers)


@triton.jit
def _sum(
    parts_ptr, out_ptr, parts, numbers,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _add_up(parts_ptr, out_ptr, parts, numbers, tl.program_id(0).to(tl.int64), BLOCK_P, BLOCK)


@triton.jit
def _sum_both(
    parts_ptr, out_ptr, parts, numbers,
    other_parts_ptr, other_out_ptr, other_parts, other_numbers,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(numbers, BLOCK)
    if block < blocks:
        _add_up(parts_ptr, out_ptr, parts, numbers, block, BLOCK_P, BLOCK)
    else:
        _add_up(
            other_parts_ptr, other_out_ptr, other_parts, other_numbers, block - blocks,
            BLOCK_P, BLOCK,
        )  # fmt: skip


def _blocks(parts: int) -> dict[str, int]:
    """As many parts at once as there are, of fewer numbers the more there are."""
    block_p = min(512, max(128, triton.next_power_of_2(parts)))
    return {"BLOCK_P": block_p, "BLOCK": max(8, 2048 // block_p)}


def summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over the first axis, which has few numbers beside many parts.

    torch gives each of these numbers one thread there, which takes longer than what is summed up.
    """
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    numbers, blocks = out.numel(), _blocks(parts.shape[0])
    with torch.cuda.device_of(parts):
        _sum[(triton.cdiv(numbers, blocks["BLOCK"]),)](
            parts, out, parts.shape[0], numbers, **blocks
        )
    return out


def summed_both(
    parts: Tensor, other: Tensor, dtype: torch.dtype, other_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return :func:`summed` of two, in one launch."""
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    other_out = other.new_empty(other.shape[1:], dtype=other_dtype)
    numbers, other_numbers = out.numel(), other_out.numel()
    blocks = _blocks(parts.shape[0])
    programs = sum(triton.cdiv(count, blocks["BLOCK"]) for count in (numbers, other_numbers))
    with torch.cuda.device_of(parts):
        _sum_both[(programs,)](
            parts, out, parts.shape[0], numbers, other, other_out, other.shape[0], other_numbers,
            **blocks,
        )  # fmt: skip
    return out, other_out
