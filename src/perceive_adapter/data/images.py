"""Images of any common kind to batches of planes in [0, 1], and back to the same kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
import torch
from torch import Tensor

from perceive_adapter.data.file_headers import UNREADABLE, is_cut_to_8_bits, orientation, too_large
from perceive_adapter.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image as PILImage

__all__ = ["Image", "Planes", "open_image", "read_image"]

_EXIF = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # where PIL may keep it
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Image: TypeAlias = Union[str, "os.PathLike[str]", "PILImage.Image", "np.ndarray[Any, Any]", Tensor]


@dataclass(frozen=True)
class Planes:
    """An image as planes, and the way back to its kind.

    Args:
        color: (B, 1 or 3, H, W), uint8 in [0, 255] or floating-point in [0, 1].
        alpha: (B, 1, H, W) of the same dtype, or None.
        pack: from (B, 1, 2, 3 or 4, H, W) of that dtype to the kind that was given.
    """

    color: Tensor
    alpha: Tensor | None
    pack: Callable[[Tensor], Any]


def read_image(image: Image) -> Planes:
    """Read a path, a PIL image, an array or a tensor.

    Args:
        image: a path or a PIL image, which are turned upright as far as their EXIF, if any, can be
            read; an array (H, W) or (H, W, C); a
            tensor (H, W), (C, H, W) or (B, C, H, W). C is 1 or 3, and 2 or 4 with alpha. uint8, or
            floating-point in [0, 1].

    Raises:
        ImageError: another kind, shape or dtype, a file of 16 bits a channel, no pixels, NaN or
            infinite values, or a file that cannot be read.
    """
    if isinstance(image, (str, os.PathLike)):
        return _from_pil(open_image(Path(image), os.fspath(image)))
    if isinstance(image, Tensor):
        return _from_tensor(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if hasattr(image, "getbands"):
        with _decoding("the PIL image"):  # which PIL may have opened and not decoded yet
            _check_depth(image, "the PIL image")
            upright = _upright(image)
        return _from_pil(upright)
    raise ImageError(
        f"an image is a {type(image).__name__}; expected a path, a PIL image, an array or a tensor"
    )


def open_image(file: Path | IO[bytes], name: str) -> PILImage.Image:
    """Decode an image file and turn it upright, as far as its EXIF, if any, can be read.

    Args:
        file: its path, or its bytes.
        name: what errors call it.

    Raises:
        ImageError: there is no such file, it is no image, or has 16 bits a channel or more pixels
            than PIL opens.
    """
    from PIL import Image as PILImage

    with _decoding(repr(name)), PILImage.open(file) as image:
        _check_depth(image, repr(name))
        return _upright(image)


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Raise an ImageError of whatever PIL raises of a file."""
    from PIL import Image as PILImage

    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError as error:
        if error.filename is not None and os.path.islink(error.filename):
            raise ImageError(f"{name} is a link to a file that is not there") from None
        raise ImageError(f"there is no image file {name}; check the path") from None
    except PILImage.DecompressionBombError as error:
        raise too_large(name, error) from error
    except UNREADABLE as error:
        raise ImageError(f"{name} cannot be read as an image: {error}") from error


def _check_depth(image: PILImage.Image, name: str) -> None:
    if is_cut_to_8_bits(image):
        raise ImageError(
            f"{name} has 16 bits a channel, of which PIL would drop the lower 8; expected 8 bits: "
            "scale it to 8 bits, or read it to an array of floats in [0, 1] yourself"
        )


def _upright(image: PILImage.Image) -> PILImage.Image:
    """Turn an image as its EXIF says; ``ImageOps.exif_transpose`` fails where that is damaged."""
    from PIL.Image import Transpose

    image.load()
    turn = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(orientation(image))
    if turn is None:
        return image.copy()
    turned = image.transpose(turn)
    for name in _EXIF:  # or it would be turned again
        turned.info.pop(name, None)
    return turned


def _from_pil(image: PILImage.Image) -> Planes:
    from PIL import Image as PILImage

    if image.has_transparency_data and image.mode in ("L", "P", "RGB"):
        image = image.convert("LA" if image.mode == "L" else "RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        deep = image.mode.startswith(("I", "F"))
        remedy = "scale it to 8 bits (convert() would clip it)" if deep else "convert() it"
        raise ImageError(
            f"the PIL image has mode {image.mode!r}; expected L, LA, RGB or RGBA: {remedy}"
        )
    planes = _from_array(np.array(image))
    profile = image.info.get("icc_profile")

    def pack(out: Tensor) -> PILImage.Image:
        packed = PILImage.fromarray(planes.pack(out))
        if profile is not None and packed.mode == image.mode:
            packed.info["icc_profile"] = profile  # the colours are still of that space
        return packed

    return Planes(planes.color, planes.alpha, pack)


def _from_array(image: np.ndarray[Any, Any]) -> Planes:
    if image.ndim not in (2, 3):
        raise ImageError(f"an array has shape {image.shape}; expected (H, W) or (H, W, C)")
    if image.dtype not in (np.uint8, np.float16, np.float32, np.float64):
        raise ImageError(
            f"an array has dtype {image.dtype}; expected uint8 in [0, 255] or floats in [0, 1]"
        )
    tensor = torch.from_numpy(np.require(image, requirements=["C", "W"]))
    planes = _from_tensor(tensor if image.ndim == 2 else tensor.permute(2, 0, 1).contiguous())

    def pack(out: Tensor) -> np.ndarray[Any, Any]:
        array: np.ndarray[Any, Any] = planes.pack(out).cpu().numpy()
        return array if array.ndim == 2 else np.ascontiguousarray(array.transpose(1, 2, 0))

    return Planes(planes.color, planes.alpha, pack)


def _from_tensor(image: Tensor) -> Planes:
    if image.ndim not in (2, 3, 4):
        raise ImageError(
            f"a tensor has shape {tuple(image.shape)}; expected (H, W), (C, H, W) or (B, C, H, W)"
        )
    missing = 4 - image.ndim
    batch = image[(None,) * missing]
    if batch.shape[1] not in (1, 2, 3, 4) or 0 in batch.shape:
        raise ImageError(
            f"an image has shape {tuple(image.shape)}, read as {batch.shape[0]} images of "
            f"{batch.shape[1]} channels; expected 1 (gray), 2 (with alpha), 3 (RGB) or 4 (with "
            "alpha) channels and at least one pixel; tensors have channels first, arrays last"
        )
    _check_values(batch)
    split = batch.shape[1] - 1 if batch.shape[1] in (2, 4) else batch.shape[1]
    alpha = batch[:, split:] if split < batch.shape[1] else None

    def pack(out: Tensor) -> Tensor:
        # What had neither batch nor channels gets them taken off again, unless it came to colours.
        dropped = missing if out.shape[1] == 1 else min(missing, 1)
        return out[(0,) * dropped]

    return Planes(batch[:, :split], alpha, pack)


def _check_values(image: Tensor) -> None:
    if image.dtype == torch.uint8:
        return
    if image.dtype not in FLOATS:
        raise ImageError(
            f"an image has dtype {image.dtype}; expected uint8 in [0, 255] or floats in [0, 1]"
        )
    low, high = (float(value) for value in torch.aminmax(image))
    if not (low > float("-inf") and high < float("inf")):  # NaN fails every comparison
        raise ImageError("an image has NaN or infinite values; expected floats in [0, 1]")
    if low < -1.0 or high > 2.0:
        raise ImageError(
            f"a floating-point image has values from {low:g} to {high:g}; expected [0, 1]; "
            "divide by 255, or give uint8"
        )
