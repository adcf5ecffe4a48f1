"""``features + up diag(gate) low`` of (B, C, N) and (B, R, N)."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from perceive_adapter.ops.dispatch import INTERPRETED

__all__ = ["MAX_RANK", "add_low_rank_rows"]

MAX_RANK = 64
_LEAST = 16  # the smallest side of a matrix that tensor cores take


@triton.jit
def _forward(
    x_ptr, low_ptr, up_ptr, gate_ptr, out_ptr,
    channels, positions, rank,
    x_b, x_c, x_n, out_b, out_c, out_n, low_b, low_r, low_n, up_c, up_r, gate_b, gate_r,
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
    gate = tl.load(gate_ptr + row * gate_b + r * gate_r, mask=in_r, other=0).to(tl.float32)
    place = up_ptr + c[:, None] * up_c + r[None, :] * up_r
    up = tl.load(place, mask=in_c[:, None] & in_r[None, :], other=0).to(tl.float32)
    place = low_ptr + row * low_b + r[:, None] * low_r + n[None, :] * low_n
    low = tl.load(place, mask=in_r[:, None] & in_n[None, :], other=0)
    gated = (up * gate[None, :]).to(low.dtype)
    if WIDE:
        gated, low = gated.to(tl.float32), low.to(tl.float32)
    raised = tl.dot(gated, low, input_precision="ieee")
    mask = in_c[:, None] & in_n[None, :]
    x = tl.load(x_ptr + row * x_b + c[:, None] * x_c + n[None, :] * x_n, mask=mask, other=0)
    place = out_ptr + row * out_b + c[:, None] * out_c + n[None, :] * out_n
    tl.store(place, (x.to(tl.float32) + raised).to(out_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("perceive_adapter::add_low_rank", mutates_args=())
def add_low_rank_rows(x: Tensor, low: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    """Add the branch; x (B, C, N), low (B, R, N), up (C, R), gate (B or 1, R)."""
    out = torch.empty_like(x)
    if x.numel():
        batch, channels, positions = x.shape
        block_r = max(_LEAST, triton.next_power_of_2(up.shape[1]))
        block_c = min(64, max(_LEAST, triton.next_power_of_2(channels)))
        block_n = min(128, max(_LEAST, triton.next_power_of_2(positions)))
        grid = (batch * triton.cdiv(channels, block_c) * triton.cdiv(positions, block_n),)
        _forward[grid](
            x, low, up, gate, out, channels, positions, up.shape[1],
            *x.stride(), *out.stride(), *low.stride(), *up.stride(),
            gate.stride(0) if gate.shape[0] > 1 else 0, gate.stride(1),
            BLOCK_C=block_c, BLOCK_N=block_n, BLOCK_R=block_r,
            WIDE=INTERPRETED,  # the interpreter multiplies no bfloat16 matrices
        )  # fmt: skip
    return out


@add_low_rank_rows.register_fake
def _(x: Tensor, low: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(x)


@register_flop_formula(torch.ops.perceive_adapter.add_low_rank)
def _flops(x: Any, low: Any, up: Any, gate: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * up[1]


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two products with a matrix of few columns, which the library for them does well."""
    low, up, gate = ctx.saved_tensors
    gated = (up * gate[:, None]).to(grad.dtype).expand(grad.shape[0], -1, -1)
    grad_low = torch.bmm(gated.transpose(1, 2), grad).to(low.dtype)
    of_gated = torch.bmm(grad, low.transpose(1, 2)).float()  # (B, C, R)
    grad_up = (of_gated * gate[:, None]).sum(0).to(up.dtype)
    grad_gate = (of_gated * up).sum(1)
    if gate.shape[0] == 1:
        grad_gate = grad_gate.sum(0, keepdim=True)
    return grad, grad_low, grad_up, grad_gate.to(gate.dtype)


add_low_rank_rows.register_autograd(_differentiate, setup_context=_keep)
