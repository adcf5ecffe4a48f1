"""Pairs of a degraded and a clean image, by the naming rules of the field's data sets."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, TypeAlias

from torch import Tensor

from perceive_adapter.data.folders import walk
from perceive_adapter.data.heads import image_size
from perceive_adapter.data.images import open_image, read_image
from perceive_adapter.data.samples import IMAGE_SUFFIXES, images_below
from perceive_adapter.data.shards import Member, shard_group, shard_members, shards_below
from perceive_adapter.errors import ConfigError, ImageError

__all__ = [
    "DEGRADED_FOLDERS",
    "MEDIUM_WORD",
    "TARGET_FOLDERS",
    "File",
    "FoundPairs",
    "Pair",
    "find_pairs",
    "holds_pairs",
    "read_mediums",
    "read_pair",
]

DEGRADED_FOLDERS: Final = (
    "input",
    "degraded",
    "lq",
    "hazy",
    "rain",
    "rainy",
    "blur",
    "blurry",
    "noisy",
    "low",
)
"""Names of folders of degraded images, and words that their files may begin with."""

TARGET_FOLDERS: Final = (
    "gt",
    "target",
    "hq",
    "clear",
    "clean",
    "norain",
    "sharp",
    "high",
    "normal",
)
"""Names of folders of clean images, and words that their files may begin with."""

MEDIUM_WORD: Final = "medium"
"""What names of folders of half-restored images begin with, ``medium-nafnet``, say."""

File: TypeAlias = Path | Member
"""An image on disk, or one inside a shard."""

_Key: TypeAlias = tuple[str, str]  # subfolder, and name without its ending

_NAMED: Final = 5  # problems that an error names
_SEVERAL: Final = "several files of one name but for the ending"


@dataclass(frozen=True)
class Pair:
    """Two files of one scene, and what others made of it.

    Args:
        degraded: what a network is given.
        target: what it should give.
        group: folder of the set that the pair belongs to, relative to the one searched; such as
            ``derain``.
        mediums: half-restored images of it, None where one is missing.
    """

    degraded: File
    target: File
    group: str
    mediums: tuple[File | None, ...] = ()


@dataclass(frozen=True)
class FoundPairs:
    """The pairs of a folder, in the order of their paths.

    Args:
        pairs: those that can be used.
        skipped: what is wrong with each file that cannot.
    """

    pairs: tuple[Pair, ...]
    skipped: tuple[str, ...] = ()

    def counts(self) -> dict[str, int]:
        """Return how many pairs each group has."""
        return dict(Counter(pair.group for pair in self.pairs))


def find_pairs(
    folder: str | os.PathLike[str], *, broken: Literal["raise", "skip"] = "raise"
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

    Only the heads of the files are read: an image that is cut short shows when it is read, and of
    one inside a shard its size and kind, too.

    Args:
        folder: root of one or several sets, such as all-in-one training's ``denoise/input``,
            ``denoise/gt``, ``derain/input`` and so on.
        broken: what to do with a file without a partner or one of its own, a file that is no image,
            an image of a kind that cannot be used, and a pair of two sizes: raise an error that
            names them, or leave them out and say so in ``skipped``.

    Raises:
        ConfigError: there is no such folder or no set in it, a set has several folders for one
            side, or all of its pairs are broken.
        ImageError: something is broken.
    """
    root = Path(folder)
    pairs: list[Pair] = []
    problems: list[str] = []
    sets, shards = list(_sets(root)), shards_below(root)
    if not sets and not shards:
        raise ConfigError(f"{str(root)!r} holds no set of pairs: {_expected()}")
    for degraded, target, mediums in sets:
        group = degraded.parent.relative_to(root).as_posix()
        found, unpaired = _match(degraded, target, mediums)
        problems += unpaired
        for pair in found:
            problem = _problem(pair)
            if problem:
                problems.append(problem)
            else:
                pairs.append(replace(pair, group="" if group == "." else group))
    for shard in shards:
        found, unpaired = _in_shard(shard, shard_group(shard, root))
        pairs += found
        problems += unpaired
    if problems and broken == "raise":
        named = "; ".join(problems[:_NAMED])
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise ImageError(
            f"{len(problems)} of the files below {str(root)!r} cannot be used: {named}{more}. Mend "
            'or remove them, or leave them out with broken="skip".'
        )
    if not pairs:
        raise ConfigError(f"{str(root)!r} holds no pair that can be used: {_expected()}")
    return FoundPairs(tuple(pairs), tuple(problems))


def holds_pairs(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder holds sets of pairs or shards, whatever is wrong with their files.

    Raises:
        ConfigError: there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"{str(root)!r} is no folder: {_expected()}")
    known = (DEGRADED_FOLDERS, TARGET_FOLDERS)
    return bool(shards_below(root)) or any(
        all(any(name.casefold() in side for name in names) for side in known)
        for _, names, _ in walk(root)
    )


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


def _sets(root: Path) -> Iterator[tuple[Path, Path, list[Path]]]:
    """Yield the folders of degraded, of clean and of half-restored images of every set."""
    if not root.is_dir():
        raise ConfigError(f"{str(root)!r} is no folder: {_expected()}")
    for parent, names, _ in walk(root):
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
        mediums = [parent / name for name in names if _is_medium(name)]
        yield parent / sides[0][0], parent / sides[1][0], mediums


def _expected() -> str:
    return (
        f"expected folders of degraded images (named {', '.join(DEGRADED_FOLDERS)}) beside folders "
        f"of clean ones (named {', '.join(TARGET_FOLDERS)}), at any depth, or tar files of both."
    )


def _is_medium(name: str) -> bool:
    return name.casefold().startswith(MEDIUM_WORD)


def _match(degraded: Path, target: Path, mediums: Sequence[Path]) -> tuple[list[Pair], list[str]]:
    """Return the files that belong together, and what is wrong with the others."""
    inputs, targets = _files(degraded), _files(target)
    halves = [_files(folder) for folder in mediums]
    others = {key: files for key, files in targets.items() if key not in inputs}
    found, problems = [], []
    asking: dict[_Key, list[Path]] = {}  # degraded images by the name of the target they ask for
    for key, files in inputs.items():
        partner = key if key in targets else _partner(key, others)
        clean = targets[partner] if partner is not None else []
        asking[partner or key] = files
        for file in files:
            own = _own(file, files, clean)
            if own is None:
                problems.append(_left(file, files, clean, target))
            else:
                restored = tuple(_own(file, files, half.get(key, [])) for half in halves)
                found.append(Pair(file, own, "", restored))
    used = {file for pair in found for file in (pair.target, *pair.mediums)}
    for side, partners in ((targets, asking), *((half, inputs) for half in halves)):
        for key, files in side.items():
            left = [file for file in files if file not in used]
            problems += [_left(file, files, partners.get(key, []), degraded) for file in left]
    return found, problems


def _own(file: Path, rivals: Sequence[Path], partners: Sequence[Path]) -> Path | None:
    """Return the partner of the very name, or the only one that only this file asks for."""
    same = next((partner for partner in partners if partner.name == file.name), None)
    return partners[0] if same is None and len(rivals) == len(partners) == 1 else same


def _left(file: Path, rivals: Sequence[Path], partners: Sequence[Path], other: Path) -> str:
    """Say why a file has no partner."""
    if not partners:
        return f"{str(file)!r} has no partner in {str(other)!r}"
    alike = rivals if len(rivals) > 1 else partners
    names = " and ".join(repr(path.name) for path in alike)
    return f"{str(file)!r} has no partner of its own: {names} are {_SEVERAL}"


def _in_shard(shard: Path, group: str) -> tuple[list[Pair], list[str]]:
    """Return the pairs inside a shard, and what is wrong with other samples."""
    samples: dict[str, dict[str, list[Member]]] = {}
    try:
        for member in shard_members(shard):
            if member.name.lower().endswith(IMAGE_SUFFIXES):
                part = member.field.rpartition(".")[0].casefold()
                samples.setdefault(member.sample, {}).setdefault(part, []).append(member)
    except ImageError as error:
        return [], [str(error)]
    parts = {part for sample in samples.values() for part in sample}
    mediums = sorted(filter(_is_medium, parts))
    found, problems = [], []
    for name, members in samples.items():
        sample = {part: several[0] for part, several in members.items()}
        sides = [_one_of(sample, known) for known in (DEGRADED_FOLDERS, TARGET_FOLDERS)]
        if alike := _alike(members, mediums):
            problems.append(f"the sample {name!r} of {str(shard)!r} has {alike}, {_SEVERAL}")
        elif sides[0] is None or sides[1] is None:
            has = ", ".join(sorted(sample))
            problems.append(f"the sample {name!r} of {str(shard)!r} has {has}, which is no pair")
        else:
            halves = tuple(sample.get(part) for part in mediums)
            found.append(Pair(sides[0], sides[1], group, halves))
    if not samples:
        problems.append(f"{str(shard)!r} holds no image")
    return found, problems


def _one_of(sample: Mapping[str, Member], names: Iterable[str]) -> Member | None:
    """Return the one member of these names; None where there is none, or several."""
    found = [sample[name] for name in names if name in sample]
    return found[0] if len(found) == 1 else None


def _alike(members: Mapping[str, Sequence[Member]], mediums: Sequence[str]) -> str:
    """Name the members that would be the same part of a sample; nothing where there are none."""
    for part in (*DEGRADED_FOLDERS, *TARGET_FOLDERS, *mediums):
        if len(members.get(part, ())) > 1:
            return " and ".join(repr(member.name) for member in members[part])
    return ""


def _files(folder: Path) -> dict[_Key, list[Path]]:
    """Return the images below a folder by their subfolder and name without ending."""
    files: dict[_Key, list[Path]] = {}
    for path in images_below(folder):
        key = path.parent.relative_to(folder).as_posix(), path.stem
        files.setdefault(key, []).append(path)
    return files


def _partner(key: _Key, targets: Mapping[_Key, object]) -> _Key | None:
    """Return the target of a degraded image that has no target of its own name."""
    subfolder, stem = key
    parts = stem.split("_")
    names = ["_".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
    word = re.match("[a-z]+", stem.casefold())
    if word and word[0] in DEGRADED_FOLDERS:
        names += [other + stem[len(word[0]) :] for other in TARGET_FOLDERS]
    return next(((subfolder, name) for name in names if (subfolder, name) in targets), None)


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
