"""One way through folders, for all that searches them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["unlisted", "walk"]


def walk(
    root: Path, *, deep: bool = True, onerror: Callable[[OSError], None] | None = None
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield ``root`` and every folder below it, with the names of its folders and of its files.

    Where ``deep`` is False, that is ``root`` alone.

    Links to folders are followed. No folder is entered twice, so that links in a circle come to an
    end; its name is given wherever it is. Names are sorted. Hidden files and folders, whose names
    begin with a dot, and those that macOS adds to archives are passed over. So is a folder that
    cannot be listed, which is told to ``onerror``: whoever searches tells of it, as
    :func:`unlisted` does.
    """
    entered: set[tuple[int, int]] = set()
    tell = onerror or (lambda error: None)
    for parent, folders, files in os.walk(root, followlinks=True, onerror=tell):
        if not entered:
            _is_new(parent, entered, tell)
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        yield Path(parent), list(folders), sorted(name for name in files if not _is_hidden(name))
        entering = folders if deep else []
        folders[:] = [
            name for name in entering if _is_new(os.path.join(parent, name), entered, tell)
        ]


def unlisted(root: Path, *, deep: bool = True) -> list[str]:
    """Say which folders below ``root`` cannot be listed, so that what they hold is not found."""
    errors: list[OSError] = []
    for _ in walk(root, deep=deep, onerror=errors.append):
        pass
    return [
        f"the folder {str(error.filename)!r} cannot be listed ({error.strerror})"
        for error in errors
        if not isinstance(error, (FileNotFoundError, NotADirectoryError))  # gone, or a file
    ]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_new(folder: str, entered: set[tuple[int, int]], tell: Callable[[OSError], None]) -> bool:
    """Tell whether a folder has not been entered under any of its names, and remember it."""
    try:
        status = os.stat(folder)
    except OSError as error:
        tell(error)
        return False
    key = (status.st_dev, status.st_ino)
    if key in entered:
        return False
    entered.add(key)
    return True
