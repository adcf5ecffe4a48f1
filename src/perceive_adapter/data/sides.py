"""Images that no set of pairs takes, and folders of them that look like a side of one."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from perceive_adapter.data.file_headers import image_size
from perceive_adapter.data.matching import DEGRADED_FOLDERS
from perceive_adapter.data.photos import images_below
from perceive_adapter.data.walking import walk
from perceive_adapter.errors import ImageError

__all__ = ["images_outside", "lone_sides"]

_SEVERAL: Final = 2  # names that two folders share at least, to look like sides
_ALIKE: Final = 0.8  # share of the larger one's names that are the other's too
_COMPARED: Final = 5  # images of each whose sizes are compared


def images_outside(root: Path, sides: Iterable[Path]) -> list[Path]:
    """Return the images below a folder that are in none of the folders of sets of pairs."""
    inside = {os.path.realpath(parent) for side in sides for parent, _, _ in walk(side)}
    images = images_below(root)
    outside = {
        folder
        for folder in {path.parent for path in images}
        if os.path.realpath(folder) not in inside
    }
    return [path for path in images if path.parent in outside]


def lone_sides(root: Path, images: Sequence[Path], sets: Collection[Path] = ()) -> list[str]:
    """Say which folders look like a side of pairs, though no set of pairs takes their images.

    Those are a folder that is named like one of degraded images, and two folders that are alone
    beside each other and hold several images of the same names and sizes. What is assumed of
    others, such as of three scenes whose frames have the same names, is that they are what they
    are given for; and so of ``root``, whatever its name.

    Args:
        root: the folder that was searched.
        images: those below it that no set takes.
        sets: folders of sets below it. What else these hold, masks or depths, say, may well have
            the names of their images.
    """
    below = _by_folder(root, images)
    apart = [folder for folder in below if not any(one.is_relative_to(folder) for one in sets)]
    lone = [folder for folder in apart if folder.name.casefold() in DEGRADED_FOLDERS]
    lone = [folder for folder in lone if set(lone).isdisjoint(folder.parents)]
    return [
        f"{str(folder)!r} has {len(below[folder])} images and the name of a folder of degraded "
        "ones, but none of clean ones is beside it"
        for folder in lone
    ] + [
        f"{str(first)!r} and {str(second)!r} hold images of the same names and sizes, as the two "
        "sides of pairs do, but have no such names"
        for first, second in _twos(folder for folder in apart if folder.parent not in sets)
        if first not in lone and second not in lone
        if _are_alike(_named(first, below[first]), _named(second, below[second]))
    ]


def _twos(folders: Iterable[Path]) -> Iterator[list[Path]]:
    """Yield the folders that are two of one parent."""
    beside: dict[Path, list[Path]] = {}
    for folder in folders:
        beside.setdefault(folder.parent, []).append(folder)
    return (two for two in beside.values() if len(two) == 2)


def _by_folder(root: Path, images: Iterable[Path]) -> dict[Path, list[Path]]:
    """Return the images below each folder, at any depth, but for ``root`` itself."""
    below: dict[Path, list[Path]] = {}
    for path in images:
        for folder in path.relative_to(root).parents:
            if folder.name:
                below.setdefault(root / folder, []).append(path)
    return below


def _named(folder: Path, images: Iterable[Path]) -> dict[Path, Path]:
    """Return the images of a folder by their paths in it, without the ending."""
    return {path.relative_to(folder).with_suffix(""): path for path in images}


def _are_alike(first: Mapping[Path, Path], second: Mapping[Path, Path]) -> bool:
    shared = sorted(first.keys() & second.keys())
    if len(shared) < max(_SEVERAL, _ALIKE * max(len(first), len(second))):
        return False
    sizes = [(_size(first[name]), _size(second[name])) for name in shared[:_COMPARED]]
    known = [both for both in sizes if None not in both]
    return bool(known) and all(one == other for one, other in known)


def _size(path: Path) -> tuple[int, int] | None:
    try:
        return image_size(path)
    except ImageError:  # it is named when it is read
        return None
