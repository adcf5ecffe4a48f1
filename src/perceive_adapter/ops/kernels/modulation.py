"""``x * scale + shift`` of (B, C, N)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["modulate_rows"]

_TILE = 4096  # numbers that a program holds at once
_SPLITS = 32  # parts of N that the reductions are computed in, at most


@triton.jit
def _forward(
    x_ptr, scale_ptr, shift_ptr, out_ptr,
    channels, positions,
    x_b, x_c, x_n, out_b, out_c, out_n, scale_b, scale_c, shift_b, shift_c,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(positions, BLOCK_N)
    tiles_c = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    row = program // (tiles_n * tiles_c)
    c = (program // tiles_n) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    n = program % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_c, mask = c < channels, (c < channels)[:, None] & (n < positions)[None, :]
    scale = tl.load(scale_ptr + row * scale_b + c * scale_c, mask=in_c, other=0).to(tl.float32)
    shift = tl.load(shift_ptr + row * shift_b + c * shift_c, mask=in_c, other=0).to(tl.float32)
    x = tl.load(x_ptr + row * x_b + c[:, None] * x_c + n[None, :] * x_n, mask=mask, other=0)
    out = x.to(tl.float32) * scale[:, None] + shift[:, None]
    place = out_ptr + row * out_b + c[:, None] * out_c + n[None, :] * out_n
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad_ptr, x_ptr, scale_ptr, grad_x_ptr, sums_ptr,
    channels, positions, splits, batch,
    grad_b, grad_c, grad_n, x_b, x_c, x_n, gx_b, gx_c, gx_n, scale_b, scale_c,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles_c = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    row = program // (tiles_c * splits)
    c = (program // splits) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    split = program % splits
    in_c = c < channels
    scale = tl.load(scale_ptr + row * scale_b + c * scale_c, mask=in_c, other=0).to(tl.float32)
    of_scale = tl.zeros([BLOCK_C, BLOCK_N], dtype=tl.float32)
    of_shift = tl.zeros([BLOCK_C, BLOCK_N], dtype=tl.float32)
    for tile in range(split, tl.cdiv(positions, BLOCK_N), splits):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = in_c[:, None] & (n < positions)[None, :]
        place = row * grad_b + c[:, None] * grad_c + n[None, :] * grad_n
        grad = tl.load(grad_ptr + place, mask=mask, other=0).to(tl.float32)
        place = row * x_b + c[:, None] * x_c + n[None, :] * x_n
        x = tl.load(x_ptr + place, mask=mask, other=0).to(tl.float32)
        of_scale += grad * x
        of_shift += grad
        place = grad_x_ptr + row * gx_b + c[:, None] * gx_c + n[None, :] * gx_n
        out = grad * scale[:, None]
        tl.store(place, out.to(grad_x_ptr.dtype.element_ty), mask=mask)
    place = sums_ptr + (split * batch + row) * channels + c
    tl.store(place, tl.sum(of_scale, axis=1), mask=in_c)
    place += splits * batch * channels
    tl.store(place, tl.sum(of_shift, axis=1), mask=in_c)


def _tile(x: Tensor) -> tuple[int, int]:
    """Block sizes along C and N, long where memory is contiguous."""
    channels, positions = (triton.next_power_of_2(side) for side in x.shape[1:])
    if x.stride(1) == 1:
        block_c = min(channels, 128)
        return block_c, max(1, min(positions, _TILE // block_c))
    block_n = min(positions, 1024)
    return max(1, min(channels, _TILE // block_n)), block_n


def _per_row(value: Tensor) -> tuple[int, int]:
    """Strides of (B or 1, C) along rows and channels."""
    return (value.stride(0) if value.shape[0] > 1 else 0), value.stride(1)


@torch.library.custom_op("perceive_adapter::modulate", mutates_args=())
def modulate_rows(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return ``x * scale + shift``; x (B, C, N), scale and shift (B or 1, C)."""
    out = torch.empty_like(x)
    if x.numel():
        batch, channels, positions = x.shape
        block_c, block_n = _tile(x)
        grid = (batch * triton.cdiv(channels, block_c) * triton.cdiv(positions, block_n),)
        _forward[grid](
            x, scale, shift, out, channels, positions,
            *x.stride(), *out.stride(), *_per_row(scale), *_per_row(shift),
            BLOCK_C=block_c, BLOCK_N=block_n,
        )  # fmt: skip
    return out


@modulate_rows.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("perceive_adapter::modulate_backward", mutates_args=())
def _modulate_backward(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and those of scale and shift of each row, (2, B, C)."""
    grad_x = torch.empty_like(x)
    batch, channels, positions = x.shape
    if not x.numel():
        return grad_x, scale.new_zeros((2, batch, channels), dtype=torch.float32)
    block_c, block_n = _tile(x)
    splits = min(_SPLITS, triton.cdiv(positions, block_n))
    sums = x.new_empty((2, splits, batch, channels), dtype=torch.float32)
    _backward[(batch * triton.cdiv(channels, block_c) * splits,)](
        grad, x, scale, grad_x, sums, channels, positions, splits, batch,
        *grad.stride(), *x.stride(), *grad_x.stride(), *_per_row(scale),
        BLOCK_C=block_c, BLOCK_N=block_n,
    )  # fmt: skip
    return grad_x, sums.sum(1)


@_modulate_backward.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((2, *x.shape[:2]), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, scale, shift = inputs
    ctx.save_for_backward(x, scale)
    ctx.shift_dtype = shift.dtype


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, scale = ctx.saved_tensors
    grad_x, sums = _modulate_backward(grad, x, scale)
    if scale.shape[0] == 1:
        sums = sums.sum(1, keepdim=True)
    return grad_x, sums[0].to(scale.dtype), sums[1].to(ctx.shift_dtype)


modulate_rows.register_autograd(_differentiate, setup_context=_keep)
