"""Distance of one feature map to several others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from perceive_adapter.ops.dispatch import READY, fused

if "reference_distances" in READY:
    from perceive_adapter.ops.kernels.distances import distances_to_rows

__all__ = ["reference_distances"]

_BLOCK = 2**19  # numbers that stay in a processor's cache while they are subtracted and added up


def reference_distances(features: Tensor, references: Tensor) -> Tensor:
    """Return the mean absolute difference to each reference, per sample.

    Neither differences nor signs are kept for the backward pass, which can be taken once. On a GPU
    one read of the features serves all references, forward and backward; on a CPU it works block
    by block.

    Args:
        features: (B, ...); receives the gradient.
        references: (n, B, ...), constants.

    Returns:
        (n, B).
    """
    references = references.detach()
    if not references.numel():
        return reference(features, references)
    if features.ndim == 4 and features.stride(1) == 1:  # in the order that memory has
        features, references = features.movedim(1, -1), references.movedim(2, -1)
    rows, of_all = features.flatten(1), references.flatten(2)
    if fused("reference_distances", features, references):
        return distances_to_rows(rows, of_all)
    if features.device.type != "cpu" or torch.compiler.is_compiling():
        return reference(rows, of_all)
    found: Tensor = _InBlocks.apply(rows, of_all)
    return found


def reference(features: Tensor, references: Tensor) -> Tensor:
    """The same in pure torch."""
    return (features - references).abs().flatten(2).mean(2)


class _InBlocks(torch.autograd.Function):
    """The same of (B, M) and (n, B, M)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, references: Tensor) -> Tensor:
        ctx.save_for_backward(rows, references)
        found = rows.new_zeros(references.shape[:2])
        for of_rows, block, others in _blocks(rows, references, found):
            for of_one, other in zip(of_rows, others, strict=True):
                of_one += torch.sub(block, other).abs_().sum(1)
        return found.div_(rows.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows, references = ctx.saved_tensors
        of_rows = torch.zeros_like(rows)
        weights = (grad / rows.shape[1])[..., None]
        parts = _blocks(of_rows, references, weights)
        for (weight, part, _), (_, block, others) in zip(
            parts, _blocks(rows, references, weights), strict=True
        ):
            for of_one, other in zip(weight, others, strict=True):
                part.addcmul_(torch.sub(block, other).sign_(), of_one)
        return of_rows, None


def _blocks(
    rows: Tensor, references: Tensor, each: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Parts of ``each`` (n, B, ...), pieces (k, m) of its rows, and of the references (n, k, m)."""
    together = max(1, _BLOCK // rows.shape[1])
    for own, others, of_rows in zip(
        torch.split(rows, together),
        torch.split(references, together, 1),
        torch.split(each, together, 1),
        strict=True,
    ):
        pieces = torch.split(own, _BLOCK, 1), torch.split(others, _BLOCK, 2)
        for block, of_others in zip(*pieces, strict=True):
            yield of_rows, block, of_others
