"""Scale and shift per image and channel."""

from __future__ import annotations

import torch
from torch import Tensor

from perceive_adapter.ops.dispatch import fused, per_row
from perceive_adapter.ops.views import as_rows, like_before

if fused("modulate"):
    from perceive_adapter.ops.kernels.modulation import modulate_rows

__all__ = ["modulate"]


def modulate(features: Tensor, scale: Tensor, shift: Tensor, channel_axis: int = 1) -> Tensor:
    """Return ``features * scale + shift`` in the dtype of ``features``.

    One read and one write of the features on a GPU, and two reads and a write backward.

    Args:
        features: (B, C, ...) or (B, ..., C).
        scale: broadcasts over the features, such as (B, C, 1, 1) or (1, 1, C).
        shift: of the shape of ``scale``.
        channel_axis: 1 or -1.

    Source: FiLM, https://arxiv.org/abs/1709.07871, equation 2.
    """
    if (
        fused("modulate", features, scale, shift)
        and features.ndim > 2
        and per_row(scale, features, channel_axis)
    ):
        rows = as_rows(features, channel_axis)
        rows = modulate_rows(rows, scale.flatten(1), shift.flatten(1))
        return like_before(rows, features, channel_axis)
    return reference(features, scale, shift)


def reference(features: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The same in pure torch."""
    return torch.addcmul(shift, features, scale).to(features.dtype)
