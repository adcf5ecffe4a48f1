"""``features + up diag(gate) @ low`` of (B, C, N), (B, C, R), (B, R) and (B, R, N)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from perceive_adapter.ops.dispatch import INTERPRETED
from perceive_adapter.ops.kernels.device import fits_in_cache, stages
from perceive_adapter.ops.kernels.sums import summed, summed_both

__all__ = ["add_product", "takes"]

_MAX_RANK, _MAX_CHANNELS = 64, 1024
_LEAST = 16  # the smallest side of a matrix that tensor cores take
_PROGRAMS = 264  # of the backward pass at once, about: two for each multiprocessor of a large GPU
_TILES = 4  # that each program goes through for the gradient of ``up``, where that has its own


@triton.jit
def _forward(
    x_ptr, low_ptr, up_ptr, gate_ptr, out_ptr,
    channels, positions, rank,
    x_b, x_c, x_n, out_b, out_c, out_n, low_b, low_r, low_n, up_b, up_c, up_r, gate_b, gate_r,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    GATED: tl.constexpr, LAST: tl.constexpr, ONCE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(positions, BLOCK_N)
    tiles_c = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    row = program // (tiles_n * tiles_c)
    # Neighbours share the low-rank features, which then come from the cache.
    n = (program // tiles_c) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c = program % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    if LAST:  # (n, r) @ (r, c), so that the product's rows are dense as those of the features
        c, n, r_c, r_n = c[None, :], n[:, None], r[:, None], r[None, :]
    else:
        c, n, r_c, r_n = c[:, None], n[None, :], r[None, :], r[:, None]
    in_c, in_n = c < channels, n < positions
    place = up_ptr + row * up_b + c * up_c + r_c * up_r
    up = tl.load(place, mask=in_c & (r_c < rank), other=0)
    if GATED:
        gate = tl.load(gate_ptr + row * gate_b + r_c * gate_r, mask=r_c < rank, other=0)
        up = up.to(tl.float32) * gate.to(tl.float32)
    place = low_ptr + row * low_b + r_n * low_r + n * low_n
    low = tl.load(place, mask=(r_n < rank) & in_n, other=0)
    if WIDE:
        low = low.to(tl.float32)
    up = up.to(low.dtype)
    if LAST:
        first, second = low, up
    else:
        first, second = up, low
    raised = tl.dot(first, second, input_precision="ieee")
    mask = in_c & in_n
    place = x_ptr + row * x_b + c * x_c + n * x_n
    x = tl.load(place, mask=mask, other=0, eviction_policy="evict_first" if ONCE else "")
    place = out_ptr + row * out_b + c * out_c + n * out_n
    tl.store(place, (x.to(tl.float32) + raised).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load(ptr, rows, row_count, row_stride, columns, column_count, column_stride):
    mask = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    place = ptr + rows[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(place, mask=mask, other=0)


@triton.jit
def _store(values, ptr, rows, row_count, row_stride, columns, column_count, column_stride):
    mask = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    place = ptr + rows[:, None] * row_stride + columns[None, :] * column_stride
    tl.store(place, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_turned(
    ptr, rows, row_count, row_stride, columns, column_count, column_stride, TURNED: tl.constexpr
):  # fmt: skip
    """(rows, columns), or turned (columns, rows), as they may lie in memory."""
    if TURNED:
        values = _load(ptr, columns, column_count, column_stride, rows, row_count, row_stride)
    else:
        values = _load(ptr, rows, row_count, row_stride, columns, column_count, column_stride)
    return values


@triton.jit
def _store_turned(
    values, ptr, rows, row_count, row_stride, columns, column_count, column_stride,
    TURNED: tl.constexpr,
):  # fmt: skip
    if TURNED:
        _store(values, ptr, columns, column_count, column_stride, rows, row_count, row_stride)
    else:
        _store(values, ptr, rows, row_count, row_stride, columns, column_count, column_stride)


@triton.jit
def _load_gate(gate_ptr, row, r, rank, gate_b, gate_r, GATED: tl.constexpr):
    """(R,), ones without a gate."""
    if GATED:
        gate = tl.load(gate_ptr + row * gate_b + r * gate_r, mask=r < rank, other=0)
    else:
        gate = tl.full(r.shape, 1, dtype=tl.float32)
    return gate.to(tl.float32)


@triton.jit
def _product_for_up(grad, low, LAST: tl.constexpr):
    """(C, R), of low-rank features (N, R)."""
    if LAST:
        grad = tl.trans(grad)
    return tl.dot(grad, low, input_precision="ieee")


@triton.jit
def _product_for_low(up, grad, LAST: tl.constexpr):
    """(R, N), or with LAST (N, R)."""
    if LAST:
        first, second = grad, up
    else:
        first, second = up, grad
    return tl.dot(first, second, input_precision="ieee")


@triton.jit
def _gated(of_low, gate, LAST: tl.constexpr):
    return of_low * (gate[None, :] if LAST else gate[:, None])


@triton.jit
def _store_up(
    of_up, up_ptr, gate, sums_ptr, gate_sums_ptr, c, r, channels, rank, up_c, up_r,
    GATED: tl.constexpr,
):  # fmt: skip
    if GATED:
        # The gate's gradient is what up's would be without the gate, times up.
        up = _load(up_ptr, c, channels, up_c, r, rank, up_r)
        tl.store(gate_sums_ptr + r, tl.sum(of_up * up.to(tl.float32), axis=0), mask=r < rank)
    _store(of_up * gate[None, :], sums_ptr, c, channels, rank, r, rank, 1)


@triton.jit
def _backward(
    grad_ptr, low_ptr, up_ptr, gate_ptr, of_low_ptr, sums_ptr, gate_sums_ptr,
    channels, positions, rank, parts, batch,
    grad_b, grad_c, grad_n, low_b, low_r, low_n, of_low_b, of_low_r, of_low_n,
    up_b, up_c, up_r, gate_b, gate_r,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, AHEAD: tl.constexpr,
    GATED: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All gradients by one reading: each program takes all channels of some positions."""
    program = tl.program_id(0).to(tl.int64)
    row, part = program // parts, program % parts
    up_ptr += row * up_b
    c, r = tl.arange(0, BLOCK_C).to(tl.int64), tl.arange(0, BLOCK_R).to(tl.int64)
    gate = _load_gate(gate_ptr, row, r, rank, gate_b, gate_r, GATED)
    up = _load_turned(up_ptr, r, rank, up_r, c, channels, up_c, LAST)
    up = up.to(tl.float32 if WIDE else grad_ptr.dtype.element_ty)
    of_up = tl.zeros([BLOCK_C, BLOCK_R], dtype=tl.float32)
    for tile in tl.range(part, tl.cdiv(positions, BLOCK_N), parts, num_stages=AHEAD):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        grads = grad_ptr + row * grad_b
        grad = _load_turned(grads, c, channels, grad_c, n, positions, grad_n, LAST)
        low = _load(low_ptr + row * low_b, n, positions, low_n, r, rank, low_r)
        if WIDE:
            grad, low = grad.to(tl.float32), low.to(tl.float32)
        of_up += _product_for_up(grad, low, LAST)
        of_low = _gated(_product_for_low(up, grad, LAST), gate, LAST)
        to = of_low_ptr + row * of_low_b
        _store_turned(of_low, to, r, rank, of_low_r, n, positions, of_low_n, LAST)
    place = (part * batch + row) * rank
    _store_up(
        of_up, up_ptr, gate, sums_ptr + place * channels, gate_sums_ptr + place,
        c, r, channels, rank, up_c, up_r, GATED,
    )  # fmt: skip


@triton.jit
def _backward_apart(
    grad_ptr, low_ptr, up_ptr, gate_ptr, of_low_ptr, sums_ptr, gate_sums_ptr,
    channels, positions, rank, parts, batch,
    grad_b, grad_c, grad_n, low_b, low_r, low_n, of_low_b, of_low_r, of_low_n,
    up_b, up_c, up_r, gate_b, gate_r,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, UP_C: tl.constexpr, UP_N: tl.constexpr,
    BLOCK_R: tl.constexpr, AHEAD: tl.constexpr,
    GATED: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All gradients by two readings, side by side: more and shorter programs.

    Some take a few channels and give the gradients of ``up`` and the gate, the others take a few
    positions and give that of ``low``.
    """
    program = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    tiles_c, tiles_n = tl.cdiv(channels, UP_C), tl.cdiv(positions, BLOCK_N)
    of_ups = batch * tiles_c * parts
    if program < of_ups:
        part, tile_c = program % parts, program // parts % tiles_c
        row = program // (parts * tiles_c)
        grads = grad_ptr + row * grad_b
        c = tile_c * UP_C + tl.arange(0, UP_C).to(tl.int64)
        of_up = tl.zeros([UP_C, BLOCK_R], dtype=tl.float32)
        for tile in tl.range(part, tl.cdiv(positions, UP_N), parts, num_stages=AHEAD):
            n = tile * UP_N + tl.arange(0, UP_N).to(tl.int64)
            grad = _load_turned(grads, c, channels, grad_c, n, positions, grad_n, LAST)
            low = _load(low_ptr + row * low_b, n, positions, low_n, r, rank, low_r)
            if WIDE:
                grad, low = grad.to(tl.float32), low.to(tl.float32)
            of_up += _product_for_up(grad, low, LAST)
        gate = _load_gate(gate_ptr, row, r, rank, gate_b, gate_r, GATED)
        _store_up(
            of_up, up_ptr + row * up_b, gate, sums_ptr + (part * batch + row) * channels * rank,
            gate_sums_ptr + ((part * tiles_c + tile_c) * batch + row) * rank,
            c, r, channels, rank, up_c, up_r, GATED,
        )  # fmt: skip
    else:
        row = (program - of_ups) // tiles_n
        grads, ups = grad_ptr + row * grad_b, up_ptr + row * up_b
        n = (program - of_ups) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        gate = _load_gate(gate_ptr, row, r, rank, gate_b, gate_r, GATED)
        of_low = tl.zeros([BLOCK_N, BLOCK_R] if LAST else [BLOCK_R, BLOCK_N], dtype=tl.float32)
        for start in tl.range(0, channels, BLOCK_C, num_stages=AHEAD):
            c = start + tl.arange(0, BLOCK_C).to(tl.int64)
            grad = _load_turned(grads, c, channels, grad_c, n, positions, grad_n, LAST)
            up = _load_turned(ups, r, rank, up_r, c, channels, up_c, LAST)
            if WIDE:
                grad = grad.to(tl.float32)
            of_low += _product_for_low(up.to(grad.dtype), grad, LAST)
        to = of_low_ptr + row * of_low_b
        of_low = _gated(of_low, gate, LAST)
        _store_turned(of_low, to, r, rank, of_low_r, n, positions, of_low_n, LAST)


def _block(size: int, largest: int) -> int:
    return min(largest, max(_LEAST, triton.next_power_of_2(size)))


@torch.library.custom_op("perceive_adapter::add_low_rank", mutates_args=())
def add_product(x: Tensor, low: Tensor, up: Tensor, gate: Tensor | None) -> Tensor:
    """Return ``x + up @ low``, or ``x + up diag(gate) @ low``.

    Args:
        x: (B, C, N).
        low: (B, R, N), of the dtype of ``x``.
        up: (B, C, R), or with a gate (C, R).
        gate: (B, R), or (1, R) for all.
    """
    out = torch.empty_like(x)
    if x.numel():
        batch, channels, positions = x.shape
        rank = low.shape[1]
        last = _last(x)
        # Each tile reads the low-rank features: it has at least as many channels of its own.
        block_c = _block(channels, 64 if last else _block(rank, _MAX_RANK))
        block_n = _block(positions, 128 if block_c == _LEAST else 64)
        grid = (batch * triton.cdiv(channels, block_c) * triton.cdiv(positions, block_n),)
        with torch.cuda.device_of(x):
            _forward[grid](
                x, low, up, gate, out, channels, positions, rank,
                *x.stride(), *out.stride(), *low.stride(), *_strides(up, gate),
                BLOCK_C=block_c, BLOCK_N=block_n, BLOCK_R=_block(rank, _MAX_RANK),
                GATED=gate is not None, LAST=last,
                ONCE=fits_in_cache(x) and not last,  # a sweep on an H200: 8 % less, elsewhere more
                WIDE=INTERPRETED,  # the interpreter multiplies no bfloat16 matrices
                num_warps=2 if block_c * block_n <= 2048 else 4,
            )  # fmt: skip
    return out


def _last(maps: Tensor) -> bool:
    """Tell whether the channels of a position lie side by side."""
    return maps.stride(1) == 1


def _strides(up: Tensor, gate: Tensor | None) -> tuple[int, ...]:
    """What the kernels take of them: along batch, channels and rank, and along batch and rank."""
    if gate is None:
        return (*up.stride(), 0, 0)
    return (0, *up.stride(), 0 if gate.shape[0] == 1 else gate.stride(0), gate.stride(1))


def _gate_like(up: Tensor, gate: Tensor | None) -> Tensor:
    return up.new_empty(0) if gate is None else gate.new_empty(gate.shape)


class _Launch(NamedTuple):
    """One of the two backward kernels, how many programs, and into how many sums they write."""

    kernel: Any
    programs: int
    parts: int
    gate_parts: int
    options: dict[str, int]


def _parts(wanted: int, positions: int, rank: int) -> int:
    """Into how many parts of the positions to sum up: no more than leaves the sums small."""
    return min(wanted, max(16, positions // (16 * rank)))


def _apart(grad: Tensor, rank: int) -> _Launch:
    """Of the kernel that reads twice; sizes by sweeps on H200s, as below."""
    batch, channels, positions = grad.shape
    block_c, block_n, up_c = 64 if channels % 128 else 128, 64, 64
    up_n = 64 if _last(grad) and block_c == 128 else 128
    parts = _parts(triton.cdiv(positions, _TILES * up_n), positions, rank)
    tiles_c = triton.cdiv(channels, up_c)
    blocks = {"BLOCK_C": block_c, "BLOCK_N": block_n, "UP_C": up_c, "UP_N": up_n}
    tile = (64 + _block(rank, _MAX_RANK)) * 128 * grad.itemsize  # of either loop, at most
    options = {"AHEAD": stages(grad.device, tile, 3), "num_warps": 4}
    programs = batch * (tiles_c * parts + triton.cdiv(positions, block_n))
    return _Launch(_backward_apart, programs, parts, parts * tiles_c, blocks | options)


def _together(grad: Tensor, rank: int) -> _Launch:
    """Of the kernel that reads once."""
    batch, channels, positions = grad.shape
    programs, ahead = (2 * _PROGRAMS, 2) if _last(grad) else (_PROGRAMS, 3)
    block_c = _block(channels, _MAX_CHANNELS)
    block_n = _block(positions, max(_LEAST, min(128, 16384 // block_c)))
    parts = min(triton.cdiv(positions, block_n), triton.cdiv(programs, batch))
    parts = _parts(parts, positions, rank)
    tile = (block_c + _block(rank, _MAX_RANK)) * block_n * grad.itemsize
    warps = 4 if block_c <= 256 else 8
    options = {"AHEAD": stages(grad.device, tile, ahead), "num_warps": warps}
    blocks = {"BLOCK_C": block_c, "BLOCK_N": block_n}
    return _Launch(_backward, batch * parts, parts, parts, blocks | options)


@torch.library.custom_op("perceive_adapter::add_low_rank_backward", mutates_args=())
def _gradients(
    grad: Tensor, low: Tensor, up: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``low``, ``up`` and ``gate``, the last one empty without a gate."""
    of_low = torch.empty_like(low)
    batch, channels, positions = grad.shape
    rank = low.shape[1]
    if not grad.numel():
        return of_low, up.new_zeros(up.shape), _gate_like(up, gate).zero_()
    launch = (_apart if fits_in_cache(grad) else _together)(grad, rank)
    sums = grad.new_empty((launch.parts, batch, channels, rank), dtype=torch.float32)
    gate_sums = grad.new_empty((launch.gate_parts, batch, rank), dtype=torch.float32)
    with torch.cuda.device_of(grad):
        launch.kernel[(launch.programs,)](
            grad, low, up, gate, of_low, sums, gate_sums,
            channels, positions, rank, launch.parts, batch,
            *grad.stride(), *low.stride(), *of_low.stride(), *_strides(up, gate),
            BLOCK_R=_block(rank, _MAX_RANK), GATED=gate is not None, LAST=_last(grad),
            WIDE=INTERPRETED,
            **launch.options,
        )  # fmt: skip
    if gate is None:
        return of_low, summed(sums, up.dtype), _gate_like(up, gate)
    of_gates = gate_sums.view(-1, *gate.shape)
    return of_low, *summed_both(sums.flatten(0, 1), of_gates, up.dtype, gate.dtype)


@add_product.register_fake
def _(x: Tensor, low: Tensor, up: Tensor, gate: Tensor | None) -> Tensor:
    return torch.empty_like(x)


@_gradients.register_fake
def _(grad: Tensor, low: Tensor, up: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(low), up.new_empty(up.shape), _gate_like(up, gate)


@register_flop_formula(torch.ops.perceive_adapter.add_low_rank)
def _flops(x: Any, low: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * low[1]


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    low, up, gate = ctx.saved_tensors
    of_low, of_up, of_gate = _gradients(grad, low, up, gate)
    return grad, of_low, of_up, None if gate is None else of_gate


add_product.register_autograd(_differentiate, setup_context=_keep)


def takes(x: Tensor, low: Tensor) -> bool:
    """Tell whether the kernel is for such features; a library's product serves the others."""
    return x.shape[1] <= _MAX_CHANNELS and low.shape[1] <= _MAX_RANK and x.shape[2] >= _LEAST
