"""Native-resolution views of an image, so that perception costs the same at any image size."""

import math
from typing import TypeAlias

from torch import SymInt, Tensor, cat, stack

from perceive_adapter.data.traced_views import traced_views
from perceive_adapter.errors import ConfigError, ImageError

__all__ = ["even_views", "flipped_views", "native_views"]

_Layout: TypeAlias = tuple[tuple[int, int], tuple[int, int]]
"""Height and width of the views, and in how many rows and columns they lie."""


def native_views(image: Tensor, size: int, limit: int, multiple: int = 1) -> Tensor:
    """Cut at most ``limit`` evenly spread crops of ``size`` pixels, without resampling.

    Noise, rain streaks and JPEG blocks do not survive downscaling, and a whole photograph does not
    fit a perceiver's memory. Crops at native resolution keep the first and bound the second. The
    grid is deterministic, reaches the image's borders, and follows its aspect ratio: it is the one
    of at most ``limit`` crops whose larger pitch is smallest, and has no more crops than it takes
    to cover the image.

    An image smaller than ``size`` in a dimension is not padded or enlarged: its crops keep that
    dimension, rounded down to ``multiple`` where it is larger; what is left over at both ends is
    not seen. An image that fits altogether is the single view, and is not copied.

    Args:
        image: (B, C, H, W), any dtype and value range.
        size: largest height and width of a crop, in pixels.
        limit: largest number of crops.
        multiple: to which the sides of a crop are rounded down, unless the image is smaller. A
            network that strides over zero-padded maps sees another border at other sizes.

    Returns:
        (B, V, C, min(size, H), min(size, W)) of the image's dtype, V from 1 to ``limit``, in rows
        from the top left; the sides rounded down to ``multiple``. Differentiable.

    Raises:
        ConfigError: ``size``, ``limit`` or ``multiple`` is less than 1.
        ImageError: the image does not have four dimensions, or has no pixels.

    Example:
        >>> import torch
        >>> native_views(torch.rand(2, 3, 300, 600), size=256, limit=16).shape
        torch.Size([2, 6, 3, 256, 256])
        >>> native_views(torch.rand(2, 3, 4000, 6000), size=256, limit=16).shape
        torch.Size([2, 15, 3, 256, 256])
        >>> native_views(torch.rand(1, 3, 64, 48), size=256, limit=16).shape
        torch.Size([1, 1, 3, 64, 48])
    """
    _check(image, size, limit, multiple)
    if _is_symbolic(image):
        return traced_views(image, size, limit, multiple, even=False, turned=False)
    return _cut(image, *_native_layout(image, size, limit, multiple))


def even_views(image: Tensor, largest: int, limit: int, multiple: int = 1) -> Tensor:
    """Cut an image into equal tiles side by side, none longer than ``largest`` pixels.

    Where that would take more than ``limit`` tiles, spread crops of at most ``largest`` pixels
    evenly, as :func:`native_views` does. A tile's side is rounded to ``multiple``, that of a single
    one down, and the tiles are spread evenly, so that a few pixels may be seen twice or not at all.

    Args:
        image: (B, C, H, W).
        largest: longest side of a tile in pixels, at least 1.
        limit: largest number of tiles, at least 1.
        multiple: as for :func:`native_views`.

    Returns:
        (B, N, C, h, w), N from 1 to ``limit``, in rows from the top left. Differentiable.

    Raises:
        ImageError: as for :func:`native_views`.
        ConfigError: as for :func:`native_views`.

    Example:
        >>> from torch import rand
        >>> even_views(rand(1, 3, 300, 481), largest=256, limit=16).shape
        torch.Size([1, 4, 3, 150, 240])
        >>> even_views(rand(1, 3, 300, 481), largest=256, limit=16, multiple=16).shape
        torch.Size([1, 4, 3, 144, 240])
    """
    _check(image, largest, limit, multiple)
    if _is_symbolic(image):
        return traced_views(image, largest, limit, multiple, even=True, turned=False)
    return _cut(image, *_layout(image, largest, limit, multiple))


def flipped_views(image: Tensor, largest: int, limit: int, multiple: int = 1) -> Tensor:
    """Cut views as :func:`even_views`, and turn them by where they lie.

    Those of every second column are mirrored, those of every second row are turned upside down. A
    single view is given both ways, as it is and mirrored.

    A network may read streaks and smears of one slant better than those of the other, or a veil
    better where it is thicker above. The mean over views of all hands does not, and hardly moves
    when the image is flipped; not at all where an even number of views lie along the flipped side.

    Args:
        image: as for :func:`even_views`.
        largest: as for :func:`even_views`.
        limit: as for :func:`even_views`.
        multiple: as for :func:`even_views`.

    Returns:
        As :func:`even_views`; two views where it gives one. Differentiable.

    Raises:
        ImageError: as for :func:`native_views`.
        ConfigError: as for :func:`native_views`.

    Example:
        >>> import torch
        >>> image = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]).view(1, 1, 2, 4)
        >>> flipped_views(image, 2, 16).flatten().tolist()
        [1.0, 2.0, 5.0, 6.0, 4.0, 3.0, 8.0, 7.0]
        >>> flipped_views(image[..., :1, :2], 2, 16).flatten().tolist()
        [1.0, 2.0, 2.0, 1.0]
    """
    _check(image, largest, limit, multiple)
    if _is_symbolic(image):
        return traced_views(image, largest, limit, multiple, even=True, turned=True)
    views = even_views(image, largest, limit, multiple)
    _, (rows, columns) = _layout(image, largest, limit, multiple)
    if rows * columns == 1:
        return cat([views, views.flip(4)], dim=1)
    grid = views.reshape(len(views), rows, columns, *views.shape[2:])
    grid = stack([r.flip(3) if i % 2 else r for i, r in enumerate(grid.unbind(1))], dim=1)
    grid = stack([c.flip(4) if i % 2 else c for i, c in enumerate(grid.unbind(2))], dim=2)
    return grid.flatten(1, 2)


def _check(image: Tensor, size: int, limit: int, multiple: int) -> None:
    if size < 1 or limit < 1 or multiple < 1:
        raise ConfigError(
            f"got size={size}, limit={limit} and multiple={multiple} for the views of an image: "
            "expected at least 1 of each. Give the crop's side in pixels and the largest number of "
            "crops."
        )
    if image.ndim != 4 or image.shape[-2] < 1 or image.shape[-1] < 1:
        raise ImageError(
            f"got an image of shape {tuple(image.shape)} to cut views out of: expected "
            "(B, C, H, W) with at least one pixel. Add a batch dimension with image[None] if it is "
            "missing."
        )


def _is_symbolic(image: Tensor) -> bool:
    """Whether torch.export traces a graph for images of more than one size."""
    return any(isinstance(length, SymInt) for length in image.shape[-2:])


def _native_layout(image: Tensor, size: int, limit: int, multiple: int) -> _Layout:
    height, width = image.shape[-2:]
    sides = _rounded(min(size, height), multiple), _rounded(min(size, width), multiple)
    return sides, _grid(height / min(size, height), width / min(size, width), limit)


def _layout(image: Tensor, largest: int, limit: int, multiple: int) -> _Layout:
    height, width = image.shape[-2:]
    rows, columns = -(-height // largest), -(-width // largest)
    if rows * columns > limit:
        return _native_layout(image, largest, limit, multiple)
    tile = _tile(height, rows, largest, multiple), _tile(width, columns, largest, multiple)
    return tile, (rows, columns)


def _tile(length: int, count: int, largest: int, multiple: int) -> int:
    """Side of ``count`` tiles along a length: the nearest multiple, one that fits at any rate."""
    side = length // count
    return _rounded(side if count == 1 else min(side + multiple // 2, largest), multiple)


def _rounded(side: int, multiple: int) -> int:
    """``side`` rounded down to the multiple; a side that is shorter than one is kept."""
    return side // multiple * multiple or side


def _cut(image: Tensor, sides: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Cut out evenly spread crops; the image itself where there is one that is as large."""
    height, width = image.shape[-2:]
    if (height, width) == sides:
        return image.unsqueeze(1)
    crops = [
        image[..., top : top + sides[0], left : left + sides[1]]
        for top in _offsets(height - sides[0], grid[0])
        for left in _offsets(width - sides[1], grid[1])
    ]
    return stack(crops, dim=1)


def _grid(height: float, width: float, limit: int) -> tuple[int, int]:
    """Rows and columns of the grid; ``height`` and ``width`` count in crops."""
    needed_rows, needed_columns = math.ceil(height), math.ceil(width)
    rows, columns = 1, min(needed_columns, limit)
    # Plain comparisons: torch.compile traces no min() with a key over symbolic sizes.
    for more_rows in range(2, min(needed_rows, limit) + 1):
        fewer_columns = min(needed_columns, limit // more_rows)
        if max(height / more_rows, width / fewer_columns) <= max(height / rows, width / columns):
            rows, columns = more_rows, fewer_columns
    return rows, columns


def _offsets(slack: int, count: int) -> list[int]:
    """``count`` evenly spread integers from 0 to ``slack``; a single one lies in the middle."""
    if count == 1:
        return [slack // 2]
    return [slack * index // (count - 1) for index in range(count)]
