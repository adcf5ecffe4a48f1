"""The end of a gated low-rank branch: back to all channels, and onto the layer's output."""

from __future__ import annotations

import torch
from torch import Tensor

from perceive_adapter.ops.dispatch import READY, fused

if "add_low_rank" in READY:
    from perceive_adapter.ops.kernels.low_rank import add_product, takes

__all__ = ["add_low_rank"]


def add_low_rank(
    features: Tensor,
    low: Tensor,
    up: Tensor,
    gate: Tensor | None = None,
    *,
    in_place: bool = False,
) -> Tensor:
    """Return ``features + up diag(gate) @ low``, in the memory format of the features.

    What is raised to all channels is never written by itself. On a GPU one kernel reads the
    features once and writes the sum, and its backward pass reads the gradient once, or twice where
    the device's cache holds it.

    Args:
        features: (B, C, N) of any strides, the layer's output.
        low: (B, R, N), the low-rank features.
        up: (C, R); without a gate also (B, C, R), or (1, C, R) for all. Where the features and
            ``low`` are of one dtype, the product is too.
        gate: (B, R), or (1, R) for all; None for ones.
        in_place: the features may be written over, which saves a copy of them on a CPU; not where
            gradients are wanted.

    Source: LoRA, https://arxiv.org/abs/2106.09685, equation 3, with a gate between both factors.
    """
    (batch, channels, _), rank = features.shape, low.shape[1]
    given = (features, low, up) if gate is None else (features, low, up, gate)
    alike = low.dtype == features.dtype
    if alike and fused("add_low_rank", *given) and takes(features, low):
        if gate is None:
            up = up.expand(batch, channels, rank)
        else:
            up = up.expand(channels, rank)
            gate = gate.expand(1 if gate.shape[0] == 1 else batch, rank)
        fused_sum: Tensor = add_product(features, low, up, gate)
        return fused_sum
    gated = _gated(up, gate).to(low.dtype).expand(batch, -1, -1)
    if not alike:  # an adapter in single precision beside a network in half
        return features + torch.bmm(gated, low).to(features.dtype)
    product = Tensor.baddbmm_ if in_place else torch.baddbmm
    if features.stride(1) == 1:
        wide, narrow, matrices = (x.transpose(1, 2) for x in (features, low, gated))
        return product(wide, narrow, matrices).transpose(1, 2)
    return product(features, gated, low)


def _gated(up: Tensor, gate: Tensor | None) -> Tensor:
    """(B, C, R), (1, C, R) or (C, R)."""
    return up if gate is None else up * gate[:, None]


def reference(features: Tensor, low: Tensor, up: Tensor, gate: Tensor | None = None) -> Tensor:
    """The same, step by step."""
    return features + torch.bmm(_gated(up, gate).expand(features.shape[0], -1, -1), low)
