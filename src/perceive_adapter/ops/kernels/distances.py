"""Mean absolute differences of (B, M) to (n, B, M)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceive_adapter.ops.kernels.device import stages
from perceive_adapter.ops.kernels.sums import summed

__all__ = ["distances_to_rows"]

_BLOCK = 4096  # numbers of all references that a program holds at once
_PROGRAMS = 264  # of the forward pass, about: two for each multiprocessor of a large GPU
_AHEAD = 4  # tiles in flight: the next are read while one is added up


@triton.jit
def _forward(
    x_ptr, references_ptr, sums_ptr,
    count, batch, size, splits, x_b, references_n, references_b,
    BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, split = program // splits, program % splits
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    total = tl.zeros([BLOCK_N, BLOCK], dtype=tl.float32)
    for tile in tl.range(split, tl.cdiv(size, BLOCK), splits, num_stages=AHEAD):
        m = tile * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        x = tl.load(x_ptr + row * x_b + m, mask=m < size, other=0).to(tl.float32)
        mask = (n < count)[:, None] & (m < size)[None, :]
        place = references_ptr + n[:, None] * references_n + row * references_b + m[None, :]
        other = tl.load(place, mask=mask, other=0).to(tl.float32)
        total += tl.where(mask, tl.abs(x[None, :] - other), 0.0)
    place = sums_ptr + (split * count + n) * batch + row
    tl.store(place, tl.sum(total, axis=1) / size, mask=n < count)


@triton.jit
def _backward(
    grad_ptr, x_ptr, references_ptr, grad_x_ptr,
    count, batch, size, tiles, x_b, references_n, references_b,
    BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    m = program % tiles * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    x = tl.load(x_ptr + row * x_b + m, mask=m < size, other=0).to(tl.float32)
    mask = (n < count)[:, None] & (m < size)[None, :]
    place = references_ptr + n[:, None] * references_n + row * references_b + m[None, :]
    difference = x[None, :] - tl.load(place, mask=mask, other=0).to(tl.float32)
    grad = tl.load(grad_ptr + n * batch + row, mask=n < count, other=0).to(tl.float32)
    sign = (difference > 0).to(tl.float32) - (difference < 0).to(tl.float32)
    pulled = tl.sum(sign * grad[:, None], axis=0) / size
    tl.store(grad_x_ptr + row * size + m, pulled.to(grad_x_ptr.dtype.element_ty), mask=m < size)


def _blocks(references: Tensor) -> tuple[int, int]:
    count = triton.next_power_of_2(references.shape[0])
    return count, max(128, _BLOCK // count)


@torch.library.custom_op("perceive_adapter::distances", mutates_args=())
def _measure(x: Tensor, references: Tensor) -> Tensor:
    count, batch, size = references.shape
    block_n, block = _blocks(references)
    tiles = triton.cdiv(size, block)
    splits = triton.cdiv(tiles, triton.cdiv(tiles * batch, _PROGRAMS))  # alike in tiles
    bytes_of_tile = (x.itemsize + block_n * references.itemsize) * block
    ahead = stages(x.device, bytes_of_tile, _AHEAD)
    sums = x.new_empty((splits, count, batch), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _forward[(batch * splits,)](
            x, references, sums, count, batch, size, splits,
            x.stride(0), references.stride(0), references.stride(1),
            BLOCK_N=block_n, BLOCK=block, AHEAD=ahead,
        )  # fmt: skip
    return summed(sums, torch.float32)


@torch.library.custom_op("perceive_adapter::distances_backward", mutates_args=())
def _gradient(grad: Tensor, x: Tensor, references: Tensor) -> Tensor:
    count, batch, size = references.shape
    block_n, block = _blocks(references)
    tiles = triton.cdiv(size, block)
    grad_x = x.new_empty((batch, size))
    with torch.cuda.device_of(x):
        _backward[(batch * tiles,)](
            grad, x, references, grad_x, count, batch, size, tiles,
            x.stride(0), references.stride(0), references.stride(1),
            BLOCK_N=block_n, BLOCK=block,
        )  # fmt: skip
    return grad_x


@_measure.register_fake
def _(x: Tensor, references: Tensor) -> Tensor:
    return x.new_empty(references.shape[:2], dtype=torch.float32)


@_gradient.register_fake
def _(grad: Tensor, x: Tensor, references: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _gradient(grad.contiguous(), *ctx.saved_tensors), None


_measure.register_autograd(_differentiate, setup_context=_keep)


def distances_to_rows(x: Tensor, references: Tensor) -> Tensor:
    """Return (n, B) in single precision; x (B, M), references (n, B, M)."""
    return _measure(_dense(x), _dense(references))


def _dense(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()
