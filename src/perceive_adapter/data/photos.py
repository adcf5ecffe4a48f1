"""Photographs in files: finding them below a folder, and reading them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch.nn.functional as F
from torch import Tensor

from perceive_adapter.data.images import read_image
from perceive_adapter.data.walking import unlisted, walk
from perceive_adapter.errors import ConfigError, ImageError

__all__ = ["IMAGE_SUFFIXES", "find_images", "images_below", "load_photos", "resized"]

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def images_below(folder: Path, *, deep: bool = True) -> list[Path]:
    """Return the files below a folder that are named like images, in the order of their paths."""
    return sorted(
        parent / name
        for parent, _, names in walk(folder, deep=deep)
        for name in names
        if Path(name).suffix.lower() in IMAGE_SUFFIXES
    )


def find_images(folder: str | os.PathLike[str], *, deep: bool = True) -> list[Path]:
    """Return every image file below a folder, in the order of their paths.

    Args:
        folder: where to look.
        deep: also in folders below it, at any depth.

    Raises:
        ConfigError: there is no such folder, it holds no image, or a folder cannot be listed.
    """
    root = Path(folder)
    if unread := unlisted(root, deep=deep):
        raise ConfigError(
            f"{'; '.join(unread)}: expected folders that may be read. Change who may read "
            "them, or move them elsewhere."
        )
    found = [path for path in images_below(root, deep=deep) if not path.is_dir()]
    if not found:
        state = "holds no image" if root.is_dir() else "is no folder"
        raise ConfigError(
            f"{str(root)!r} {state}: expected a folder of clean photographs in files that end in "
            f"{', '.join(IMAGE_SUFFIXES)}, {'at any depth' if deep else 'directly in it'}."
        )
    return found


def load_photos(
    paths: Sequence[str | os.PathLike[str]], largest: int | None = None
) -> list[Tensor]:
    """Read image files as (3, H, W) uint8; gray ones are repeated, alpha is dropped.

    Args:
        paths: of the files.
        largest: longest side in pixels to which a larger photograph is shrunk; None for no limit.

    Raises:
        ImageError: a file cannot be read as an image.
    """
    photos = []
    for path in paths:
        try:
            photo = read_image(path).color[0].expand(3, -1, -1).contiguous()
        except ImageError as error:
            raise ImageError(
                f"the photograph {os.fspath(path)!r} cannot be used: {error}. Make it an 8-bit "
                "gray or RGB image, or leave it out."
            ) from error
        scale = (largest or max(photo.shape[1:])) / max(photo.shape[1:])
        photos.append(resized(photo, scale) if scale < 1 else photo)
    return photos


def resized(photo: Tensor, scale: float) -> Tensor:
    """Return a photograph (3, H, W), uint8, at another scale."""
    size = [max(1, round(side * scale)) for side in photo.shape[1:]]
    pixels = F.interpolate(photo[None].float(), size, mode="bicubic", antialias=True)
    return pixels[0].round().clamp(0, 255).byte()
