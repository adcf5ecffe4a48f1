"""What a run of ``train-perceiver`` is: its recipes, and what a model card says of them."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from perceive_adapter.cli.options import check_falls
from perceive_adapter.errors import ConfigError

if TYPE_CHECKING:
    from perceive_adapter.perceiver import QualityPerceiver
    from perceive_adapter.training.loop import Schedule
    from perceive_adapter.training.runs import Split
    from perceive_adapter.training.stage1 import Stage1

__all__ = ["Plan", "facts_of", "make_plan", "options_of"]

_RESTORED = ("restored", "mixed")  # media that restorers make


class Plan(NamedTuple):
    """What decides the weights, besides the photographs."""

    stage1: Stage1
    restorers: Schedule
    pretrain: Schedule | None
    start: QualityPerceiver | None
    """Whose towers are trained further, None for towers from scratch."""


def facts_of(arguments: Namespace, plan: Plan, split: Split) -> dict[str, float | str]:
    """Say how the perceiver came about, for the model card."""
    import torch

    from perceive_adapter._version import __version__

    facts: dict[str, float | str] = {"photographs": arguments.note} if arguments.note else {}
    facts |= {
        "photographs trained on": len(split.trained),
        "photographs audited": len(split.audit),
        "medium images": arguments.medium,
        "stage 1": f"{_summary(plan.stage1.schedule)}, {plan.stage1.scenes} scenes a step, "
        f"crops of {', '.join(map(str, plan.stage1.sides))} px"
        + (f", graded images at weight {plan.stage1.graded:g}" if plan.stage1.graded else ""),
        "seed": arguments.seed,
        "versions": f"perceive_adapter {__version__}, torch {torch.__version__}",
    }
    if plan.pretrain is not None:
        facts["towers"] = f"{_summary(plan.pretrain)}, contrastively, {_origin(plan.start)}"
    return facts


def _origin(start: QualityPerceiver | None) -> str:
    if start is None:
        return "from scratch"
    return f"from those of the perceiver with the fingerprint {start.fingerprint()[:8]}"


def _summary(schedule: Schedule) -> str:
    rates = f"{schedule.learning_rate:g} to {schedule.final_learning_rate:g}"
    return f"{schedule.steps} steps of AdamW, learning rate {rates}"


def make_plan(arguments: Namespace) -> Plan:
    """Put the options into the recipes, and load the perceiver to start from.

    Raises:
        ConfigError: they contradict each other.
        CheckpointError: the perceiver to start from is missing or damaged.
    """
    from perceive_adapter.perceiver import QualityPerceiver
    from perceive_adapter.perceiver.bundled import BUNDLED, PERCEIVE_TINY
    from perceive_adapter.training import pretrain, restorers
    from perceive_adapter.training.stage1 import PAPER, TINY

    tiny = arguments.clip == PERCEIVE_TINY
    if arguments.pretrain_steps and not tiny:
        raise ConfigError(
            f"--pretrain-steps is for --clip {PERCEIVE_TINY}: {arguments.clip} comes with weights. "
            "Leave it out."
        )
    if arguments.start_from is not None and not tiny:
        raise ConfigError(
            f"--start-from is for --clip {PERCEIVE_TINY}, whose towers are trained: those of "
            f"{arguments.clip} are not. Leave it out."
        )
    if arguments.start_from not in (None, *BUNDLED) and arguments.audit_data is None:
        raise ConfigError(
            f"--start-from {arguments.start_from} without --audit-data: what is set aside of "
            "--data may be what that run was trained on. Name photographs that it never saw."
        )
    if arguments.workers and not tiny:
        raise ConfigError(
            f"--workers is for --clip {PERCEIVE_TINY}, whose towers are trained: those of "
            f"{arguments.clip} are not. Leave it out."
        )
    if arguments.restorer_steps and arguments.medium not in _RESTORED:
        raise ConfigError(
            f"--restorer-steps is for --medium {' or '.join(_RESTORED)}: --medium "
            f"{arguments.medium} needs no restorers. Leave it out."
        )
    recipe = TINY if tiny else PAPER
    names = {name: getattr(arguments, name) for name in ("learning_rate", "final_learning_rate")}
    schedule = replace(
        _lasting(recipe.schedule, arguments.steps),
        **{name: value for name, value in names.items() if value is not None},
    )
    check_falls(schedule.learning_rate, schedule.final_learning_rate)
    stage1 = replace(
        recipe,
        schedule=schedule,
        scenes=arguments.scenes or recipe.scenes,
        sides=tuple(arguments.sides or recipe.sides),
        seed=arguments.seed,
    )
    start, towers = None, pretrain.FROM_SCRATCH
    if arguments.start_from is not None:
        start = QualityPerceiver.from_pretrained(arguments.start_from)
        towers = pretrain.FROM_OTHERS
    return Plan(
        stage1,
        _lasting(restorers.SCHEDULE, arguments.restorer_steps),
        _lasting(towers, arguments.pretrain_steps) if tiny else None,
        start,
    )


def _lasting(schedule: Schedule, steps: int | None) -> Schedule:
    return schedule if steps is None else schedule.with_steps(steps)


def options_of(arguments: Namespace, plan: Plan, photos: str) -> dict[str, Any]:
    """What decides the weights: a run with other values is another run."""
    tiny = plan.pretrain is not None
    return {
        "clip": arguments.clip,
        "pretrained": None if tiny else arguments.pretrained,
        "start": plan.start.fingerprint() if plan.start is not None else None,
        "medium": arguments.medium,
        "words": arguments.words,
        "context_length": arguments.context_length,
        "heads": arguments.heads,
        "stage1": asdict(plan.stage1),
        "restorers": asdict(plan.restorers) if arguments.medium in _RESTORED else None,
        "pretrain": asdict(plan.pretrain) if plan.pretrain is not None else None,
        "photographs": photos,
    }
