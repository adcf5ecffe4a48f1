"""Which files belong together, by their names: in folders, and in shards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from perceive_adapter.data.photos import IMAGE_SUFFIXES, images_below
from perceive_adapter.data.shards import Member, shard_members
from perceive_adapter.errors import ImageError

__all__ = [
    "DEGRADED_FOLDERS",
    "MEDIUM_WORD",
    "TARGET_FOLDERS",
    "File",
    "Pair",
    "is_medium",
    "match_folders",
    "match_shard",
    "name_below",
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
    "inputs",
    "lr",
    "blurred",
    "foggy",
    "snowy",
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
    "targets",
    "hr",
    "reference",
    "references",
    "groundtruth",
    "ground_truth",
)
"""Names of folders of clean images, and words that their files may begin with."""

MEDIUM_WORD: Final = "medium"
"""What names of folders of half-restored images begin with, ``medium-nafnet``, say."""

File: TypeAlias = Path | Member
"""An image on disk, or one inside a shard."""

_Key: TypeAlias = tuple[str, str]  # subfolder, and name without its ending

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


def name_below(file: File, root: Path) -> str:
    """Return a file's path relative to a folder that it was found in.

    Example:
        >>> member = Member(Path("data/rain/0.tar"), "7.gt.png", offset=512, size=99)
        >>> name_below(Path("data/rain/gt/7.png"), Path("data")), name_below(member, Path("data"))
        ('rain/gt/7.png', 'rain/0.tar:7.gt.png')
    """
    if isinstance(file, Member):
        return f"{name_below(file.shard, root)}:{file.path}"
    return file.relative_to(root).as_posix()


def is_medium(name: str) -> bool:
    """Tell whether a folder, or a part of a sample, is of half-restored images."""
    return name.casefold().startswith(MEDIUM_WORD)


def match_folders(
    degraded: Path, target: Path, mediums: Sequence[Path]
) -> tuple[list[Pair], list[str]]:
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


def match_shard(shard: Path, group: str) -> tuple[list[Pair], list[str]]:
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
    mediums = sorted(filter(is_medium, parts))
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
