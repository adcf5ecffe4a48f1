"""Named protocols: which images the figures of the field are measured on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from perceive_adapter.data.degradations import DEGRADATIONS
from perceive_adapter.data.pairs import Pair, find_pairs, holds_pairs
from perceive_adapter.data.photos import find_images, images_below
from perceive_adapter.data.walking import walk
from perceive_adapter.errors import ConfigError
from perceive_adapter.evaluation.cases import Case, degraded_cases, noise_cases, pair_cases

__all__ = ["PROTOCOLS", "Protocol"]

_SIGMAS: Final = (15, 25, 50)


class _Set(NamedTuple):
    """A set by the names that its folder may have, and those of the part that is tested on.

    Part names are in any case of letters. Where there is none, the folder itself may hold what
    they would, images or pairs: but never deeper folders, which may be what is trained on.
    """

    names: tuple[str, ...]
    parts: tuple[str, ...] = ()


_CBSD68: Final = _Set(("CBSD68", "BSD68"), ("gt", "original_png", "original", "clean", "hr"))
_RAIN: Final = _Set(("Rain100L",), ("test",))
_SOTS: Final = _Set(("SOTS", "SOTS_outdoor"), ("outdoor",))
_GOPRO: Final = _Set(("GoPro", "GOPRO", "GOPRO_Large"), ("test",))
_LOL: Final = _Set(("LOL", "LOLv1", "LOL-v1", "LOLdataset"), ("eval15", "test"))


@dataclass(frozen=True)
class Protocol:
    """Which cases a folder gives.

    Args:
        name: how the command line and reports call it.
        noisy: set of clean images that get noise of sigma 15, 25 and 50; None for none.
        pairs: sets of pairs; None takes every set of pairs that there is.
        tasks: degradations that are made of all images of the folder.
    """

    name: str
    noisy: _Set | None = None
    pairs: tuple[_Set, ...] | None = ()
    tasks: tuple[str, ...] = ()

    def cases(self, data: Path, skipped: list[str] | None = None) -> list[Case]:
        """Return the cases of a folder that holds the sets by name, at any depth.

        Args:
            data: the folder.
            skipped: takes what is wrong with each file of a set of pairs that has no partner or is
                no image, which then is left out; None for an error.

        Raises:
            ConfigError: a set, or the part of it that is tested on, is missing.
            ImageError: a set of pairs has such a file.
        """
        data = data.resolve() if data.name in ("", "..") else data  # whose name may be a set's
        return list(self._cases(data, skipped))

    def _cases(self, data: Path, skipped: list[str] | None) -> Iterator[Case]:
        if self.noisy is not None:
            folder, part = _find(data, self.noisy, self.name, paired=False)
            paths = find_images(part, deep=part != folder)
            for sigma in _SIGMAS:
                yield from noise_cases(paths, sigma, f"{folder.name} sigma {sigma}", data)
        if self.pairs is None:
            yield from pair_cases(_pairs(data, skipped, deep=True), data)
        for one in self.pairs or ():
            folder, part = _find(data, one, self.name, paired=True)
            for case in pair_cases(_pairs(part, skipped, deep=part != folder), data):
                yield Case(folder.name, case.image, case.load)
        if self.tasks:
            yield from degraded_cases(find_images(data), self.tasks, data)


def _pairs(folder: Path, skipped: list[str] | None, *, deep: bool) -> Sequence[Pair]:
    found = find_pairs(folder, broken="raise" if skipped is None else "skip", deep=deep)
    if skipped is not None:
        skipped += found.skipped
    return found.pairs


def _find(data: Path, wanted: _Set, protocol: str, *, paired: bool) -> tuple[Path, Path]:
    """Find the folder of a set, below ``data`` or ``data`` itself, and its part to test on."""
    folders = [data] if data.is_dir() else []
    folders += sorted(parent / name for parent, names, _ in walk(data) for name in names)
    named = [folder for name in wanted.names for folder in folders if folder.name == name]
    for folder in named:
        if part := _part(folder, wanted.parts, paired):
            return folder, part
    if named:
        raise ConfigError(
            f"{str(named[0])!r} has no folder named {' or '.join(wanted.parts)}, and no "
            f"{'pairs' if paired else 'images'} directly in it: the protocol {protocol!r} measures "
            "that part alone. Put it there, or choose the protocol 'pairs', which takes whatever "
            "there is."
        )
    raise ConfigError(
        f"{str(data)!r} holds no folder named {' or '.join(wanted.names)}, which the protocol "
        f"{protocol!r} needs. Put the set there, or choose the protocol 'pairs', which takes "
        "whatever there is."
    )


def _part(folder: Path, parts: Sequence[str], paired: bool) -> Path | None:
    """The part of a set that is tested on, or the set's folder where it has such files itself."""
    below = {path.name.casefold(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    for part in parts:
        if part in below:
            return below[part]
    own = holds_pairs(folder, deep=False) if paired else bool(images_below(folder, deep=False))
    return folder if own else None


PROTOCOLS: Final = {
    protocol.name: protocol
    for protocol in (
        Protocol("pairs", pairs=None),
        Protocol("synthetic", tasks=tuple(DEGRADATIONS)),
        Protocol("three-tasks", noisy=_CBSD68, pairs=(_SOTS, _RAIN)),
        Protocol("five-tasks", noisy=_CBSD68, pairs=(_SOTS, _RAIN, _GOPRO, _LOL)),
    )
}
"""Every protocol by name; images are whole, in fp32 (convolutions on a GPU as
torch.backends.cudnn.allow_tf32 says), and metrics are of RGB in 8 bits."""
