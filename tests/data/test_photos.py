"""Photographs in files: which are found, and what is read of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perceive_adapter.data.photos import find_images, load_photos
from perceive_adapter.errors import ConfigError, ImageError


def test_finds_images_at_any_depth_in_order(tmp_path: Path) -> None:
    names = ["b.PNG", "a/c.jpeg", "a/b/d.tif", "notes.txt", "a.png.part"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == ["a/b/d.tif", "a/c.jpeg", "b.PNG"]


def test_follows_links_to_folders_and_ends_where_they_go_in_circles(tmp_path: Path) -> None:
    for name in ("elsewhere/a.png", "root/b.png", "root/deep/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    root = tmp_path / "root"
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(tmp_path / "elsewhere")
    (root / "deep" / "circle").symlink_to(root)
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "elsewhere")
    (root / "folder.png").mkdir()
    found = [path.relative_to(root).as_posix() for path in find_images(root)]
    assert found == ["again/a.png", "b.png", "deep/c.png"]


def test_says_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"holds no image: expected .*\.jpg, .*\.tiff"):
        find_images(tmp_path)
    for absent in ("absent", "notes.txt"):
        with pytest.raises(ConfigError, match=f"{absent}' is no folder"):
            find_images(tmp_path / absent)


def test_loads_rgb_whatever_the_file_has(tmp_path: Path) -> None:
    pixels = np.arange(5 * 7 * 4, dtype=np.uint8).reshape(5, 7, 4)
    kinds = {"L": pixels[..., 0], "RGB": pixels[..., :3], "RGBA": pixels}
    for mode, array in kinds.items():
        Image.fromarray(array.copy()).save(tmp_path / f"{mode}.png")
    gray, rgb, rgba = load_photos(find_images(tmp_path))
    assert gray.shape == rgb.shape == (3, 5, 7)
    assert gray.dtype == torch.uint8
    assert torch.equal(rgb, torch.from_numpy(pixels[..., :3].copy()).permute(2, 0, 1))
    assert torch.equal(rgba, rgb)
    assert torch.equal(gray, rgb[:1].expand(3, -1, -1))


def test_shrinks_what_is_larger(tmp_path: Path) -> None:
    for side in (40, 90):
        ramp = np.linspace(0, 255, side).astype(np.uint8)
        Image.fromarray(np.tile(ramp, (side // 2, 1))).save(tmp_path / f"{side}.png")
    small, large = load_photos(find_images(tmp_path), largest=60)
    assert small.shape == (3, 20, 40)
    assert large.shape == (3, 30, 60)
    assert large[0, 15].sort().values.equal(large[0, 15])


def test_says_which_link_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match=r"dangling\.png' is a link to a file that is not"):
        load_photos(find_images(tmp_path))


def test_says_which_file_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG torn")
    with pytest.raises(ImageError, match=r"torn\.png"):
        load_photos(find_images(tmp_path))
