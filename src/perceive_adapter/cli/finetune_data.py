"""The data of ``finetune``: what all folders hold, to train on and set aside."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from perceive_adapter.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from torch import Tensor

    from perceive_adapter.data.matching import File
    from perceive_adapter.data.pairs import Pair
    from perceive_adapter.evaluation.cases import Case

__all__ = ["LARGEST", "TrainingFiles", "find_data"]

T = TypeVar("T")

LARGEST: Final = 1200
"""Pixels to which the longest side of a clean photograph is shrunk, to train on and to measure."""
_MEASURED = 40  # images of a task that are measured at the end


class TrainingFiles(NamedTuple):
    """What all folders hold: to train on, and set aside.

    Args:
        pairs: pairs of files to train on; their groups are the tasks.
        photos: clean photographs to degrade, (3, H, W) uint8.
        held_pairs: pairs that training never sees, nor their targets under any name.
        held_photos: files of photographs that training never sees under any name.
        digest: of the contents of all files, and of their names below the folders.
        skipped: what is wrong with each file that cannot be used.
    """

    pairs: tuple[Pair, ...]
    photos: tuple[Tensor, ...]
    held_pairs: tuple[Pair, ...]
    held_photos: tuple[Path, ...]
    digest: str
    skipped: tuple[str, ...]

    def held_cases(self, tasks: Sequence[str]) -> list[Case]:
        """Return what to measure on at the end, a few dozen images of each task at most."""
        from perceive_adapter.evaluation.cases import degraded_cases, pair_cases

        groups: dict[str, list[Pair]] = {}
        for pair in self.held_pairs:
            groups.setdefault(pair.group, []).append(pair)
        pairs = [pair for group in groups.values() for pair in _spread(group, _MEASURED)]
        photos = _spread(self.held_photos, _MEASURED // 2)  # each of them twice, mild and severe
        made = degraded_cases(photos, tasks, largest=LARGEST) if self.photos else ()
        return [*pair_cases(pairs), *made]


def find_data(folders: Sequence[Path], broken: str) -> TrainingFiles:
    """Search folders, each of which holds sets of pairs or else clean photographs.

    Raises:
        ConfigError: a folder holds neither, or what looks like pairs and is not named as such, or
            does not exist.
        ImageError: a file cannot be used, and is not to be skipped.
    """
    skip = broken == "skip"
    skipped: list[str] = []
    listing = _Listing()
    for folder in folders:
        listing.search(folder, skip, skipped)
    held = listing.set_aside()
    pairs, held_pairs = _divide(
        [(target, pair) for (_, target), pair in listing.pairs.items()], held
    )
    paths, held_paths = _divide(listing.photos.items(), held)
    photos = _read(paths, skip, skipped)
    if not pairs and not photos:
        raise ConfigError(
            f"--data leaves nothing to train on: {len(skipped)} files were skipped, such as: "
            f"{skipped[0]}."
            if skipped
            else "--data leaves nothing to train on. Add images."
        )
    return TrainingFiles(
        tuple(pairs),
        tuple(photos),
        tuple(pair for pair in held_pairs if _is_measurable(pair, skip, skipped)),
        tuple(path for path in held_paths if _is_measurable(path, skip, skipped)),
        listing.digest(),
        tuple(skipped),
    )


class _Listing:
    """The pairs and photographs of all folders, by the digests of their contents."""

    def __init__(self) -> None:
        self.pairs: dict[tuple[str, str], Pair] = {}
        self.photos: dict[str, Path] = {}
        self._sets: dict[str, dict[str, set[str]]] = {}  # targets by task, and set within it
        self._lines: list[tuple[str, ...]] = []
        self._digests: dict[File, str] = {}  # one target may be that of dozens of images

    def search(self, folder: Path, skip: bool, skipped: list[str]) -> None:
        """Add what a folder holds, but for copies of what is there already."""
        from perceive_adapter.data.pairs import find_pairs, find_photos, holds_pairs

        items: Sequence[Pair | Path]
        if holds_pairs(folder):
            found = find_pairs(folder, broken="skip" if skip else "raise")
            skipped += found.skipped
            items = found.pairs
        else:
            items = find_photos(folder)
        for item in items:
            try:
                if isinstance(item, Path):
                    self._add_photo(item, folder)
                else:
                    self._add_pair(item, folder)
            except ImageError as error:
                _leave_out(error, skip, skipped)

    def _add_pair(self, pair: Pair, folder: Path) -> None:
        from perceive_adapter.data.matching import name_below

        files = [pair.degraded, pair.target, *(file for file in pair.mediums if file is not None)]
        digests = [self._digest(file) for file in files]
        if (digests[0], digests[1]) in self.pairs:
            return
        task = pair.group.partition("/")[0] or folder.resolve().name
        # Folder or shard of the target: some sets have a folder for each scene, some within a side.
        scene = name_below(pair.target, folder).removesuffix(pair.target.name)
        self.pairs[digests[0], digests[1]] = replace(pair, group=task)
        self._sets.setdefault(task, {}).setdefault(scene, set()).add(digests[1])
        self._lines.append((task, *(name_below(file, folder) for file in files), *digests))

    def _add_photo(self, path: Path, folder: Path) -> None:
        from perceive_adapter.data.matching import name_below

        digest = self._digest(path)
        if digest not in self.photos:
            self.photos[digest] = path
            self._lines.append((name_below(path, folder), digest))

    def _digest(self, file: File) -> str:
        from perceive_adapter.data.contents import content_digest

        if file not in self._digests:
            self._digests[file] = content_digest(file)
        return self._digests[file]

    def set_aside(self) -> set[str]:
        """Choose contents: whole sets of a task that has enough, since frames of one are alike."""
        from perceive_adapter.training.holdout import FEWEST, set_aside

        tasks = [
            list(sets.values())
            if len(sets) >= FEWEST
            else [{one} for targets in sets.values() for one in targets]
            for sets in self._sets.values()
        ]
        return set_aside([*tasks, [{photo} for photo in self.photos]])

    def digest(self) -> str:
        """Hash the names below the folders and the contents."""
        return hashlib.sha256(json.dumps(self._lines).encode()).hexdigest()


def _divide(items: Iterable[tuple[str, T]], held: Collection[str]) -> tuple[list[T], list[T]]:
    """Divide items by whether their content is held."""
    kept: list[T] = []
    apart: list[T] = []
    for content, item in items:
        (apart if content in held else kept).append(item)
    return kept, apart


def _spread(items: Sequence[T], most: int) -> Sequence[T]:
    """Take so many at most, from all over: frames of a scene are alike."""
    step = max(1, math.ceil(len(items) / most))
    return items[::step]


def _read(paths: Sequence[Path], skip: bool, skipped: list[str]) -> list[Tensor]:
    from perceive_adapter.data.photos import load_photos

    photos = []
    for path in paths:
        try:
            photos += load_photos([path], largest=LARGEST)
        except ImageError as error:
            _leave_out(error, skip, skipped)
    return photos


def _is_measurable(item: Pair | Path, skip: bool, skipped: list[str]) -> bool:
    """Whether a pair, or a photograph and what it is degraded to, can be read and compared."""
    from perceive_adapter.data.pairs import read_pair
    from perceive_adapter.data.photos import load_photos
    from perceive_adapter.evaluation.measure import check_measurable

    try:
        if isinstance(item, Path):
            (photo,) = load_photos([item], largest=LARGEST)
            check_measurable(photo, photo, repr(str(item)))
        else:
            check_measurable(*read_pair(item), repr(str(item.degraded)))
    except ImageError as error:
        _leave_out(error, skip, skipped)
        return False
    return True


def _leave_out(error: ImageError, skip: bool, skipped: list[str]) -> None:
    if not skip:
        told = str(error).rstrip(".")
        raise ImageError(f"{told}. Or leave such files out with --broken skip.") from error
    skipped.append(str(error))
