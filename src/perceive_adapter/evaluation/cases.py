"""Images to evaluate on: a degraded one, its target, and the group whose mean they count in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from perceive_adapter.data.degradations import mix
from perceive_adapter.data.matching import File, name_below
from perceive_adapter.data.pairs import Pair, read_pair
from perceive_adapter.data.photos import load_photos
from perceive_adapter.data.samples import as_file

__all__ = ["SEVERITIES", "Case", "degraded_cases", "noise_cases", "pair_cases"]

SEVERITIES: Final = (0.3, 0.6)
"""Mild and severe, of the degradations that are made here."""


@dataclass(frozen=True)
class Case:
    """One image; it is read or made when it is wanted, and not kept.

    Args:
        group: whose mean it counts in.
        image: its name, which no other image of the group has.
        load: gives degraded image and target, (1, 3, H, W) in [0, 1] each.
    """

    group: str
    image: str
    load: Callable[[], tuple[Tensor, Tensor]]


def pair_cases(pairs: Sequence[Pair], root: Path | None = None) -> Iterator[Case]:
    """Yield the pairs of files; their groups are the groups.

    Args:
        pairs: the pairs.
        root: folder that images are named relative to; None for their whole paths.
    """

    def load(pair: Pair) -> tuple[Tensor, Tensor]:
        degraded, target = read_pair(pair)
        return _unit(degraded), _unit(target)

    for pair in pairs:
        yield Case(pair.group or "pairs", _name(pair.degraded, root), partial(load, pair))


def noise_cases(
    paths: Sequence[Path], sigma: float, group: str, root: Path | None = None
) -> Iterator[Case]:
    """Yield clean images with Gaussian noise, as the field measures denoising.

    Args:
        paths: of the clean images; an image's position is the seed of its noise.
        sigma: standard deviation on the 8-bit scale; the noisy image is rounded to 8 bits.
        group: name of the group.
        root: folder that images are named relative to; None for their whole paths.
    """

    def load(seed: int, path: Path) -> tuple[Tensor, Tensor]:
        target = _unit(load_photos([path])[0])
        noise = torch.randn(
            target.shape, generator=torch.Generator().manual_seed(seed), device="cpu"
        )
        return as_file(target + sigma / 255 * noise), target

    for seed, path in enumerate(paths):
        yield Case(group, _name(path, root), partial(load, seed, path))


def degraded_cases(
    paths: Sequence[Path],
    tasks: Sequence[str],
    root: Path | None = None,
    *,
    largest: int | None = None,
) -> Iterator[Case]:
    """Yield clean images with every task's damage, at each of ``SEVERITIES``, rounded to 8 bits.

    Args:
        paths: of the clean images; an image's position is the seed of its damage.
        tasks: names of degradations, several of them joined by ``+``; they are the groups.
        root: folder that images are named relative to; None for their whole paths.
        largest: longest side in pixels to which an image is shrunk; None for no limit.
    """

    def load(task: str, severity: float, seed: int, path: Path) -> tuple[Tensor, Tensor]:
        target = _unit(load_photos([path], largest=largest)[0])
        severities = dict.fromkeys(task.split("+"), severity)
        return as_file(mix(target, severities, torch.Generator().manual_seed(seed))), target

    for task in tasks:
        for seed, path in enumerate(paths):
            for severity in SEVERITIES:
                name = f"{_name(path, root)}, severity {severity:g}"
                yield Case(task, name, partial(load, task, severity, seed, path))


def _name(file: File, root: Path | None) -> str:
    return str(file) if root is None else name_below(file, root)


def _unit(image: Tensor) -> Tensor:
    return image[None].float() / 255
