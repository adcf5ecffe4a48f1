"""The end of a gated low-rank branch: back to all channels, and onto the layer's output."""

from __future__ import annotations

import torch
from torch import Tensor

from perceive_adapter.ops.dispatch import READY, fused

if "add_low_rank" in READY:
    from perceive_adapter.ops.kernels.low_rank import add_product, takes

__all__ = ["add_low_rank"]


def add_low_rank(features: Tensor, low: Tensor, gated: Tensor, *, in_place: bool = False) -> Tensor:
    """Return ``features + gated @ low``, in the memory format of the features.

    What is raised to all channels is never written by itself. On a GPU one kernel reads the
    features once and writes the sum, and its backward pass reads the gradient once.

    Args:
        features: (B, C, N) of any strides, the layer's output.
        low: (B, R, N), the low-rank features.
        gated: (B, C, R), or (1, C, R) for all; cast to the features' dtype.
        in_place: the features may be written over, which saves a copy of them on a CPU; not where
            gradients are wanted.

    Source: LoRA, https://arxiv.org/abs/2106.09685, equation 3, with a gate between both factors.
    """
    gated = gated.to(low.dtype).expand(features.shape[0], -1, -1)
    if low.dtype != features.dtype:  # an adapter in single precision beside a network in half
        return features + torch.bmm(gated, low).to(features.dtype)
    if fused("add_low_rank", features, low) and takes(features, low):
        fused_sum: Tensor = add_product(features, low, gated)
        return fused_sum
    product = Tensor.baddbmm_ if in_place else torch.baddbmm
    if features.stride(1) == 1:
        wide, narrow, matrices = (x.transpose(1, 2) for x in (features, low, gated))
        return product(wide, narrow, matrices).transpose(1, 2)
    return product(features, gated, low)


def reference(features: Tensor, low: Tensor, gated: Tensor) -> Tensor:
    """The same, step by step."""
    return features + torch.bmm(gated.expand(features.shape[0], -1, -1), low)
