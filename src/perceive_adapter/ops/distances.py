"""Distance of one feature map to several others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from perceive_adapter.ops.dispatch import READY, fused

if "reference_distances" in READY:
    from perceive_adapter.ops.kernels.distances import distances_to_rows

__all__ = ["reference_distances"]

_BLOCK = 2**19  # numbers that stay in a processor's cache while they are subtracted and added up


def reference_distances(features: Tensor, references: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the mean absolute difference to each reference, per sample.

    Neither differences nor signs are kept for the backward pass, which can be taken once. On a GPU
    one read of the features serves all references, forward and backward; on a CPU it works block
    by block, and does not bring together what comes apart.

    Args:
        features: (B, ...); receives the gradient.
        references: (n, B, ...), or n tensors (B, ...), constants.

    Returns:
        (n, B).
    """
    each = [references] if isinstance(references, Tensor) else list(references)
    if not each:
        return features.new_zeros(0, len(features))
    last = features.ndim == 4 and features.stride(1) == 1  # in the order that memory has
    empty = not (features.numel() and all(maps.numel() for maps in each))
    kernel = not empty and fused("reference_distances", features, *each)
    on_cpu = features.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and not (kernel or empty):
        maps = (one.movedim(1, -1) if last else one for one in (features, *references))
        rows, *others = (one.flatten(1) for one in maps)
        found: Tensor = _InBlocks.apply(rows, *(other.detach() for other in others))
        return found
    together = references if isinstance(references, Tensor) else torch.stack(each)
    if last:
        features, together = features.movedim(1, -1), together.movedim(2, -1)
    rows, of_all = features.flatten(1), together.detach().flatten(2)
    return distances_to_rows(rows, of_all) if kernel else reference(rows, of_all)


def reference(features: Tensor, references: Tensor) -> Tensor:
    """The same in pure torch."""
    return (features - references).abs().flatten(2).mean(2)


class _InBlocks(torch.autograd.Function):
    """The same of (B, M) and n tensors (B, M)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, *references: Tensor) -> Tensor:
        ctx.save_for_backward(rows, *references)
        wide = torch.promote_types(rows.dtype, torch.float32)
        found = rows.new_zeros(len(references), len(rows), dtype=wide)
        for of_rows, block, others in _blocks(found, rows, references):
            for of_one, other in zip(of_rows, others, strict=True):
                of_one += torch.sub(block, other).abs_().sum(1, dtype=wide)
        return found.div_(rows.shape[1]).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *references = ctx.saved_tensors
        of_rows = torch.zeros_like(rows)
        weights = (grad / rows.shape[1])[..., None]
        parts = _blocks(weights, of_rows, [])
        for (weight, part, _), (_, block, others) in zip(
            parts, _blocks(weights, rows, references), strict=True
        ):
            for of_one, other in zip(weight, others, strict=True):
                part.addcmul_(torch.sub(block, other).sign_(), of_one)
        return of_rows, *(None for _ in references)


def _blocks(
    each: Tensor, rows: Tensor, references: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, ...]]]:
    """Parts of ``each`` (n, B, ...), with pieces (k, m) of its rows and of the references."""
    together = max(1, _BLOCK // rows.shape[1])
    apart = (torch.split(maps, together) for maps in (rows, *references))
    for of_rows, *maps in zip(torch.split(each, together, 1), *apart, strict=True):
        for block, *others in zip(*(torch.split(part, _BLOCK, 1) for part in maps), strict=True):
            yield of_rows, block, tuple(others)
