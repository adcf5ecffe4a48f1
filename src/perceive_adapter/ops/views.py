"""Feature maps of any layout as one: (B, C, N), whatever the strides."""

from __future__ import annotations

from torch import Tensor

__all__ = ["as_rows", "like_before"]


def as_rows(features: Tensor, channel_axis: int) -> Tensor:
    """View (B, C, ...) or (B, ..., C) as (B, C, N); a copy only where memory has gaps.

    Args:
        features: of three axes or more.
        channel_axis: 1 or -1.
    """
    if channel_axis == 1:
        return features.flatten(2)
    return features.flatten(1, -2).transpose(1, 2)


def like_before(rows: Tensor, features: Tensor, channel_axis: int) -> Tensor:
    """Give (B, C, N) the shape of ``features`` back, without a copy."""
    if channel_axis == 1 and rows.stride(1) != 1:
        return rows.view(*rows.shape[:2], *features.shape[2:])
    # A view of one image that is not dense has any stride along the batch, which shows when torch
    # looks for the memory format: so the dense side first.
    spatial = features.shape[2:] if channel_axis == 1 else features.shape[1:-1]
    dense = rows.transpose(1, 2)
    return dense.view(rows.shape[0], *spatial, rows.shape[1]).movedim(-1, channel_axis)
