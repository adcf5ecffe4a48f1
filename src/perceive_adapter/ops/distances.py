"""Distance of one feature map to several others."""

from __future__ import annotations

from torch import Tensor

from perceive_adapter.ops.dispatch import fused

if fused("reference_distances"):
    from perceive_adapter.ops.kernels.distances import distances_to_rows

__all__ = ["reference_distances"]


def reference_distances(features: Tensor, references: Tensor) -> Tensor:
    """Return the mean absolute difference to each reference, per sample.

    One read of the features for all references on a GPU, and one pass backward.

    Args:
        features: (B, ...); receives the gradient.
        references: (n, B, ...), constants.

    Returns:
        (n, B).
    """
    references = references.detach()
    if fused("reference_distances", features, references) and references.numel():
        if features.ndim == 4 and features.stride(1) == 1:  # in the order that memory has
            features, references = features.movedim(1, -1), references.movedim(2, -1)
        return distances_to_rows(features.flatten(1), references.flatten(2))
    return reference(features, references)


def reference(features: Tensor, references: Tensor) -> Tensor:
    """The same in pure torch."""
    return (features - references).abs().flatten(2).mean(2)
