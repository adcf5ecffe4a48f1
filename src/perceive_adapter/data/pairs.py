"""Pairs of a degraded and a clean image on disk, by the naming rules of the field's data sets."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from torch import Tensor

from perceive_adapter.data.images import read_image
from perceive_adapter.data.samples import IMAGE_SUFFIXES
from perceive_adapter.errors import ConfigError, ImageError

__all__ = [
    "DEGRADED_FOLDERS",
    "TARGET_FOLDERS",
    "FoundPairs",
    "Pair",
    "find_pairs",
    "holds_pairs",
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

_ORIENTATION: Final = 0x0112  # EXIF's tag; from 5 on, the image is turned by a quarter
_MODES: Final = ("L", "LA", "P", "RGB", "RGBA")
_NAMED: Final = 5  # problems that an error names


@dataclass(frozen=True)
class Pair:
    """Two files of one scene.

    Args:
        degraded: what a network is given.
        target: what it should give.
        group: folder of the set that the pair belongs to, relative to the one searched; such as
            ``derain``.
    """

    degraded: Path
    target: Path
    group: str


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
    that have the same name but for its ending, in the same subfolder. Where there is no such
    target, these rules of well-known data sets apply:

    - RESIDE: ``0001_0.8_0.2`` belongs to ``0001``, which may have several degraded images.
    - Rain100L, LOL-v2: ``rain-001`` belongs to ``norain-001``, ``low00690`` to ``normal00690``.

    Only the heads of the files are read: an image that is cut short shows when it is read.

    Args:
        folder: root of one or several sets, such as all-in-one training's ``denoise/input``,
            ``denoise/gt``, ``derain/input`` and so on.
        broken: what to do with a file without a partner, a file that is no image, an image of a
            kind that cannot be used, and a pair of two sizes: raise an error that names them, or
            leave them out and say so in ``skipped``.

    Raises:
        ConfigError: there is no such folder or no set in it, a set has several folders for one
            side, or all of its pairs are broken.
        ImageError: something is broken.
    """
    root = Path(folder)
    pairs: list[Pair] = []
    problems: list[str] = []
    for degraded, target in _sets(root):
        group = degraded.parent.relative_to(root).as_posix()
        found, unpaired = _match(degraded, target)
        problems += unpaired
        for files in found:
            problem = _problem(*files)
            if problem:
                problems.append(problem)
            else:
                pairs.append(Pair(*files, "" if group == "." else group))
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
    """Tell whether a folder holds a set of pairs, at any depth, whatever is wrong with its files.

    Raises:
        ConfigError: there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"{str(root)!r} is no folder: {_expected()}")
    known = (DEGRADED_FOLDERS, TARGET_FOLDERS)
    return any(
        all(any(name.casefold() in side for name in names) for side in known)
        for _, names, _ in os.walk(root, followlinks=True)
    )


def read_pair(pair: Pair) -> tuple[Tensor, Tensor]:
    """Read degraded image and target, (3, H, W) uint8 each; gray is repeated, alpha is dropped.

    Raises:
        ImageError: a file cannot be read, or the two are of different sizes.
    """
    degraded, target = (
        read_image(path).color[0].expand(3, -1, -1).contiguous()
        for path in (pair.degraded, pair.target)
    )
    if degraded.shape != target.shape:
        raise ImageError(_sizes(pair.degraded, pair.target, degraded.shape[1:], target.shape[1:]))
    return degraded, target


def _sets(root: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the folder of degraded and that of clean images of every set."""
    if not root.is_dir():
        raise ConfigError(f"{str(root)!r} is no folder: {_expected()}")
    some = False
    for parent, names, _ in os.walk(root, followlinks=True):
        names.sort()
        sides = [
            [name for name in names if name.casefold() in known]
            for known in (DEGRADED_FOLDERS, TARGET_FOLDERS)
        ]
        if not all(sides):
            continue
        if max(len(side) for side in sides) > 1:
            raise ConfigError(
                f"{parent!r} has several folders for one side of its pairs, {sides[0]} of degraded "
                f"and {sides[1]} of clean images: expected one of each. Move one elsewhere."
            )
        some = True
        yield Path(parent, sides[0][0]), Path(parent, sides[1][0])
    if not some:
        raise ConfigError(f"{str(root)!r} holds no set of pairs: {_expected()}")


def _expected() -> str:
    return (
        f"expected folders of degraded images (named {', '.join(DEGRADED_FOLDERS)}) beside folders "
        f"of clean ones (named {', '.join(TARGET_FOLDERS)}), at any depth."
    )


def _match(degraded: Path, target: Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Return the files that belong together, and what is wrong with the others."""
    inputs, targets = _files(degraded), _files(target)
    exact = inputs.keys() & targets.keys()
    others = {key: file for key, file in targets.items() if key not in exact}
    found, problems = [], []
    used: set[tuple[str, str]] = set()
    for key, file in inputs.items():
        partner = key if key in exact else _partner(key, others)
        if partner is None:
            problems.append(f"{str(file)!r} has no partner in {str(target)!r}")
        else:
            found.append((file, targets[partner]))
            used.add(partner)
    for key, file in targets.items():
        if key not in used:
            problems.append(f"{str(file)!r} has no partner in {str(degraded)!r}")
    return found, problems


def _files(folder: Path) -> dict[tuple[str, str], Path]:
    """Return the images below a folder by their subfolder and name without ending."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return {(path.parent.relative_to(folder).as_posix(), path.stem): path for path in paths}


def _partner(
    key: tuple[str, str], targets: Mapping[tuple[str, str], Path]
) -> tuple[str, str] | None:
    """Return the target of a degraded image that has no target of its own name."""
    subfolder, stem = key
    parts = stem.split("_")
    names = ["_".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
    word = re.match("[a-z]+", stem.casefold())
    if word and word[0] in DEGRADED_FOLDERS:
        names += [other + stem[len(word[0]) :] for other in TARGET_FOLDERS]
    return next(((subfolder, name) for name in names if (subfolder, name) in targets), None)


def _problem(degraded: Path, target: Path) -> str | None:
    """Return what is wrong with a pair, as far as the heads of its files show."""
    sizes = []
    for path in (degraded, target):
        try:
            sizes.append(_size(path))
        except ImageError as error:
            return str(error)
    return None if sizes[0] == sizes[1] else _sizes(degraded, target, *sizes)


def _size(path: Path) -> tuple[int, int]:
    """Height and width of an image that can be used, without decoding it."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode, (width, height) = image.mode, image.size
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{str(path)!r} cannot be read as an image ({error})") from error
    if mode not in _MODES:
        raise ImageError(f"{str(path)!r} has mode {mode}, expected 8 bits of gray or RGB")
    return (width, height) if turned else (height, width)


def _sizes(degraded: Path, target: Path, first: Sequence[int], second: Sequence[int]) -> str:
    return (
        f"{str(degraded)!r} has {first[0]} x {first[1]} pixels and {str(target)!r} "
        f"{second[0]} x {second[1]}"
    )
