"""What restoration is trained on: degraded crops and their targets, each decided by its index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from perceive_adapter.data.contents import photos_digest
from perceive_adapter.data.degradations import DEGRADATIONS, FAMILIES, FAMILY_OF, mix
from perceive_adapter.data.pairs import Pair, read_mediums, read_pair
from perceive_adapter.data.samples import (
    CropSampler,
    as_file,
    fractions,
    integer_below,
    mirrored_to,
)
from perceive_adapter.errors import ConfigError, ImageError
from perceive_adapter.warning import warn

__all__ = [
    "CleanPhotos",
    "Drawn",
    "PairFiles",
    "RestorationData",
    "RestorationSample",
    "Source",
    "check_tasks",
]

_GOLDEN: Final = (5**0.5 - 1) / 2
_CACHE: Final = 2**30  # bytes of decoded pairs that are kept in memory
_SEEDS: Final = 2_654_435_761  # 2**32 times the golden ratio: seeds lie far apart


class Drawn(NamedTuple):
    """One degraded image, (3, S, S) in [0, 1], its target, and what is known of it.

    The severity (D,) of each of ``FAMILIES`` is NaN where nobody knows it. Half-restored images are
    (M, 3, S, S) in [0, 1], NaN where one is missing; None for none.
    """

    degraded: Tensor
    target: Tensor
    severity: Tensor
    mediums: Tensor | None = None


class Source(Protocol):
    """Draws degraded crops of one or several tasks."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """What can be drawn, by name."""
        ...

    @property
    def mediums(self) -> int:
        """How many half-restored images come with a sample, at most."""
        ...

    def draw(self, task: str, side: int, generator: torch.Generator) -> Drawn:
        """Draw a crop of ``side`` pixels; everything random comes from the generator."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """Return what else decides the crops, in plain values: a run with others is another run."""
        ...


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise if photographs cannot be degraded as these tasks say.

    Args:
        tasks: see :class:`CleanPhotos`.

    Raises:
        ConfigError: a task names no degradation, or is there twice.
    """
    for task in tasks:
        for name in task.split("+"):
            if name not in DEGRADATIONS:
                raise ConfigError(
                    f"the task {task!r} names no degradation: expected one of "
                    f"{', '.join(DEGRADATIONS)}, or several of them joined by +."
                )
    if twice := sorted({task for task in tasks if list(tasks).count(task) > 1}):
        raise ConfigError(f"tasks={tasks} has {', '.join(twice)} more than once.")


class CleanPhotos:
    """Clean photographs that are degraded while they are drawn; none comes half restored.

    Args:
        photos: what crops are drawn from.
        tasks: names of ``DEGRADATIONS``, several of them joined by ``+`` for a mixture, such as
            ``"gaussian_noise+rain"``.
        severity: least and greatest, in [0, 1]; each degradation's is drawn evenly from between.

    Raises:
        ConfigError: a task names no degradation or is there twice, or the severities are no such
            range.
    """

    def __init__(
        self,
        photos: CropSampler,
        tasks: Sequence[str] = tuple(DEGRADATIONS),
        severity: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        check_tasks(tasks)
        if not 0 <= severity[0] <= severity[1] <= 1:
            raise ConfigError(f"severity={severity}: expected least and greatest in [0, 1].")
        self.photos, self.tasks, self.severity = photos, tuple(tasks), severity
        self.mediums = 0

    def draw(self, task: str, side: int, generator: torch.Generator) -> Drawn:
        """Draw a crop and degrade it as ``task`` says."""
        low, high = self.severity
        names = task.split("+")
        drawn = (low + (high - low) * fractions((len(names),), generator)).tolist()
        severities = dict(zip(names, drawn, strict=True))
        clean = self.photos.draw(1, side, generator)
        degraded = as_file(mix(clean, severities, generator))
        known = degraded.new_zeros(len(FAMILIES))
        for name, value in severities.items():
            column = FAMILIES.index(FAMILY_OF[name])
            known[column] = max(float(known[column]), value)
        return Drawn(degraded[0], clean[0], known)

    def settings(self) -> dict[str, Any]:
        """Return the severities, and a hash of the photographs."""
        return {
            "severity": [float(bound) for bound in self.severity],
            "photographs": photos_digest(self.photos),
        }


class PairFiles:
    """Pairs of files, such as :func:`~perceive_adapter.data.pairs.find_pairs` finds.

    Decoded pairs are kept in memory as long as they fit into a gigabyte in each process.

    Args:
        pairs: their groups are the tasks, ``pairs`` where a group has no name.
        broken: what to do with a file that turns out to be cut short when it is read: raise an
            error that names it, or warn and take the next pair of its task.
        mediums: whether to read the pairs' half-restored images.

    Raises:
        ConfigError: there is no pair.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        broken: Literal["raise", "skip"] = "raise",
        mediums: bool = False,
    ) -> None:
        if not pairs:
            raise ConfigError("got no pairs to draw crops from: give at least one.")
        self.broken = broken
        self.mediums = max(len(pair.mediums) for pair in pairs) if mediums else 0
        self.skipped: set[Pair] = set()
        self._pairs: dict[str, list[Pair]] = {}
        for pair in pairs:
            self._pairs.setdefault(pair.group or "pairs", []).append(pair)
        self._kept: dict[Pair, list[Tensor | None]] = {}
        self._room = _CACHE

    @property
    def tasks(self) -> tuple[str, ...]:
        """The groups of the pairs."""
        return tuple(self._pairs)

    def draw(self, task: str, side: int, generator: torch.Generator) -> Drawn:
        """Draw a crop of a pair; a smaller image is continued by its mirror images.

        Raises:
            ImageError: a file is cut short, and is not to be skipped, or all of the task's are.
        """
        pairs = self._pairs[task]
        images = self._read(pairs, integer_below(len(pairs), generator))
        there = [mirrored_to(image, side) for image in images if image is not None]
        top, left = (integer_below(have - side + 1, generator) for have in there[0].shape[1:])
        parts = torch.stack([image[:, top : top + side, left : left + side] for image in there])
        if integer_below(2, generator):
            parts = parts.flip(3)
        crops = iter(parts.float().div(255))
        missing = torch.full_like(parts[0], torch.nan, dtype=torch.float32)
        degraded, target, *mediums = (missing if image is None else next(crops) for image in images)
        unknown = missing.new_full((len(FAMILIES),), torch.nan)
        return Drawn(degraded, target, unknown, torch.stack(mediums) if mediums else None)

    def settings(self) -> dict[str, Any]:
        """Return how many pairs each task has; their files are not read for it."""
        return {"pairs": {task: len(pairs) for task, pairs in self._pairs.items()}}

    def _read(self, pairs: Sequence[Pair], start: int) -> list[Tensor | None]:
        for offset in range(len(pairs)):
            pair = pairs[(start + offset) % len(pairs)]
            if pair in self.skipped:
                continue
            try:
                return self._decoded(pair)
            except ImageError as error:
                if self.broken == "raise":
                    raise ImageError(
                        f"{error}. Leave such pairs out and go on with this run "
                        '(broken="skip", or --broken skip), or mend or remove the files, which '
                        "makes another run."
                    ) from error
                self.skipped.add(pair)
                warn(f"skipped a pair: {error}")
        raise ImageError(f"none of the {len(pairs)} pairs of a task can be read: mend its files.")

    def _decoded(self, pair: Pair) -> list[Tensor | None]:
        """Degraded image, target, and half-restored ones, if they are wanted."""
        if pair in self._kept:
            return self._kept[pair]
        degraded, target = read_pair(pair)
        mediums = read_mediums(pair, target) if self.mediums else []
        images = [degraded, target, *mediums]
        size = sum(image.numel() for image in images if image is not None)
        if size <= self._room:
            self._room -= size
            self._kept[pair] = images
        return images


class RestorationSample(NamedTuple):
    """One sample, or a batch of them with a first dimension more.

    Args:
        context: (3, S, S) in [0, 1], the degraded image as it is perceived.
        degraded: (3, P, P), the part of it that is restored.
        target: (3, P, P).
        task: (), column of the data's ``tasks``.
        severity: (D,) of each of ``FAMILIES``, NaN where it is unknown.
        mediums: (M, 3, P, P), the same part, half restored by others; NaN where one is missing.
    """

    context: Tensor
    degraded: Tensor
    target: Tensor
    task: Tensor
    severity: Tensor
    mediums: Tensor


class RestorationData(Dataset[RestorationSample]):
    """An endless row of samples; the sample at an index is the same in every run and process.

    Processes that compute on other numbers of threads add in another order, by which a value may
    be rounded to its neighbour among the 256: a run that is to end with the same bits keeps its
    number of workers.

    Args:
        sources: where the tasks come from.
        context: side in pixels of the crops that are perceived.
        patch: side in pixels of the part of them that is restored, at most ``context``.
        ratios: how often each task is drawn, relative to the others, by its name; 1 where nothing
            is said, 0 leaves it out.
        seed: of everything random.

    Raises:
        ConfigError: two sources have a task of one name, a ratio is of none, negative, or leaves no
            task, or the sides do not fit.

    Example:
        >>> from perceive_adapter.data.samples import CropSampler
        >>> photos = CropSampler([torch.arange(3 * 64 * 64).view(3, 64, 64).byte()])
        >>> data = RestorationData([CleanPhotos(photos, ["rain", "haze"])], context=32, patch=16)
        >>> data.tasks, data[7].degraded.shape
        (('rain', 'haze'), torch.Size([3, 16, 16]))
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        context: int,
        patch: int,
        ratios: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 < patch <= context:
            raise ConfigError(
                f"got patch={patch} and context={context}: expected a patch above 0 that fits into "
                "the context."
            )
        self._source_of: dict[str, Source] = {}
        for source in sources:
            for task in source.tasks:
                if task in self._source_of:
                    raise ConfigError(f"two sources have a task {task!r}: rename or leave out one.")
                self._source_of[task] = source
        self.sources, self.tasks = tuple(sources), tuple(self._source_of)
        self.mediums = max((source.mediums for source in sources), default=0)
        self.context, self.patch, self.seed = context, patch, seed
        self.ratios = dict(ratios or {})
        self._bounds = _shares(self.tasks, ratios or {}).cumsum(0)

    def __getitem__(self, index: int) -> RestorationSample:
        """Draw the sample at ``index``."""
        # The golden ratio's multiples fill [0, 1) evenly: every batch has each task's share.
        place = (index + 0.5) * _GOLDEN % 1
        column = int(torch.searchsorted(self._bounds, place, right=True))
        return self.draw(min(column, len(self.tasks) - 1), self._generator(index))

    def draw(self, column: int, generator: torch.Generator) -> RestorationSample:
        """Draw a sample of the task in this column."""
        task = self.tasks[column]
        drawn = self._source_of[task].draw(task, self.context, generator)
        top, left = (integer_below(self.context - self.patch + 1, generator) for _ in range(2))
        window = (..., slice(top, top + self.patch), slice(left, left + self.patch))
        shape = (self.mediums, 3, self.patch, self.patch)
        mediums = drawn.degraded.new_full(shape, torch.nan)
        if drawn.mediums is not None:
            mediums[: len(drawn.mediums)] = drawn.mediums[window]
        return RestorationSample(
            drawn.degraded,
            drawn.degraded[window],
            drawn.target[window],
            torch.tensor(column, device="cpu"),
            drawn.severity,
            mediums,
        )

    def settings(self) -> dict[str, Any]:
        """Return what decides the samples, besides the content of pairs."""
        names = ("tasks", "context", "patch", "ratios", "seed", "mediums")
        sources = {str(index): source.settings() for index, source in enumerate(self.sources)}
        return {name: getattr(self, name) for name in names} | {"sources": sources}

    def probe(self, each: int) -> RestorationSample:
        """Return a fixed batch of ``each`` samples of every task that is drawn, task by task."""
        shares = self._bounds.diff(prepend=self._bounds.new_zeros(1))
        drawn = [column for column, share in enumerate(shares) if share]
        samples = [
            self.draw(column, self._generator(-1 - index))
            for index, column in enumerate(column for column in drawn for _ in range(each))
        ]
        return RestorationSample(*map(torch.stack, zip(*samples, strict=True)))

    def _generator(self, index: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * _SEEDS + int(index)) % 2**32)


def _shares(tasks: Sequence[str], ratios: Mapping[str, float]) -> Tensor:
    if unknown := [name for name in ratios if name not in tasks]:
        raise ConfigError(
            f"ratios of {', '.join(unknown)}, which is no task: the tasks are {', '.join(tasks)}."
        )
    values = [float(ratios.get(task, 1.0)) for task in tasks]
    if not values or min(values) < 0 or not 0 < sum(values) < float("inf"):
        raise ConfigError(
            f"the ratios {dict(zip(tasks, values, strict=True))} cannot be drawn by: expected "
            "numbers of 0 or more, one of them above 0."
        )
    return torch.tensor(values, dtype=torch.float64, device="cpu") / sum(values)
