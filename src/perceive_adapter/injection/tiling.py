"""Cutting an image into overlapping tiles and blending what comes back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Grid", "weights"]


@dataclass(frozen=True)
class Grid:
    """Tiles of one size over an image, all starts on a multiple of ``align`` where that can be.

    A network that takes one size only has no neighbour on its own grid that overlaps: its tiles
    start where the overlap wants.

    Args:
        size: (height, width) of the image, multiples of ``align``.
        tile: (height, width) of a tile, multiples of ``align``, at most ``size``.
        overlap: pixels that neighbouring tiles share at least.
        align: the network's own grid, so that every tile sees it in the same phase.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    overlap: int
    align: int

    def starts(self, axis: int) -> list[int]:
        """Return the first pixel of every tile along one axis."""
        size, tile = self.size[axis], self.tile[axis]
        if tile >= size:
            return [0]
        most = tile - self.overlap
        step = most // self.align * self.align or most
        return [*range(0, size - tile, step), size - tile]

    def __len__(self) -> int:
        return len(self.starts(0)) * len(self.starts(1))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((top, left) for top in self.starts(0) for left in self.starts(1))


def weights(grid: Grid, start: int, axis: int, scale: float) -> Tensor:
    """Blending weight of each output row or column of a tile, from 0 to 1.

    Towards a neighbour, the outer three eighths of the overlap weigh nothing, since padding
    reaches into them, and the next quarter rises linearly, against the neighbour's. At the
    image's border the tile weighs fully.
    """
    length = round(grid.tile[axis] * scale)
    margin, ramp = grid.overlap * scale * 3 / 8, max(grid.overlap * scale / 4, 1)
    position = torch.arange(length, dtype=torch.float32, device="cpu") + 0.5
    result = torch.ones_like(position)
    if start > 0:
        result = torch.minimum(result, (position - margin) / ramp)
    if start + grid.tile[axis] < grid.size[axis]:
        result = torch.minimum(result, (length - position - margin) / ramp)
    return result.clamp(0, 1)
