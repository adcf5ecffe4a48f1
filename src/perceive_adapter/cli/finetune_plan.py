"""What a run of ``finetune`` is: what it draws, its recipe, and what decides its weights."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from perceive_adapter.cli.options import check_falls
from perceive_adapter.errors import ConfigError

if TYPE_CHECKING:
    from perceive_adapter.cli.finetune_data import TrainingFiles
    from perceive_adapter.data.restoration import RestorationData
    from perceive_adapter.injection.model import PerceiveModel
    from perceive_adapter.training.mediums import MediumSource
    from perceive_adapter.training.stage2 import Stage2

__all__ = ["make_data", "make_recipe", "options_of"]


def make_data(found: TrainingFiles, arguments: Namespace) -> RestorationData:
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

    check_falls(arguments.learning_rate, arguments.final_learning_rate)
    schedule = replace(
        ADAPTER.schedule.with_steps(arguments.steps),
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
    arguments: Namespace,
    recipe: Stage2,
    found: TrainingFiles,
    model: PerceiveModel,
    mediums: Sequence[MediumSource],
    precision: str,
) -> dict[str, Any]:
    """What decides the weights: a run with other values is another run.

    The precision is accelerate's, which may come from its configuration or the environment.
    """
    from perceive_adapter.weights import fingerprint

    names = ["rank", "treat", "tasks", "ratios", "context", "patch", "seed", "channels_last"]
    adapter = None
    if arguments.adapter is not None:
        treats = model.injector.config.treats
        adapter = {"weights": fingerprint(model.injector), "treats": treats and list(treats)}
    return {
        **{name: getattr(arguments, name) for name in names},
        "precision": precision,
        "adapter": adapter,
        "mediums": [one if isinstance(one, str) else fingerprint(one) for one in mediums],
        "recipe": asdict(recipe),
        "files": found.digest,
        "backbone": fingerprint(model.backbone),
        "perceiver": model.perceiver_fingerprint,
    }
