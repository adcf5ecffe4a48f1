"""Named protocols: which images the figures of the field are measured on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from perceive_adapter.data.degradations import DEGRADATIONS
from perceive_adapter.data.pairs import find_pairs
from perceive_adapter.data.samples import find_images
from perceive_adapter.errors import ConfigError
from perceive_adapter.evaluation.cases import Case, degraded_cases, noise_cases, pair_cases

__all__ = ["PROTOCOLS", "Protocol"]

_SIGMAS: Final = (15, 25, 50)


@dataclass(frozen=True)
class Protocol:
    """Which cases a folder gives.

    Args:
        name: how the command line and reports call it.
        about: what it is, in a line.
        noisy: folder of clean images that get noise of sigma 15, 25 and 50; None for none.
        pairs: names that each set of pairs may have, the first one found counts; None takes every
            set of pairs that there is.
        tasks: degradations that are made of all images of the folder, where neither is given.
    """

    name: str
    about: str
    noisy: tuple[str, ...] | None = None
    pairs: tuple[tuple[str, ...], ...] | None = ()
    tasks: tuple[str, ...] = ()

    def cases(self, data: Path) -> list[Case]:
        """Return the cases of a folder that holds the sets by name, at any depth.

        Raises:
            ConfigError: a set is missing.
            ImageError: a set of pairs has a file without a partner, or one that is no image.
        """
        return list(self._cases(data))

    def _cases(self, data: Path) -> Iterator[Case]:
        if self.noisy is not None:
            folder = _find(data, self.noisy, self.name)
            clean = [path for path in find_images(folder) if path.parent.name != "input"]
            for sigma in _SIGMAS:
                yield from noise_cases(clean, sigma, f"{folder.name} sigma {sigma}")
        if self.pairs is None:
            yield from pair_cases(find_pairs(data).pairs)
        for names in self.pairs or ():
            folder = _find(data, names, self.name)
            for case in pair_cases(find_pairs(folder).pairs):
                yield Case(folder.name, case.image, case.load)
        if self.tasks:
            yield from degraded_cases(find_images(data), self.tasks)


def _find(data: Path, names: tuple[str, ...], protocol: str) -> Path:
    """Find the folder of a set, below ``data`` or ``data`` itself."""
    for name in names:
        found = sorted(path for path in (data, *data.rglob(name)) if path.name == name)
        if found and found[0].is_dir():
            return found[0]
    raise ConfigError(
        f"{str(data)!r} holds no folder named {' or '.join(names)}, which the protocol "
        f"{protocol!r} needs. Put the set there, or choose the protocol 'pairs', which takes "
        "whatever there is."
    )


_CBSD68: Final = ("CBSD68", "BSD68")
_RAIN: Final = ("Rain100L",)
_SOTS: Final = ("SOTS", "SOTS_outdoor", "outdoor")

PROTOCOLS: Final = {
    protocol.name: protocol
    for protocol in (
        Protocol("pairs", "every set of pairs below the folder", pairs=None),
        Protocol(
            "synthetic",
            "every image below the folder, with each degradation, mild and severe",
            tasks=tuple(DEGRADATIONS),
        ),
        Protocol(
            "three-tasks",
            "SOTS (outdoor), Rain100L, CBSD68 with noise of sigma 15, 25 and 50",
            noisy=_CBSD68,
            pairs=(_SOTS, _RAIN),
        ),
        Protocol(
            "five-tasks",
            "the three tasks, GoPro and LOL",
            noisy=_CBSD68,
            pairs=(_SOTS, _RAIN, ("GoPro", "GOPRO"), ("LOL", "LOLv1", "LOL-v1")),
        ),
    )
}
"""Every protocol by name; images are whole, in fp32, and metrics are of RGB in 8 bits."""
