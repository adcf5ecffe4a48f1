"""Native-resolution views of an image, so that perception costs the same at any image size."""

import math

from torch import Tensor, stack

from perceive_adapter.errors import ConfigError, ImageError

__all__ = ["even_views", "native_views"]


def native_views(image: Tensor, size: int, limit: int) -> Tensor:
    """Cut at most ``limit`` evenly spread crops of ``size`` pixels, without resampling.

    Noise, rain streaks and JPEG blocks do not survive downscaling, and a whole photograph does not
    fit a perceiver's memory. Crops at native resolution keep the first and bound the second. The
    grid is deterministic, reaches the image's borders, and follows its aspect ratio: it is the one
    of at most ``limit`` crops whose larger pitch is smallest, and has no more crops than it takes
    to cover the image.

    An image smaller than ``size`` in a dimension is not padded or enlarged: its crops keep that
    dimension. An image that fits altogether is the single view, and is not copied.

    Args:
        image: (B, C, H, W), any dtype and value range.
        size: largest height and width of a crop, in pixels.
        limit: largest number of crops.

    Returns:
        (B, V, C, min(size, H), min(size, W)) of the image's dtype, V from 1 to ``limit``, in rows
        from the top left. Differentiable.

    Raises:
        ConfigError: ``size`` or ``limit`` is less than 1.
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
    if size < 1 or limit < 1:
        raise ConfigError(
            f"native_views got size={size} and limit={limit}: both must be at least 1. "
            "Give the crop's side in pixels and the largest number of crops."
        )
    if image.ndim != 4 or image.shape[-2] < 1 or image.shape[-1] < 1:
        raise ImageError(
            f"native_views got an image of shape {tuple(image.shape)}: expected (B, C, H, W) with "
            "at least one pixel. Add a batch dimension with image[None] if it is missing."
        )
    height, width = image.shape[-2:]
    if height <= size and width <= size:
        return image.unsqueeze(1)
    crop_height, crop_width = min(size, height), min(size, width)
    rows, columns = _grid(height / crop_height, width / crop_width, limit)
    crops = [
        image[..., top : top + crop_height, left : left + crop_width]
        for top in _offsets(height - crop_height, rows)
        for left in _offsets(width - crop_width, columns)
    ]
    return stack(crops, dim=1)


def even_views(image: Tensor, largest: int, limit: int) -> Tensor:
    """Cut an image into equal tiles that do not overlap, none longer than ``largest`` pixels.

    Where that would take more than ``limit`` tiles, spread crops of at most ``largest`` pixels
    evenly, as :func:`native_views` does. Of sides that do not divide evenly, a few last pixels are
    left out.

    Args:
        image: (B, C, H, W).
        largest: longest side of a tile in pixels, at least 1.
        limit: largest number of tiles, at least 1.

    Returns:
        (B, N, C, h, w), N from 1 to ``limit``, in rows from the top left. Differentiable.

    Raises:
        ImageError: as for :func:`native_views`.
        ConfigError: as for :func:`native_views`.

    Example:
        >>> from torch import rand
        >>> even_views(rand(1, 3, 300, 481), largest=256, limit=16).shape
        torch.Size([1, 4, 3, 150, 240])
    """
    height, width = image.shape[-2:]
    if largest < 1 or image.ndim != 4 or 0 in (height, width):
        return native_views(image, largest, limit)  # which says what is wrong
    rows, columns = -(-height // largest), -(-width // largest)
    if rows * columns > limit:
        return native_views(image, largest, limit)
    tile_height, tile_width = height // rows, width // columns
    cut = image[..., : rows * tile_height, : columns * tile_width]
    tiles = cut.reshape(*image.shape[:2], rows, tile_height, columns, tile_width)
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


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
