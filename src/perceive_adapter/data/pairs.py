"""Pairs of a degraded and a clean image, by the naming rules of the field's data sets."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from torch import Tensor

from perceive_adapter.data.file_headers import image_size
from perceive_adapter.data.images import open_image, read_image
from perceive_adapter.data.matching import (
    DEGRADED_FOLDERS,
    TARGET_FOLDERS,
    File,
    Pair,
    is_medium,
    match_folders,
    match_shard,
)
from perceive_adapter.data.photos import find_images
from perceive_adapter.data.shards import Member, shard_group, shards_below
from perceive_adapter.data.sides import images_outside, lone_sides
from perceive_adapter.data.walking import unlisted, walk
from perceive_adapter.errors import ConfigError, ImageError
from perceive_adapter.warning import warn

__all__ = [
    "DEGRADED_FOLDERS",
    "TARGET_FOLDERS",
    "FoundPairs",
    "Pair",
    "find_pairs",
    "find_photos",
    "holds_pairs",
    "read_mediums",
    "read_pair",
]

_NAMED: Final = 5  # problems that an error names


@dataclass(frozen=True)
class FoundPairs:
    """The pairs of a folder, in the order of their paths.

    Args:
        pairs: those that can be used.
        skipped: what is wrong with each file, or folder of files, that cannot.
    """

    pairs: tuple[Pair, ...]
    skipped: tuple[str, ...] = ()

    def counts(self) -> dict[str, int]:
        """Return how many pairs each group has."""
        return dict(Counter(pair.group for pair in self.pairs))


def find_pairs(
    folder: str | os.PathLike[str],
    *,
    broken: Literal["raise", "skip"] = "raise",
    deep: bool = True,
) -> FoundPairs:
    """Find the pairs below a folder, at any depth.

    A set of pairs is a folder that holds one of degraded images (one of ``DEGRADED_FOLDERS``) and
    one of clean images (one of ``TARGET_FOLDERS``), in any case of letters. Files belong together
    that have the same name but for its ending, in the same subfolder; of several such files, those
    that have the same ending too, and the others are left over. Where there is no such target,
    these rules of well-known data sets apply:

    - RESIDE: ``0001_0.8_0.2`` belongs to ``0001``, which may have several degraded images.
    - Rain100L, LOL-v2: ``rain-001`` belongs to ``norain-001``, ``low00690`` to ``normal00690``.

    Folders beside them whose names begin with ``medium`` hold half-restored images under the names
    of the degraded ones, as many or few of them as there are.

    Uncompressed tar files in WebDataset's manner, at any depth, hold pairs too: ``7.hazy.jpg`` and
    ``7.gt.png``, and ``7.medium.png`` beside them, are one sample. Their set is the folder that
    they are in, or, in ``folder`` itself, what comes before their number: ``derain-000007.tar``.

    Images beside the sets are left out with a warning, since they may be masks or an overview. But
    folders of them that look like a side of pairs, as ``lone_sides`` tells, are broken.

    Only the heads of the files are read: an image that is cut short shows when it is read, and of
    one inside a shard its size and kind, too.

    Args:
        folder: root of one or several sets, such as all-in-one training's ``denoise/input``,
            ``denoise/gt``, ``derain/input`` and so on.
        broken: what to do with a file without a partner or one of its own, a folder without one or
            that cannot be listed, a file that is no image, an image of a kind that cannot be used,
            and a pair of two sizes: raise an error that names them, or leave them out and say so in
            ``skipped``.
        deep: also sets and shards in deeper folders; otherwise only ``folder`` as a set itself, and
            shards directly in it.

    Raises:
        ConfigError: there is no such folder or no set in it, a set has several folders for one
            side, or all of its pairs are broken.
        ImageError: something is broken.
    """
    root = Path(folder)
    pairs: list[Pair] = []
    problems = unlisted(root, deep=deep)
    if problems and broken == "raise":  # what they hold would seem to be missing
        raise _unusable(root, problems)
    sets, shards = list(_sets(root, deep)), shards_below(root, deep=deep)
    if not sets and not shards:
        raise ConfigError(f"{str(root)!r} holds no set of pairs: {_expected()}")
    lone = _left_out(root, sets) if deep else []
    problems += lone
    for degraded, target, mediums in sets:
        group = degraded.parent.relative_to(root).as_posix()
        found, unpaired = match_folders(degraded, target, mediums)
        problems += unpaired
        for pair in found:
            problem = _problem(pair)
            if problem:
                problems.append(problem)
            else:
                pairs.append(replace(pair, group="" if group == "." else group))
    for shard in shards:
        found, unpaired = match_shard(shard, shard_group(shard, root))
        pairs += found
        problems += unpaired
    if problems and broken == "raise":
        raise _unusable(root, problems, f" For pairs, {_expected()}" if lone else "")
    if not pairs:
        raise ConfigError(f"{str(root)!r} holds no pair that can be used: {_expected()}")
    return FoundPairs(tuple(pairs), tuple(problems))


def holds_pairs(folder: str | os.PathLike[str], *, deep: bool = True) -> bool:
    """Tell whether a folder holds sets of pairs or shards, whatever is wrong with their files.

    Args:
        folder: where to look.
        deep: also in folders below it, at any depth.

    Raises:
        ConfigError: there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"{str(root)!r} is no folder: {_expected()}")
    known = (DEGRADED_FOLDERS, TARGET_FOLDERS)
    return bool(shards_below(root, deep=deep)) or any(
        all(any(name.casefold() in side for name in names) for side in known)
        for _, names, _ in walk(root, deep=deep)
    )


def find_photos(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the clean photographs below a folder that holds no pairs, in the order of their paths.

    Raises:
        ConfigError: there is no such folder, it holds no image, or it holds what looks like the
            sides of pairs, as ``lone_sides`` tells.
    """
    root = Path(folder)
    images = find_images(root)
    problems = lone_sides(root, images)
    if problems:
        raise ConfigError(
            f"{'; '.join(problems[:_NAMED])}. For pairs, {_expected()} Where all of them hold "
            "clean photographs, give each by itself, or rename it."
        )
    return images


def read_pair(pair: Pair) -> tuple[Tensor, Tensor]:
    """Read degraded image and target, (3, H, W) uint8 each; gray is repeated, alpha is dropped.

    Raises:
        ImageError: a file cannot be read, or the two are of different sizes.
    """
    degraded, target = _read(pair.degraded), _read(pair.target)
    _check_size(pair.degraded, degraded, pair.target, target)
    return degraded, target


def read_mediums(pair: Pair, target: Tensor) -> list[Tensor | None]:
    """Read the half-restored images, (3, H, W) uint8 each; None where one is missing.

    Args:
        pair: whose they are.
        target: its target as it was read, (3, H, W), whose size they must have.

    Raises:
        ImageError: a file cannot be read, or is of another size than the target.
    """
    images: list[Tensor | None] = []
    for file in pair.mediums:
        image = None if file is None else _read(file)
        if file is not None and image is not None:
            _check_size(file, image, pair.target, target)
        images.append(image)
    return images


def _read(file: File) -> Tensor:
    image = open_image(file.open(), str(file)) if isinstance(file, Member) else file
    return read_image(image).color[0].expand(3, -1, -1).contiguous()


def _sets(root: Path, deep: bool) -> Iterator[tuple[Path, Path, list[Path]]]:
    """Yield the folders of degraded, of clean and of half-restored images of every set."""
    if not root.is_dir():
        raise ConfigError(f"{str(root)!r} is no folder: {_expected()}")
    for parent, names, _ in walk(root, deep=deep):
        sides = [
            [name for name in names if name.casefold() in known]
            for known in (DEGRADED_FOLDERS, TARGET_FOLDERS)
        ]
        if not all(sides):
            continue
        if max(len(side) for side in sides) > 1:
            raise ConfigError(
                f"{str(parent)!r} has several folders for one side of its pairs, {sides[0]} of "
                f"degraded and {sides[1]} of clean images: expected one of each. Move one "
                "elsewhere."
            )
        mediums = [parent / name for name in names if is_medium(name)]
        yield parent / sides[0][0], parent / sides[1][0], mediums


def _unusable(root: Path, problems: Sequence[str], more: str = "") -> ImageError:
    named = "; ".join(problems[:_NAMED])
    named += f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    return ImageError(
        f"{len(problems)} of the files and folders below {str(root)!r} cannot be used: {named}. "
        'Mend, rename or remove them, or leave them out (broken="skip", or --broken skip).' + more
    )


def _left_out(root: Path, sets: Sequence[tuple[Path, Path, list[Path]]]) -> list[str]:
    """Say which folders of no set look like a side of one; warn of all images of no set."""
    sides = [side for degraded, target, mediums in sets for side in (degraded, target, *mediums)]
    images = images_outside(root, sides)
    if images:
        warn(
            f"{len(images)} images below {str(root)!r} are in no set of pairs, and are left out, "
            f"such as {str(images[0])!r}. To use them, give clean photographs as a folder of their "
            "own, and name folders of pairs as find_pairs tells."
        )
    return lone_sides(root, images, [degraded.parent for degraded, *_ in sets])


def _expected() -> str:
    return (
        f"expected folders of degraded images (named {', '.join(DEGRADED_FOLDERS)}) beside folders "
        f"of clean ones (named {', '.join(TARGET_FOLDERS)}), at any depth, or tar files of both."
    )


def _problem(pair: Pair) -> str | None:
    """Return what is wrong with the files of a pair, as far as their heads show."""
    files = [pair.target, pair.degraded, *(file for file in pair.mediums if file is not None)]
    sizes = []
    for file in files:
        assert isinstance(file, Path)
        try:
            sizes.append(image_size(file))
        except ImageError as error:
            return str(error)
    for file, size in zip(files, sizes, strict=True):
        if size != sizes[0]:
            return _sizes(file, pair.target, size, sizes[0])
    return None


def _check_size(file: File, image: Tensor, target_file: File, target: Tensor) -> None:
    if image.shape != target.shape:
        raise ImageError(_sizes(file, target_file, image.shape[1:], target.shape[1:]))


def _sizes(file: File, target: File, first: Sequence[int], second: Sequence[int]) -> str:
    return (
        f"{str(file)!r} has {first[0]} x {first[1]} pixels and {str(target)!r} "
        f"{second[0]} x {second[1]}"
    )
