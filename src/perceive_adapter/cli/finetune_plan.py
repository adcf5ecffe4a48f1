"""What a run of ``finetune`` is: its data, its recipe, and the options that decide its weights."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from perceive_adapter.errors import ConfigError

if TYPE_CHECKING:
    from perceive_adapter.data.pairs import Pair
    from perceive_adapter.data.restoration import RestorationData
    from perceive_adapter.evaluation.cases import Case
    from perceive_adapter.training.stage2 import Stage2

__all__ = ["Found", "find_data", "hold_out", "make_data", "make_recipe", "options_of"]

T = TypeVar("T")

_FEWEST = 5  # files of a kind from which some are set aside
_LARGEST = 2000  # pixels of the longest side of a clean photograph


class Found(NamedTuple):
    """The files of all folders: to train on, and set aside.

    Args:
        pairs: pairs of files to train on.
        photos: clean photographs to degrade.
        held_pairs: pairs that training never sees.
        held_photos: photographs that training never sees.
        skipped: what is wrong with each file that cannot be used.
    """

    pairs: tuple[Pair, ...]
    photos: tuple[Path, ...]
    held_pairs: tuple[Pair, ...]
    held_photos: tuple[Path, ...]
    skipped: tuple[str, ...]

    def held_cases(self, tasks: Sequence[str]) -> list[Case]:
        """Return what to measure on at the end."""
        from perceive_adapter.evaluation.cases import degraded_cases, pair_cases

        return [*pair_cases(self.held_pairs), *degraded_cases(self.held_photos, tasks)]


def find_data(folders: Sequence[Path], broken: str) -> Found:
    """Search folders, each of which holds sets of pairs or else clean photographs.

    Raises:
        ConfigError: a folder holds neither, or does not exist.
        ImageError: a file of a pair cannot be used, and is not to be skipped.
    """
    from perceive_adapter.data.pairs import find_pairs, holds_pairs
    from perceive_adapter.data.samples import find_images

    pairs: list[Pair] = []
    photos: list[Path] = []
    skipped: list[str] = []
    for folder in folders:
        if holds_pairs(folder):
            found = find_pairs(folder, broken="skip" if broken == "skip" else "raise")
            pairs += found.pairs
            skipped += found.skipped
        else:
            photos += find_images(folder)
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.group, []).append(pair)
    split = [hold_out(group) for group in groups.values()]
    trained, held = hold_out(photos)
    return Found(
        tuple(pair for kept, _ in split for pair in kept),
        tuple(trained),
        tuple(pair for _, apart in split for pair in apart),
        tuple(held),
        tuple(skipped),
    )


def hold_out(items: Sequence[T]) -> tuple[list[T], list[T]]:
    """Set one in ten aside, and one of five to nine; none of fewer.

    Example:
        >>> hold_out(range(5)), hold_out("abcd")
        (([0, 1, 2, 3], [4]), (['a', 'b', 'c', 'd'], []))
    """
    step = min(10, len(items))
    if len(items) < _FEWEST:
        return list(items), []
    apart = set(range(step - 1, len(items), step))
    kept = [item for index, item in enumerate(items) if index not in apart]
    return kept, [items[index] for index in sorted(apart)]


def make_data(found: Found, arguments: Namespace) -> RestorationData:
    """Make what training draws from.

    Raises:
        ConfigError: tasks are named and there is no photograph to degrade, or other options that
            the data refuses.
    """
    from perceive_adapter.data.restoration import CleanPhotos, PairFiles, RestorationData, Source
    from perceive_adapter.data.samples import CropSampler, load_photos

    sources: list[Source] = []
    if found.pairs:
        sources.append(PairFiles(found.pairs, broken=arguments.broken))
    if found.photos:
        photos = CropSampler(load_photos(found.photos, largest=_LARGEST))
        sources.append(CleanPhotos(photos, arguments.tasks))
    return RestorationData(
        sources,
        context=arguments.context,
        patch=arguments.patch,
        ratios=_ratios(arguments.ratios),
        seed=arguments.seed,
    )


def _ratios(given: Sequence[str]) -> dict[str, float]:
    ratios = {}
    for text in given:
        task, _, value = text.rpartition("=")
        try:
            ratios[task] = float(value)
        except ValueError:
            raise ConfigError(
                f"--ratios {text}: expected TASK=NUMBER, such as rain=2 or derain=120."
            ) from None
    return ratios


def make_recipe(arguments: Namespace) -> Stage2:
    """Put the options into the recipe.

    Raises:
        ConfigError: they contradict each other.
    """
    from perceive_adapter.losses import ObjectiveWeights
    from perceive_adapter.training.stage2 import ADAPTER

    if arguments.final_learning_rate > arguments.learning_rate:
        raise ConfigError(
            f"--final-learning-rate {arguments.final_learning_rate:g} is above --learning-rate "
            f"{arguments.learning_rate:g}: expected it to fall. Give both."
        )
    schedule = replace(
        ADAPTER.schedule.lasting(arguments.steps),
        learning_rate=arguments.learning_rate,
        final_learning_rate=arguments.final_learning_rate,
    )
    weights = ObjectiveWeights(
        contrastive=arguments.contrastive,
        clip_aware=arguments.clip_aware,
        difficulty_adaptive=arguments.difficulty_adaptive,
    )
    names = ("batch", "accumulate", "ema")
    given = {name: getattr(arguments, name) for name in names}
    return replace(ADAPTER, schedule=schedule, weights=weights, **given)


def options_of(arguments: Namespace, recipe: Stage2, found: Found) -> dict[str, Any]:
    """What decides the weights: a run with other values is another run."""
    names = ["backbone", "adapter", "perceiver", "rank", "treat", "tasks", "ratios", "context"]
    names += ["patch", "seed", "precision", "channels_last"]
    files = [str(path) for pair in found.pairs for path in (pair.degraded, pair.target)]
    return {
        **{name: getattr(arguments, name) for name in names},
        "recipe": asdict(recipe),
        "files": [*files, *map(str, found.photos)],
    }
