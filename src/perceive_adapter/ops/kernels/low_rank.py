"""``features + gated @ low`` of (B, C, N), (B, C, R) and (B, R, N)."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from perceive_adapter.ops.dispatch import INTERPRETED
from perceive_adapter.ops.kernels.sums import summed

__all__ = ["add_product", "takes"]

_MAX_RANK, _MAX_CHANNELS = 64, 1024
_LEAST = 16  # the smallest side of a matrix that tensor cores take
_PROGRAMS = 512  # of the backward pass, about: four for each multiprocessor of a large GPU


@triton.jit
def _forward(
    x_ptr, low_ptr, gated_ptr, out_ptr,
    channels, positions, rank,
    x_b, x_c, x_n, out_b, out_c, out_n, low_b, low_r, low_n, gated_b, gated_c, gated_r,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(positions, BLOCK_N)
    tiles_c = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    row = program // (tiles_n * tiles_c)
    # Neighbours share the low-rank features, which then come from the cache.
    n = (program // tiles_c) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c = program % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    in_c, in_n, in_r = c < channels, n < positions, r < rank
    place = gated_ptr + row * gated_b + c[:, None] * gated_c + r[None, :] * gated_r
    gated = tl.load(place, mask=in_c[:, None] & in_r[None, :], other=0)
    place = low_ptr + row * low_b + r[:, None] * low_r + n[None, :] * low_n
    low = tl.load(place, mask=in_r[:, None] & in_n[None, :], other=0)
    if WIDE:
        gated, low = gated.to(tl.float32), low.to(tl.float32)
    raised = tl.dot(gated, low, input_precision="ieee")
    mask = in_c[:, None] & in_n[None, :]
    x = tl.load(x_ptr + row * x_b + c[:, None] * x_c + n[None, :] * x_n, mask=mask, other=0)
    place = out_ptr + row * out_b + c[:, None] * out_c + n[None, :] * out_n
    tl.store(place, (x.to(tl.float32) + raised).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad_ptr, low_ptr, gated_ptr, of_low_ptr, sums_ptr,
    channels, positions, rank, splits, batch,
    grad_b, grad_c, grad_n, low_b, low_r, low_n, of_low_b, of_low_r, of_low_n,
    gated_b, gated_c, gated_r,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, split = program // splits, program % splits
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    in_c, in_r = c < channels, r < rank
    from_gated = gated_ptr + row * gated_b + c[None, :] * gated_c + r[:, None] * gated_r
    gated = tl.load(from_gated, mask=in_r[:, None] & in_c[None, :], other=0)
    if WIDE:
        gated = gated.to(tl.float32)
    of_gated = tl.zeros([BLOCK_C, BLOCK_R], dtype=tl.float32)
    for tile in range(split, tl.cdiv(positions, BLOCK_N), splits):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        in_n = n < positions
        from_grad = grad_ptr + row * grad_b + c[:, None] * grad_c + n[None, :] * grad_n
        grad = tl.load(from_grad, mask=in_c[:, None] & in_n[None, :], other=0)
        from_low = low_ptr + row * low_b + n[:, None] * low_n + r[None, :] * low_r
        low = tl.load(from_low, mask=in_n[:, None] & in_r[None, :], other=0)
        if WIDE:
            grad, low = grad.to(tl.float32), low.to(tl.float32)
        of_gated += tl.dot(grad, low, input_precision="ieee")
        of_low = tl.dot(gated, grad, input_precision="ieee").to(of_low_ptr.dtype.element_ty)
        to_low = of_low_ptr + row * of_low_b + r[:, None] * of_low_r + n[None, :] * of_low_n
        tl.store(to_low, of_low, mask=in_r[:, None] & in_n[None, :])
    to_sums = sums_ptr + (split * batch + row) * channels * rank + c[:, None] * rank + r[None, :]
    tl.store(to_sums, of_gated, mask=in_c[:, None] & in_r[None, :])


def _block(size: int, largest: int) -> int:
    return min(largest, max(_LEAST, triton.next_power_of_2(size)))


@torch.library.custom_op("perceive_adapter::add_low_rank", mutates_args=())
def add_product(x: Tensor, low: Tensor, gated: Tensor) -> Tensor:
    """Return ``x + gated @ low``; x (B, C, N), low (B, R, N), gated (B, C, R), all of one dtype."""
    out = torch.empty_like(x)
    if x.numel():
        batch, channels, positions = x.shape
        block_c, block_n = _block(channels, 64), _block(positions, 64)
        grid = (batch * triton.cdiv(channels, block_c) * triton.cdiv(positions, block_n),)
        with torch.cuda.device_of(x):
            _forward[grid](
                x, low, gated, out, channels, positions, low.shape[1],
                *x.stride(), *out.stride(), *low.stride(), *gated.stride(),
                BLOCK_C=block_c, BLOCK_N=block_n, BLOCK_R=_block(low.shape[1], _MAX_RANK),
                WIDE=INTERPRETED,  # the interpreter multiplies no bfloat16 matrices
            )  # fmt: skip
    return out


@torch.library.custom_op("perceive_adapter::add_low_rank_backward", mutates_args=())
def _gradients(grad: Tensor, low: Tensor, gated: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``low`` and of ``gated``."""
    of_low = torch.empty_like(low)
    batch, channels, positions = grad.shape
    if not grad.numel():
        return of_low, gated.new_zeros(gated.shape)
    block_c = _block(channels, _MAX_CHANNELS)
    block_n = _block(positions, max(_LEAST, min(64, 16384 // block_c)))
    splits = min(triton.cdiv(positions, block_n), triton.cdiv(_PROGRAMS, batch))
    splits = min(splits, max(16, positions // (16 * low.shape[1])))  # sums stay small
    sums = grad.new_empty((splits, *gated.shape), dtype=torch.float32)
    with torch.cuda.device_of(grad):
        _backward[(batch * splits,)](
            grad, low, gated, of_low, sums, channels, positions, low.shape[1], splits, batch,
            *grad.stride(), *low.stride(), *of_low.stride(), *gated.stride(),
            BLOCK_C=block_c, BLOCK_N=block_n, BLOCK_R=_block(low.shape[1], _MAX_RANK),
            WIDE=INTERPRETED, num_warps=4 if block_c <= 256 else 8,
        )  # fmt: skip
    return of_low, summed(sums, gated.dtype)


@add_product.register_fake
def _(x: Tensor, low: Tensor, gated: Tensor) -> Tensor:
    return torch.empty_like(x)


@_gradients.register_fake
def _(grad: Tensor, low: Tensor, gated: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(low), gated.new_empty(gated.shape)


@register_flop_formula(torch.ops.perceive_adapter.add_low_rank)
def _flops(x: Any, low: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * low[1]


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return grad, *_gradients(grad, *ctx.saved_tensors)


add_product.register_autograd(_differentiate, setup_context=_keep)


def takes(x: Tensor, low: Tensor) -> bool:
    """Tell whether the kernel is for such features; a library's product serves the others."""
    return x.shape[1] <= _MAX_CHANNELS and low.shape[1] <= _MAX_RANK and x.shape[2] >= _LEAST
