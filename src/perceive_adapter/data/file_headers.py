"""What the header of an image file tells, without a look at its pixels."""

from __future__ import annotations

import os
import re
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

from perceive_adapter.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image as PILImage

__all__ = [
    "UNREADABLE",
    "TooLargeError",
    "image_size",
    "is_cut_to_8_bits",
    "orientation",
    "too_large",
]

_ORIENTATION: Final = 0x0112  # EXIF's tag
_QUARTER_TURNS: Final = (5, 6, 7, 8)
_TIFF_SIZE: Final = (0x0100, 0x0101)  # width and height as they are stored
UNREADABLE: Final = (
    OSError,
    ValueError,
    SyntaxError,
    RuntimeError,  # of AVIF, DDS and QOI files that are damaged, like the next
    IndexError,
)
"""What PIL raises of a file that it cannot read."""

_MODES: Final = ("L", "LA", "P", "RGB", "RGBA")
_DEEP: Final = re.compile(";16[BLN]")  # in a raw mode of PIL; BMP's BGR;16 is another thing
_TELLING: Final = (b"IHDR", b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # chunks of a PNG that hold EXIF


class TooLargeError(ImageError):
    """A file has more pixels than PIL opens."""


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image that can be used, turned upright, without decoding it.

    Raises:
        ImageError: it is no image, or has another mode than 8 bits of gray or RGB.
    """
    from PIL import Image
    from PIL.TiffImagePlugin import TiffImageFile

    try:
        with Image.open(path) as image:
            mode, (width, height) = image.mode, image.size
            mode = f"{mode} of 16 bits" if is_cut_to_8_bits(image) else mode
            turned = orientation(image) in _QUARTER_TURNS
            if isinstance(image, TiffImageFile):  # PIL may have turned the size already
                width, height = (image.tag_v2[tag] for tag in _TIFF_SIZE)
        if image.format == "PNG":
            with Image.open(_without_pixels(path)) as described:
                turned = orientation(described) in _QUARTER_TURNS
    except Image.DecompressionBombError as error:
        raise too_large(repr(str(path)), error) from error
    except UNREADABLE as error:
        raise ImageError(f"{str(path)!r} cannot be read as an image ({error})") from error
    if mode not in _MODES:
        raise ImageError(f"{str(path)!r} has mode {mode}, expected 8 bits of gray or RGB")
    return (width, height) if turned else (height, width)


def too_large(name: str, error: Exception) -> TooLargeError:
    """Make an error of what PIL says of a file, with its pixels and their limit."""
    said = str(error).rstrip(".")
    return TooLargeError(
        f"{name} has more pixels than PIL opens ({said}). If it is to be trusted, raise "
        "PIL.Image.MAX_IMAGE_PIXELS in Python, or read it otherwise and give an array"
    )


def is_cut_to_8_bits(image: PILImage.Image) -> bool:
    """Tell whether an image that is not decoded yet has 16 bits a channel, of which PIL keeps 8."""
    tiles = getattr(image, "tile", ())
    return image.mode in _MODES and any(_DEEP.search(str(tile[3])) for tile in tiles)


def orientation(image: PILImage.Image) -> int:
    """EXIF's orientation of an image: 1, upright, where it has none or none that can be read."""
    from PIL import Image

    try:
        found: int = Image.Image.getexif(image).get(_ORIENTATION, 1)  # a PNG's own decodes all
    except Exception:  # whatever Pillow stumbles over: the pixels are none the worse for it
        return 1
    return found


def _without_pixels(path: Path) -> BytesIO:
    """Copy a PNG's description: some writers put it behind the pixels, where PIL finds it late."""
    head = BytesIO()
    with path.open("rb") as stream:
        head.write(stream.read(8))
        while len(start := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", start)
            if kind not in _TELLING:
                stream.seek(length + 4, os.SEEK_CUR)
                continue
            data = stream.read(length)
            if len(stream.read(4)) < 4:  # cut short
                break
            head.write(_chunk(kind, data))
    head.write(_chunk(b"IDAT", b""))
    head.seek(0)
    return head


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
