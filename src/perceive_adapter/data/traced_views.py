"""Views of an image whose size is not known yet, as ``torch.export`` traces them.

:mod:`~perceive_adapter.data.views` decides by the image's size how many views there are; a graph
for images of any size cannot branch on that. Here the same layout is computed by tensors, so that
it is part of the graph.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

__all__ = ["traced_views"]


class _Axis(NamedTuple):
    """Length of the image, side and number of the views along an axis, tensors of no dimension."""

    length: Tensor
    side: Tensor
    views: Tensor


def traced_views(
    image: Tensor, size: int, limit: int, multiple: int, *, even: bool, turned: bool
) -> Tensor:
    """Cut views as :func:`~perceive_adapter.data.views.native_views` and its like do.

    Args:
        image: (B, C, H, W), H and W symbolic.
        size: largest height and width of a view.
        limit: largest number of views.
        multiple: to which sides are rounded.
        even: whether as ``even_views`` and ``flipped_views``, or as ``native_views``.
        turned: whether as ``flipped_views``.

    Returns:
        (B, V, C, h, w), where V, h and w are known when the graph runs.
    """
    height, width = (
        torch.full((), length, dtype=torch.int64, device=image.device)
        for length in image.shape[-2:]
    )
    vertical, horizontal = _layout(height, width, size, limit, multiple, even)
    shown = horizontal.views
    if turned:  # a lone view is given twice
        shown = torch.where(vertical.views * shown == 1, 2, shown)
    rows = _places(vertical, vertical.views, limit, size, turned)
    columns = _places(horizontal, shown, limit + 1, size, turned)
    # Channels last, so that rows and columns of views can be joined without a copy.
    views = image.permute(0, 2, 3, 1)[:, rows[:, None, :, None], columns[None, :, None, :]]
    return views.flatten(1, 2).movedim(-1, 2)


def _layout(
    height: Tensor, width: Tensor, size: int, limit: int, multiple: int, even: bool
) -> tuple[_Axis, _Axis]:
    high, wide = height.clamp(max=size), width.clamp(max=size)
    rows, columns = _grid(height, high, width, wide, limit)
    high, wide = _rounded(high, multiple), _rounded(wide, multiple)
    if even:
        all_rows, all_columns = _ceil(height, size), _ceil(width, size)
        fits = all_rows * all_columns <= limit
        high = torch.where(fits, _tile(height, all_rows, size, multiple), high)
        wide = torch.where(fits, _tile(width, all_columns, size, multiple), wide)
        rows, columns = torch.where(fits, all_rows, rows), torch.where(fits, all_columns, columns)
    return _Axis(height, high, rows), _Axis(width, wide, columns)


def _grid(
    height: Tensor, high: Tensor, width: Tensor, wide: Tensor, limit: int
) -> tuple[Tensor, Tensor]:
    """Of all grids within the limit the one whose larger pitch is smallest, with most rows."""
    rows = torch.arange(1, limit + 1, device=height.device)
    most = torch.tensor([limit // row for row in range(1, limit + 1)], device=height.device)
    columns = torch.minimum(_ceil(width, wide), most)
    pitch = torch.maximum(height.double() / high / rows, width.double() / wide / columns)
    pitch = pitch.masked_fill(rows > _ceil(height, high), torch.inf)
    best = torch.where(pitch == pitch.amin(0), rows, 0).amax(0)
    return best, torch.where(rows == best, columns, 0).amax(0)


def _tile(length: Tensor, count: Tensor, size: int, multiple: int) -> Tensor:
    side = length // count
    nearest = (side + multiple // 2).clamp(max=size)
    return _rounded(torch.where(count == 1, side, nearest), multiple)


def _rounded(side: Tensor, multiple: int) -> Tensor:
    return torch.where(side < multiple, side, side // multiple * multiple)


def _ceil(length: Tensor, part: Tensor | int) -> Tensor:
    return (length + part - 1) // part


def _places(axis: _Axis, shown: Tensor, limit: int, size: int, turned: bool) -> Tensor:
    """Which pixels along an axis each view shows, (count, side), every second one backwards."""
    views = torch.arange(_number(shown, limit), device=shown.device)[:, None]
    pixels = torch.arange(_number(axis.side, size), device=shown.device)[None]
    slack = axis.length - axis.side
    spread = slack * views // (axis.views - 1).clamp(min=1)
    first = torch.where(axis.views == 1, slack // 2, spread)
    if turned:
        pixels = torch.where(views % 2 == 1, axis.side - 1 - pixels, pixels)
    return first + pixels


def _number(value: Tensor, largest: int) -> int:
    number = cast("int", value.item())  # int() would ask for a number at once
    torch._check(number >= 1)
    torch._check(number <= largest)
    return number
