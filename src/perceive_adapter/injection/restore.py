"""Restoring images of any kind and size: pad, tile, share one perception, blend, crop."""

from __future__ import annotations

import inspect
import math
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceive_adapter.data.images import Image, read_image
from perceive_adapter.errors import BackboneError, ConfigError, ImageError
from perceive_adapter.injection.perception import Perception, check_perception
from perceive_adapter.injection.probe import find_image, image_alone, weight_like_images
from perceive_adapter.injection.tiling import Grid, weights
from perceive_adapter.modes import keeping_modes

if TYPE_CHECKING:
    from perceive_adapter.injection.model import PerceiveModel

__all__ = ["find_multiple", "is_out_of_memory", "restore_image"]

MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 7, 14, 28, 56, 12, 24, 48)
PROGRESS_AFTER_SECONDS = 2


def restore_image(
    model: PerceiveModel,
    image: Image,
    perception: Perception | None,
    *,
    tile: int | None,
    overlap: int,
    batch_size: int,
) -> Any:
    """See :meth:`PerceiveModel.restore`."""
    _check_tiles(tile, overlap, batch_size)
    planes = read_image(image)
    color, channels = planes.color, model.sites.image_channels
    if channels not in (1, 3):
        raise ImageError(
            f"the backbone takes {channels} channels and restore() gray or RGB images; call the "
            "model itself with a tensor in the backbone's own range"
        )
    gray = color.shape[1] == 1
    inputs = color.expand(-1, 3, -1, -1) if channels == 3 else color.flatten(0, 1)[:, None]
    perceptions = _of_each(perception, len(color))
    results: list[Tensor] = []
    with model.adapters.lock, keeping_modes(model), torch.no_grad():
        model.eval()
        grid = _grid(model, inputs, tile, overlap)
        # A gray network restores the channels of a color image one by one.
        for parts, seen in zip(inputs.chunk(len(color)), perceptions, strict=True):
            with _steered(model, parts, seen):
                for part in parts.chunk(len(parts)):
                    results.append(_restore_one(model, part, grid, batch_size))
    restored = torch.cat(results)
    if not restored.isfinite().all():
        raise BackboneError(
            f"the network gave NaN or infinite values for an image without any. Its weights are "
            f"{weight_like_images(model.backbone).dtype}: float16 may be too small for its "
            "features, and an adapter may have diverged; try float32, and model.disabled()"
        )
    if channels == 1 and not gray:
        if restored.shape[1] != 1:
            raise ImageError(
                "the image has colours, and the backbone turns gray images into "
                f"{restored.shape[1]} channels; give a gray one"
            )
        restored = restored.view(color.shape[0], -1, *restored.shape[-2:])
    elif channels == 3 and gray:
        restored = restored.mean(dim=1, keepdim=True)
    result = _as_type(restored, color.dtype)
    if planes.alpha is not None:
        result = torch.cat([result, _resized(planes.alpha, result)], dim=1)
    return planes.pack(result)


def _check_tiles(tile: int | None, overlap: int, batch_size: int) -> None:
    integers = all(type(n) is int for n in (overlap, batch_size, 0 if tile is None else tile))
    if not integers or overlap < 0 or batch_size < 1 or (tile is not None and tile <= 2 * overlap):
        raise ConfigError(
            f"tile={tile}, overlap={overlap}, batch_size={batch_size}; expected integers, "
            "a tile larger than twice the overlap, overlap >= 0 and batch_size >= 1"
        )


def _of_each(perception: Perception | None, count: int) -> list[Perception | None]:
    """Return the perception of each of ``count`` images, None where it was not given."""
    if perception is None:
        return [None] * count
    check_perception(perception, count)
    return [perception[index % perception.batch] for index in range(count)]


def _grid(model: PerceiveModel, image: Tensor, tile: int | None, overlap: int) -> Grid:
    """Return how images of this size are cut; to find out runs the bare backbone."""
    height, width = _padded_size(model, image)
    plan = model.sites
    align = math.lcm(model.size_multiple, plan.stride, plan.scale_parts) if tile else 1
    height, width = (_round_up(side, align) for side in (height, width))
    wanted = _tile_side(model, tile, overlap, align) if tile else max(height, width)
    return Grid((height, width), (min(wanted, height), min(wanted, width)), overlap, align)


def _restore_one(model: PerceiveModel, image: Tensor, grid: Grid, batch_size: int) -> Tensor:
    """Restore (1, C, H, W) of any dtype to float (1, C, sH, sW)."""
    restored = _run_tiles(model, image, grid, batch_size)
    height, width = (round(side * model.sites.scale) for side in image.shape[-2:])
    return restored[..., :height, :width]


def _steered(
    model: PerceiveModel, image: Tensor, perception: Perception | None
) -> AbstractContextManager[None]:
    """Have all that an image is cut into share one perception; the bare backbone needs none.

    Args:
        model: wrapped.
        image: (1, C, H, W), or (3, 1, H, W), the channels of one image for a gray network.
        perception: of the image; None perceives it.
    """
    if not model.injector.enabled:
        return nullcontext()
    if perception is None:
        given = _network_input(model, image)
        perception = model.perceive(given if len(given) == 1 else given.mean(0, keepdim=True))
    return model.fold(perception)


def _tile_side(model: PerceiveModel, tile: int, overlap: int, align: int) -> int:
    """Return the side that the backbone takes; two steps of its grid, where it takes these.

    A tile of one step has no neighbour on the same grid that it overlaps.
    """
    side, larger = _round_up(tile, align), _round_up(overlap + align, align)
    return larger if side < larger and _runs(model, (larger, larger)) else side


def _round_up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def _run_tiles(model: PerceiveModel, image: Tensor, grid: Grid, batch_size: int) -> Tensor:
    from tqdm.auto import tqdm

    scale = model.sites.scale
    height, width = (round(side * scale) for side in grid.size)
    total: Tensor | None = None
    progress = tqdm(
        total=len(grid), desc="restore", unit="tile", delay=PROGRESS_AFTER_SECONDS, disable=None
    )
    with progress:
        remaining = iter(grid)
        while corners := list(islice(remaining, batch_size)):
            tiles = torch.cat([_cut(image, corner, grid.tile) for corner in corners])
            outputs = _call(model, _network_input(model, tiles))
            if total is None:
                dtype = torch.promote_types(outputs.dtype, torch.float32)
                size = (1, outputs.shape[1], height, width)
                total = torch.zeros(size, device=image.device, dtype=dtype)
            for (top, left), output in zip(corners, outputs, strict=True):
                rows = weights(grid, top, 0, scale).to(total.device)
                columns = weights(grid, left, 1, scale).to(total.device)
                y, x = round(top * scale), round(left * scale)
                target = total[0, :, y : y + len(rows), x : x + len(columns)]
                target += output.to(total) * rows[:, None] * columns
            progress.update(len(corners))
    assert total is not None
    total /= _weight_sum(grid, 0, scale, height).to(total)[:, None]
    total /= _weight_sum(grid, 1, scale, width).to(total)
    return total


def _weight_sum(grid: Grid, axis: int, scale: float, length: int) -> Tensor:
    result = torch.zeros(length, device="cpu")
    for start in grid.starts(axis):
        part = weights(grid, start, axis, scale)
        first = round(start * scale)
        result[first : first + len(part)] += part
    return result


def _call(model: PerceiveModel, image: Tensor) -> Tensor:
    """Run the model and return the restored images in [0, 1], checked for their size."""
    args, kwargs = image_alone(model.image_arg, image)
    try:
        output = model(*args, **kwargs)
    except TypeError as error:
        if _takes(model.backbone, args, kwargs):  # it is the network's own
            raise
        raise BackboneError(
            f"restore() calls the backbone with the image alone, and it needs more: {error}; call "
            "the model itself, or wrap a module that fills in the other arguments"
        ) from error
    restored = find_image(output, image.shape[0])
    expected = tuple(round(side * model.sites.scale) for side in image.shape[-2:])
    if tuple(restored.shape[-2:]) != expected or restored.shape[1] not in (1, 3):
        raise BackboneError(
            f"the backbone turned {tuple(image.shape)} into {tuple(restored.shape)}; restore() "
            f"expects height and width {expected}, and 1 or 3 channels"
        )
    return model.value_range.to_unit(restored)


def _takes(backbone: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> bool:
    """Tell whether a network's signature takes these arguments and needs no others."""
    try:
        inspect.signature(backbone.forward).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _network_input(model: PerceiveModel, image: Tensor) -> Tensor:
    """Convert to the backbone's dtype, device and range."""
    like = weight_like_images(model.backbone)
    unit = image.to(like) / 255 if image.dtype == torch.uint8 else image.to(like)
    return model.value_range.from_unit(unit)


def _cut(image: Tensor, corner: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Cut a tile; beyond the right and lower border the image is mirrored."""
    rows, columns = (
        _mirrored(start, length, side)
        for start, length, side in zip(corner, size, image.shape[-2:], strict=True)
    )
    return image[..., rows.to(image.device)[:, None], columns.to(image.device)]


def _mirrored(start: int, length: int, side: int) -> Tensor:
    index = torch.arange(start, start + length, device="cpu")
    period = max(2 * (side - 1), 1)
    index = index % period
    return torch.minimum(index, period - index).clamp_max(side - 1)


def _padded_size(model: PerceiveModel, image: Tensor) -> tuple[int, int]:
    """Return the smallest size that the backbone takes and the image fits in."""
    multiple = model.size_multiple
    height, width = (_round_up(side, multiple) for side in image.shape[-2:])
    least = model.sites.probe_size
    fits = image.shape[-2] <= least[0] and image.shape[-1] <= least[1]
    small = height < least[0] or width < least[1]
    if (fits or small) and (height, width) != least and not _runs(model, (height, width)):
        if fits:
            return least
        height, width = (
            _round_up(max(side, small), multiple)
            for side, small in zip((height, width), least, strict=True)
        )
    return height, width


def find_multiple(model: PerceiveModel) -> int:
    """Find what the backbone needs height and width to be a multiple of, by trying."""
    least = max(model.sites.probe_size)
    for multiple in MULTIPLES:
        odd = 2 * math.ceil(least / (2 * multiple)) + 1
        if _runs(model, (odd * multiple, (odd + 2) * multiple)):
            return multiple
    return least


def _runs(model: PerceiveModel, size: tuple[int, int]) -> bool:
    shape = (1, model.sites.image_channels, *size)
    image = torch.full(shape, 128, dtype=torch.uint8, device="cpu")
    try:
        with keeping_modes(model), torch.no_grad(), model.disabled():
            model.eval()
            _call(model, _network_input(model, image))
    except Exception as error:  # whatever a network raises for a size that it was not made for
        if is_out_of_memory(error):
            raise
        return False
    return True


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory has run out; torch has a type for that on a GPU only.

    Example:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("sizes differ"))
        (True, False)
    """
    typed = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return typed or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def _as_type(image: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.uint8:
        return image.mul(255).round_().clamp_(0, 255).to(dtype)
    return image.to(dtype)


def _resized(alpha: Tensor, like: Tensor) -> Tensor:
    if alpha.shape[-2:] == like.shape[-2:]:
        return alpha
    unit = alpha.float() / 255 if alpha.dtype == torch.uint8 else alpha
    resized = F.interpolate(unit.float(), like.shape[-2:], mode="bicubic", antialias=True)
    return _as_type(resized.clamp(0, 1), alpha.dtype)
