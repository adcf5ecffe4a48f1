"""One way through folders, for all that searches them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["walk"]


def walk(root: Path, *, deep: bool = True) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield ``root`` and every folder below it, with the names of its folders and of its files.

    Where ``deep`` is False, that is ``root`` alone.

    Links to folders are followed. No folder is entered twice, so that links in a circle come to an
    end; its name is given wherever it is. Names are sorted.
    """
    entered: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        if not entered:
            _is_new(parent, entered)
        folders.sort()
        yield Path(parent), list(folders), sorted(files)
        entering = folders if deep else []
        folders[:] = [name for name in entering if _is_new(os.path.join(parent, name), entered)]


def _is_new(folder: str, entered: set[tuple[int, int]]) -> bool:
    """Tell whether a folder has not been entered under any of its names, and remember it."""
    try:
        status = os.stat(folder)
    except OSError:  # gone since it was listed
        return False
    key = (status.st_dev, status.st_ino)
    if key in entered:
        return False
    entered.add(key)
    return True
