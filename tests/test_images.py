"""Images of any kind to planes, and back to the same kind."""

import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, features

from perceive_adapter.data.file_headers import image_size
from perceive_adapter.data.images import open_image, read_image
from perceive_adapter.errors import ImageError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)


def round_trip(image: Any) -> Any:
    planes = read_image(image)
    parts = [planes.color] if planes.alpha is None else [planes.color, planes.alpha]
    return planes.pack(torch.cat(parts, dim=1))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_pil_images_survive(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    back = round_trip(image)
    assert (back.mode, back.tobytes()) == (mode, image.tobytes())
    planes = read_image(image)
    assert planes.color.shape == (1, 1 if mode[0] == "L" else 3, 5, 7)
    assert (planes.alpha is not None) == mode.endswith("A")


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 2), (5, 7, 3), (5, 7, 4)])
def test_arrays_survive(shape: tuple[int, ...], dtype: Any) -> None:
    image = PIXELS.reshape(-1)[: int(np.prod(shape))].reshape(shape)
    image = image if dtype is np.uint8 else (image / 255).astype(dtype)
    back = round_trip(image)
    assert back.dtype == image.dtype
    assert np.array_equal(back, image)


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (4, 5, 7), (2, 1, 5, 7), (2, 2, 5, 7)])
def test_tensors_survive(shape: tuple[int, ...]) -> None:
    image = torch.rand(shape)
    assert torch.equal(round_trip(image), image)


def test_views_and_read_only_arrays_are_read_without_a_warning() -> None:
    flipped = PIXELS[::-1, ::-1]
    locked = PIXELS.copy()
    locked.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(round_trip(flipped), flipped)
        assert np.array_equal(round_trip(locked), locked)


def test_photographs_are_turned_as_their_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS[..., :3]).save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").color.shape == (1, 3, 7, 5)


BAD: dict[str, tuple[Any, str]] = {
    "none": (None, "NoneType"),
    "list": ([[0, 1]], "list"),
    "one dimension": (torch.rand(4), r"\(4,\)"),
    "five dimensions": (torch.rand(1, 1, 3, 4, 4), "expected"),
    "five channels": (torch.rand(5, 4, 4), "5 channels"),
    "channels last": (torch.rand(6, 5, 3), "channels first"),
    "array of many channels": (np.zeros((4, 4, 6)), "6 channels"),
    "no pixels": (torch.rand(3, 0, 4), "at least one pixel"),
    "no images": (torch.rand(0, 3, 4, 4), "0 images"),
    "nan": (torch.tensor([[0.0, torch.nan]]), "NaN"),
    "infinite": (torch.tensor([[0.0, torch.inf]]), "infinite"),
    "minus infinite": (np.array([[0.0, -np.inf]]), "infinite"),
    "[0, 255] floats": (torch.tensor([[0.0, 255.0]]), "divide by 255"),
    "int64": (torch.ones(3, 4, 4, dtype=torch.int64), "int64"),
    "bool": (torch.ones(3, 4, 4, dtype=torch.bool), "bool"),
    "complex": (torch.ones(3, 4, 4, dtype=torch.complex64), "complex64"),
    "float8": (torch.ones(3, 4, 4).to(torch.float8_e4m3fn), "float8"),
    "int array": (np.ones((4, 4), dtype=np.int32), "int32"),
    "object array": (np.array([[None]]), "object"),
    "swapped bytes": (np.ones((4, 4), dtype=">f4"), "dtype"),
    "bilevel": (Image.new("1", (4, 4)), "'1'"),
    "ink": (Image.new("CMYK", (4, 4)), "'CMYK'"),
    "16 bit": (Image.new("I;16", (4, 4)), "'I;16'"),
    "missing file": ("no/such.png", "no image file"),
    "not an image": (__file__, "cannot be read as an image"),
    "a folder": (Path(__file__).parent, "cannot be read as an image"),
    "no path": ("a\0b", "cannot be read as an image"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_image_is_refused(case: str) -> None:
    image, said = BAD[case]
    with pytest.raises(ImageError, match=said):
        read_image(image)


def test_damaged_and_enormous_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "image.png"
    Image.fromarray(PIXELS).resize((200, 200)).save(file)
    half = tmp_path / "half.png"
    half.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ImageError, match="cannot be read"):
        read_image(half)
    with (
        Image.open(half) as opened,
        pytest.raises(ImageError, match=r"the PIL image cannot be read as an image: .*truncated"),
    ):
        read_image(opened)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match=r"exceeds limit of 200 .* raise PIL.Image.MAX_IMAGE"):
            read(file)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot write AVIF")
def test_a_damaged_avif_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "image.jpg"  # Pillow goes by the contents
    Image.fromarray(PIXELS).save(file, "AVIF")
    whole = file.read_bytes()
    for at in range(0, len(whole), 7):  # some of these make the decoder raise a RuntimeError
        file.write_bytes(whole[:at] + bytes(32) + whole[at + 32 :])
        with suppress(ImageError):
            read_image(file)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_sizes_and_opened_files_are_turned_as_decoding_does(
    orientation: int, suffix: str, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"photo.{suffix}"
    Image.fromarray(PIXELS[..., :3]).save(file, exif=exif)
    decoded = read_image(file).color
    assert decoded.shape[2:] == ((7, 5) if 5 <= orientation <= 8 else (5, 7))
    assert image_size(file) == tuple(decoded.shape[2:])
    with Image.open(file) as opened:
        assert torch.equal(read_image(opened).color, decoded)
    assert torch.equal(read_image(open_image(file, "once")).color, decoded)


TURNED = Image.Exif()
TURNED[0x0112] = 6
DAMAGED = {
    "no header": b"Exif\0\0nothing",
    "cut in the header": b"Exif\0\0MM\0*",
    "cut in the tags": TURNED.tobytes()[:-9],
    "tags elsewhere": b"Exif\0\0MM\0*\xff\xff\xff\xff",
    "no count": b"Exif\0\0MM\0*\0\0\0\x08",
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File Read")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_photographs_whose_exif_is_damaged_are_upright(
    damage: str, suffix: str, tmp_path: Path
) -> None:
    file = tmp_path / f"photo.{suffix}"
    Image.fromarray(PIXELS[..., :3]).save(file, exif=DAMAGED[damage])
    assert image_size(file) == (5, 7)
    assert read_image(file).color.shape[2:] == (5, 7)
    with Image.open(file) as opened:
        assert read_image(opened).color.shape[2:] == (5, 7)
        assert read_image(opened).color.shape[2:] == (5, 7)


def test_photographs_are_turned_whatever_else_their_exif_holds(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    data = exif.tobytes().replace(b"\x01\x1a\0\5", b"\x01\x1a\0\2")  # no fraction, but text
    Image.fromarray(PIXELS[..., :3]).save(tmp_path / "photo.png", exif=data)
    assert image_size(tmp_path / "photo.png") == (7, 5)
    assert read_image(tmp_path / "photo.png").color.shape[2:] == (7, 5)


def test_of_two_exifs_of_a_png_the_later_one_counts(tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    Image.fromarray(PIXELS[..., :3]).save(file, exif=TURNED)
    late = b"eXIf" + DAMAGED["no header"]
    late = struct.pack(">I", len(late) - 4) + late + struct.pack(">I", zlib.crc32(late))
    file.write_bytes(file.read_bytes()[:-12] + late + file.read_bytes()[-12:])
    assert image_size(file) == tuple(read_image(file).color.shape[2:]) == (5, 7)


@pytest.mark.parametrize(("mode", "color"), [("L", 3), ("RGB", (1, 2, 3)), ("P", 3)])
def test_a_transparent_colour_is_alpha(mode: str, color: Any, tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS[..., :3]).convert(mode)
    image.save(tmp_path / "image.png", transparency=color)
    planes = read_image(tmp_path / "image.png")
    assert planes.alpha is not None
    assert planes.color.shape[1] == (1 if mode == "L" else 3)


def test_a_palette_may_have_alpha_itself(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (200, 10, 10, 0))
    image.paste((10, 200, 10, 255), (0, 0, 4, 8))
    image = image.quantize(4)
    image.save(tmp_path / "image.png")
    for given in (image, tmp_path / "image.png"):
        alpha = read_image(given).alpha
        assert alpha is not None
        assert alpha.unique().tolist() == [0, 255]


def test_a_damaged_file_of_a_rare_format_is_no_image(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(file, "DDS")
    data = bytearray(file.read_bytes())
    data[80:84] = struct.pack("<I", 128)  # flags of its pixel format
    file.write_bytes(data)
    for read in (image_size, read_image):
        with pytest.raises(ImageError, match="cannot be read as an image"):
            read(file)


def write_deep_png(file: Path, channels: int) -> None:
    """16 bits a channel, which PIL cannot write."""
    kinds = {2: 4, 3: 2, 4: 6}
    rows = b"".join(b"\0" + row.tobytes() for row in PIXELS[..., :channels].astype(">u2"))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, kinds[channels], 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_files_of_16_bits_a_channel_are_refused(channels: int, tmp_path: Path) -> None:
    file = tmp_path / "deep.png"
    write_deep_png(file, channels)
    with pytest.raises(ImageError, match=r"deep\.png' has 16 bits a channel.*: scale it to 8 bits"):
        read_image(file)
    with Image.open(file) as opened:
        with pytest.raises(ImageError, match=r"the PIL image has 16 bits a channel.*floats in"):
            read_image(opened)
        opened.load()  # from here on nobody can tell
        assert read_image(opened).color.shape == (1, 3, 5, 7)
    with pytest.raises(ImageError, match=r"has mode RGBA? of 16 bits, expected 8 bits"):
        image_size(file)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiff_files_of_16_bits_a_channel_are_refused(
    compression: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "deep.tif"
    tifffile.imwrite(file, PIXELS[..., :3].astype(np.uint16), compression=compression)
    with pytest.raises(ImageError, match=r"deep\.tif' has 16 bits a channel"):
        read_image(file)
    with pytest.raises(ImageError, match="has mode RGB of 16 bits"):
        image_size(file)


def test_bmp_files_of_16_bits_a_pixel_are_read(tmp_path: Path) -> None:
    file = tmp_path / "image.bmp"
    head = struct.pack("<2sIHHI", b"BM", 98, 0, 0, 66)
    about = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 16, 3, 32, 0, 0, 0, 0)
    file.write_bytes(head + about + struct.pack("<III", 0xF800, 0x7E0, 0x1F) + b"\xff" * 32)
    assert read_image(file).color.eq(255).all()
    assert image_size(file) == (4, 4)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_images_are_not_to_be_converted(dtype: Any) -> None:
    with pytest.raises(ImageError, match=r"scale it to 8 bits \(convert\(\) would clip it\)"):
        read_image(Image.fromarray(PIXELS[..., 0].astype(dtype)))
