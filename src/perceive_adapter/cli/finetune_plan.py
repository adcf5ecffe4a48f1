"""What a run of ``finetune`` is: its data, its recipe, and the options that decide its weights."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from perceive_adapter.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from torch import Tensor

    from perceive_adapter.data.pairs import Pair
    from perceive_adapter.data.restoration import RestorationData
    from perceive_adapter.evaluation.cases import Case
    from perceive_adapter.injection.model import PerceiveModel
    from perceive_adapter.training.stage2 import Stage2

__all__ = ["Found", "find_data", "hold_out", "make_data", "make_recipe", "options_of"]

T = TypeVar("T")

_FEWEST = 5  # files of a kind from which some are set aside
_LARGEST = 1200  # pixels of the longest side of a clean photograph in training
_MEASURED = 40  # images of a task that are measured at the end


class Found(NamedTuple):
    """What all folders hold: to train on, and set aside.

    Args:
        pairs: pairs of files to train on; their groups are the tasks.
        photos: clean photographs to degrade, (3, H, W) uint8.
        held_pairs: pairs that training never sees, nor their targets.
        held_photos: files of photographs that training never sees.
        digest: of the names of all files.
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
        pairs = [pair for group in groups.values() for pair in group[:_MEASURED]]
        photos = self.held_photos[: _MEASURED // 2]  # each of them twice, mild and severe
        return [*pair_cases(pairs), *(degraded_cases(photos, tasks) if self.photos else ())]


def find_data(folders: Sequence[Path], broken: str) -> Found:
    """Search folders, each of which holds sets of pairs or else clean photographs.

    Raises:
        ConfigError: a folder holds neither, or does not exist.
        ImageError: a file cannot be used, and is not to be skipped.
    """
    from perceive_adapter.data.pairs import find_pairs, holds_pairs
    from perceive_adapter.data.samples import find_images

    skip = broken == "skip"
    pairs: list[Pair] = []
    paths: list[Path] = []
    skipped: list[str] = []
    for folder in folders:
        if holds_pairs(folder):
            found = find_pairs(folder, broken="skip" if skip else "raise")
            pairs += [replace(pair, group=_task(pair, folder)) for pair in found.pairs]
            skipped += found.skipped
        else:
            paths += find_images(folder)
    trained, held = _split_pairs(pairs)
    kept, apart = hold_out(paths)
    photos = _read(kept, skip, skipped)
    held_photos = [path for path in apart if _read([path], skip, skipped)]
    held_pairs = [pair for pair in held if _readable(pair, skip, skipped)]
    names = [str(file) for pair in pairs for file in (pair.degraded, pair.target, *pair.mediums)]
    digest = hashlib.sha256("\n".join([*names, *map(str, paths)]).encode()).hexdigest()
    return Found(
        tuple(trained),
        tuple(photos),
        tuple(held_pairs),
        tuple(held_photos),
        digest,
        tuple(skipped),
    )


def _task(pair: Pair, folder: Path) -> str:
    """The folder below the one that was given, or that one's own name: GoPro's scenes are one."""
    return pair.group.split("/")[0] or folder.resolve().name


def _split_pairs(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Set targets aside, with all that was degraded of them."""
    tasks: dict[str, list[Pair]] = {}
    for pair in pairs:
        tasks.setdefault(pair.group, []).append(pair)
    trained, held = [], []
    for found in tasks.values():
        apart = set(hold_out(list(dict.fromkeys(pair.target for pair in found)))[1])
        trained += [pair for pair in found if pair.target not in apart]
        held += [pair for pair in found if pair.target in apart]
    return trained, held


def _read(paths: Sequence[Path], skip: bool, skipped: list[str]) -> list[Tensor]:
    from perceive_adapter.data.samples import load_photos

    photos = []
    for path in paths:
        try:
            photos += load_photos([path], largest=_LARGEST)
        except ImageError as error:
            if not skip:
                raise ImageError(f"{error} Or leave such files out with --broken skip.") from error
            skipped.append(str(error))
    return photos


def _readable(pair: Pair, skip: bool, skipped: list[str]) -> bool:
    from perceive_adapter.data.pairs import read_pair

    try:
        read_pair(pair)
    except ImageError as error:
        if not skip:
            raise
        skipped.append(str(error))
        return False
    return True


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
        ConfigError: the data refuses tasks, ratios or sides.
    """
    from perceive_adapter.data.restoration import CleanPhotos, PairFiles, RestorationData, Source
    from perceive_adapter.data.samples import CropSampler

    sources: list[Source] = []
    if found.pairs:
        mediums = arguments.difficulty_adaptive > 0
        sources.append(PairFiles(found.pairs, broken=arguments.broken, mediums=mediums))
    if found.photos:
        sources.append(CleanPhotos(CropSampler(found.photos), arguments.tasks))
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


def options_of(
    arguments: Namespace, recipe: Stage2, found: Found, model: PerceiveModel
) -> dict[str, Any]:
    """What decides the weights: a run with other values is another run."""
    from perceive_adapter.injection.checkpoint import fingerprint

    names = ["rank", "adapter", "treat", "tasks", "ratios", "context", "patch", "seed"]
    names += ["mediums", "precision", "channels_last"]
    return {
        **{name: getattr(arguments, name) for name in names},
        "recipe": asdict(recipe),
        "files": found.digest,
        "backbone": fingerprint(model.backbone),
        "perceiver": model.perceiver.fingerprint() if model.perceiver is not None else None,
    }
