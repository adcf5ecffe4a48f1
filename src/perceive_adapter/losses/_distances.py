"""Distances of the restored images' features to those of what they are compared with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perceive_adapter.losses._frozen import full_precision
from perceive_adapter.ops import reference_distances


@dataclass(frozen=True)
class References:
    """What restored images are compared with, and the features of it.

    Attributes:
        images: the target, the degraded and the medium images, each (B, C, H, W).
        mask: (B, n), which medium images there are.
        levels: features of all of them, each level (2 + n, B, ...).
    """

    images: list[Tensor]
    mask: Tensor
    levels: list[Tensor]


def in_one_pass(device: torch.device) -> bool:
    """Whether all references go through the network as one batch.

    An accelerator wants few large launches; on a CPU one reference at a time stays in its caches
    and frees its features early, which is faster by a sixth and takes less memory.
    """
    return device.type != "cpu"


def distances_in_turn(
    levels: Sequence[Tensor], references: Iterator[Sequence[Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d(R, GT) (L, B), d(R, LQ and mediums) (1 + n, L, B) and d(GT, LQ) (L, B)."""
    target, degraded = next(references), next(references)
    pull, scale = _distances(levels, target), _distances(target, degraded)
    push = [_distances(levels, degraded)]
    push.extend(_distances(levels, medium) for medium in references)
    return pull, torch.stack(push), scale


def stacked_distances(
    levels: Sequence[Tensor], references: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same of the levels of all references, each (2 + n, B, ...)."""
    if not in_one_pass(levels[0].device):
        count = len(references[0])
        return distances_in_turn(levels, ([of[i] for of in references] for i in range(count)))
    found, scale = [], []
    for level, of_all in zip(levels, map(full_precision, references), strict=True):
        found.append(reference_distances(full_precision(level), of_all))
        scale.append(_distance(of_all[0], of_all[1]))
    distances = torch.stack(found, dim=1)  # (2 + n, L, B)
    return distances[0], distances[1:], torch.stack(scale)


def _distances(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Return the distance per level and sample, (L, B)."""
    return torch.stack([_distance(a, b) for a, b in zip(first, second, strict=True)])


def _distance(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean absolute difference per sample, (B,)."""
    return reference_distances(full_precision(first), full_precision(second)[None])[0]
