"""The end of a gated low-rank branch: back to all channels, and onto the layer's output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perceive_adapter.ops.dispatch import fused, per_row
from perceive_adapter.ops.views import as_rows, like_before

if fused("add_low_rank"):
    from perceive_adapter.ops.kernels.low_rank import MAX_RANK, add_low_rank_rows

__all__ = ["add_low_rank"]


def add_low_rank(
    features: Tensor,
    low: Tensor,
    up: Tensor,
    gate: Tensor,
    channel_axis: int = 1,
    *,
    in_place: bool = False,
) -> Tensor:
    """Return ``features + up (gate * low)``, over the channels of every position.

    The gate goes into the small matrix ``up``, so that neither the gated nor the raised features
    are ever written.

    Args:
        features: (B, C, H, W) or (B, ..., C), the layer's output.
        low: the same in R channels.
        up: (C, R), or (C, R, 1, 1) as a convolution has it.
        gate: broadcasts over ``low``, such as (B, R, 1, 1) or (1, 1, R).
        channel_axis: 1 or -1.
        in_place: the features may be written over, which saves a copy of them; not where gradients
            are wanted.

    Source: LoRA, https://arxiv.org/abs/2106.09685, equation 3, with a gate between both factors.
    """
    if features.ndim < 3 or low.dtype != features.dtype or not per_row(gate, low, channel_axis):
        return reference(features, low, up, gate)
    wide, narrow = as_rows(features, channel_axis), as_rows(low, channel_axis)
    if wide.shape[2] == 1:  # one position does not show the memory format
        return reference(features, low, up, gate)
    if fused("add_low_rank", features, low, up, gate) and up.shape[1] <= MAX_RANK:
        rows = add_low_rank_rows(wide, narrow, up.flatten(1), gate.flatten(1))
    else:
        rows = _by_batched_product(wide, narrow, up.flatten(1), gate.flatten(1), in_place)
    return like_before(rows, features, channel_axis)


def _by_batched_product(
    wide: Tensor, narrow: Tensor, up: Tensor, gate: Tensor, in_place: bool
) -> Tensor:
    """The same of (B, C, N) and (B, R, N), in the memory format of ``wide``."""
    product = Tensor.baddbmm_ if in_place else torch.baddbmm
    gated = (up * gate[:, None]).to(wide.dtype).expand(wide.shape[0], -1, -1)
    if wide.stride(1) == 1:
        dense = wide.transpose(1, 2), narrow.transpose(1, 2), gated.transpose(1, 2)
        return product(*dense).transpose(1, 2)
    return product(wide, gated, narrow)


def reference(features: Tensor, low: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    """The same, step by step, for all layouts and dtypes."""
    gated, up = low * gate.to(low.dtype), up.to(low.dtype)
    raised = F.linear(gated, up) if up.ndim == 2 else F.conv2d(gated, up)
    return features + raised.to(features.dtype)
