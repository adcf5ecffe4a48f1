"""Stage 1: train a perceiver's tier prompts, and its heads, on a frozen CLIP."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from perceive_adapter.data import FAMILIES
from perceive_adapter.data.contents import photos_digest
from perceive_adapter.data.samples import (
    CropSampler,
    as_stored,
    cut,
    degrade_each,
    draw_severities,
    integers,
    with_surroundings,
)
from perceive_adapter.data.triplets import Blend, Medium, Scene
from perceive_adapter.errors import ConfigError
from perceive_adapter.perceiver.quality import QualityPerceiver
from perceive_adapter.training.loop import Prefetcher, Schedule, seeded, train
from perceive_adapter.training.tiers import tier_shares
from perceive_adapter.weights import fingerprint

__all__ = ["PAPER", "TINY", "Stage1", "train_perceiver"]

_PAPER_SCHEDULE: Final = Schedule(steps=100_000, learning_rate=4e-5, final_learning_rate=1e-6)


@dataclass(frozen=True)
class Stage1:
    """The recipe of stage 1; the defaults are Perceive-IR's.

    Args:
        schedule: steps and learning rates.
        scenes: scenes in a batch, every tier of which is an image; a multiple of 8 gives each
            kind of degradation an equal quota.
        sides: of the crops in pixels, taken in turn.
        low: least severity of a low-tier image.
        graded: weight, 0 or more, of a second cross entropy, over images of every severity, whose
            right answer lies between two tiers
            (:func:`~perceive_adapter.training.tiers.tier_shares`). Triplets alone leave open what
            happens between the tiers, and the score jumps there. The paper has none.
        seed: of everything random.

    Raises:
        ConfigError: a number that cannot work.
    """

    schedule: Schedule = _PAPER_SCHEDULE
    scenes: int = 16
    sides: tuple[int, ...] = (224,)
    low: float = 0.5
    graded: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scenes < 1:
            raise ConfigError(f"scenes={self.scenes}: expected 1 or more.")
        if not self.sides or min(self.sides) < 1:
            raise ConfigError(f"sides={self.sides}: expected at least one, of 1 pixel or more.")
        if not 0 < self.low <= 1:
            raise ConfigError(f"low={self.low}: expected a severity above 0, and 1 at most.")
        if not 0 <= self.graded < math.inf:
            raise ConfigError(f"graded={self.graded}: expected a weight of 0 or more.")


PAPER: Final = Stage1()
TINY: Final = Stage1(
    Schedule(steps=1_000, learning_rate=1e-2, final_learning_rate=1e-4),
    sides=(64, 96, 128, 192),
    graded=0.3,
)
"""The recipe for ``perceive-tiny``."""


def train_perceiver(
    perceiver: QualityPerceiver,
    folds: Sequence[CropSampler],
    *,
    recipe: Stage1 = PAPER,
    mediums: Sequence[Medium] | None = None,
    checkpoint: Path | None = None,
    every: int = 500,
) -> None:
    """Train the prompts with the cross entropy over tiers, and the heads where there are any.

    Beside the triplets of the paper, images of every severity teach the heads, and with
    ``recipe.graded`` the prompts.

    Source: stage 1 of Perceive-IR (IEEE TIP 2025, https://arxiv.org/abs/2408.15994).

    Args:
        perceiver: its prompts and heads are trained in place and left frozen; its towers stay as
            they are.
        folds: crops of the two halves of the photographs.
        recipe: steps, batches and crops.
        mediums: what makes the images of the tiers between the lowest and the highest, one for
            each, from worse to better; None for blends that keep even shares of the damage.
        checkpoint: file to go on from after a kill.
        every: steps between two checkpoints.

    Raises:
        ConfigError: not two ``folds``, another number of ``mediums`` than tiers between the ends,
            or the heads tell other degradations than this package makes.
        CheckpointError: ``checkpoint`` is of another run.
    """
    between = len(perceiver.tiers) - 2
    if mediums is None:
        mediums = [Blend((between - i) / (between + 1)) for i in range(between)]
    _check(perceiver, folds, mediums)
    modules: dict[str, torch.nn.Module] = {"prompts": perceiver.prompts}
    if perceiver.heads is not None:
        modules["heads"] = perceiver.heads
    device = perceiver.prompts.context.device
    by_severity = perceiver.heads is not None or recipe.graded > 0

    def draw(step: int) -> tuple[Tensor, ...]:
        generator = seeded(recipe.seed, step)
        side = recipe.sides[step % len(recipe.sides)]
        scenes = draw_scenes(folds, with_surroundings(side), recipe, generator)
        triplets = draw_tiers(scenes, mediums, side, generator)
        if not by_severity:
            return triplets
        return *triplets, *draw_damaged(folds, recipe.scenes, side, generator)

    with _trainable(modules), Prefetcher(draw, recipe.schedule.steps) as prefetched:

        def loss_at(step: int) -> Tensor:
            images, tiers, *damaged = (part.to(device) for part in prefetched(step))
            with torch.no_grad():
                embedding = perceiver.embed(torch.cat([images, *damaged[:1]]))
            logits = perceiver.tier_logits(embedding)
            loss = F.cross_entropy(logits[: len(tiers)], tiers)
            if damaged:
                rest = slice(len(tiers), None)
                loss = loss + loss_by_severity(embedding[rest], logits[rest], damaged[1])
            return loss

        def loss_by_severity(embedding: Tensor, logits: Tensor, severity: Tensor) -> Tensor:
            shares = tier_shares(severity.amax(dim=1), len(perceiver.tiers))
            loss = recipe.graded * F.cross_entropy(logits, shares)
            if perceiver.heads is None:
                return loss
            return loss + perceiver.heads.loss(embedding, severity)

        train(
            modules,
            loss_at,
            recipe.schedule,
            settings=_settings(perceiver, folds, recipe, mediums) if checkpoint else None,
            checkpoint=checkpoint,
            every=every,
            title="stage 1",
        )


@contextmanager
def _trainable(modules: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    """Let modules train, and freeze them at the end, come what may."""
    try:
        for module in modules.values():
            module.requires_grad_(True)
        yield
    finally:
        for module in modules.values():
            module.requires_grad_(False)


def _settings(
    perceiver: QualityPerceiver,
    folds: Sequence[CropSampler],
    recipe: Stage1,
    mediums: Sequence[Medium],
) -> dict[str, Any]:
    """What decides the weights; of the prompts it is what they start from."""
    prompts = perceiver.prompts
    return {
        **asdict(recipe),
        "photographs": [photos_digest(fold) for fold in folds],
        "mediums": [_describe(medium) for medium in mediums],
        "towers": fingerprint(perceiver.towers),
        "prompts": fingerprint(prompts, {"context": prompts.initial}),
    }


def _describe(medium: Medium) -> str:
    """Name a medium with its numbers and texts, and those that it mixes; not its restorers."""
    values = getattr(medium, "__dict__", {}).items()
    parts = [f"{name}={value}" for name, value in values if isinstance(value, int | float | str)]
    parts += [_describe(part) for part in getattr(medium, "mediums", ())]
    return f"{type(medium).__qualname__}({', '.join(parts)})"


def _check(
    perceiver: QualityPerceiver, folds: Sequence[CropSampler], mediums: Sequence[Medium]
) -> None:
    if len(folds) != 2:
        raise ConfigError(f"got {len(folds)} folds: expected the two halves of the photographs.")
    between = len(perceiver.tiers) - 2
    if len(mediums) != between:
        raise ConfigError(
            f"got {len(mediums)} mediums for the tiers {perceiver.tiers}: expected {between}, one "
            "for each tier between the lowest and the highest."
        )
    if perceiver.degradations and perceiver.degradations != FAMILIES:
        raise ConfigError(
            f"the perceiver's heads tell {perceiver.degradations}, and training makes {FAMILIES}. "
            "Create it with degradations=perceive_adapter.data.FAMILIES, or with none."
        )


def draw_scenes(
    folds: Sequence[CropSampler], side: int, recipe: Stage1, generator: torch.Generator
) -> list[Scene]:
    """Draw scenes of the low tier, half of them from each fold, every kind as often."""
    kinds = draw_severities(2 * recipe.scenes, generator, low=recipe.low)
    damaged = [severities for severities in kinds if severities][: recipe.scenes]
    seeds = integers(0, 2**40, (recipe.scenes,), generator).tolist()
    crops = [fold.draw((recipe.scenes + 1) // 2, side, generator) for fold in folds]
    return [
        Scene(crops[index % 2][index // 2][None], severities, seeds[index], index % 2)
        for index, severities in enumerate(damaged)
    ]


def draw_damaged(
    folds: Sequence[CropSampler], count: int, side: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw damaged crops (N, 3, side, side) for the heads and their severities (N, D).

    Both folds give ``count``, since sides taken in turn would fall to one fold each.
    """
    whole = with_surroundings(side)
    photos = torch.cat([fold.draw(count, whole, generator) for fold in folds])
    samples = degrade_each(photos, draw_severities(len(photos), generator), generator)
    (degraded,) = cut((as_stored(samples.degraded, generator),), side, generator)
    return degraded, samples.family_severity


def draw_tiers(
    scenes: Sequence[Scene], mediums: Sequence[Medium], side: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Make a crop (N, 3, side, side) for every tier of every scene, and give the tiers (N,)."""
    degraded = [scene.degraded() for scene in scenes]
    tiers = [torch.cat(degraded)]
    for medium in mediums:
        pairs = zip(scenes, degraded, strict=True)
        tiers.append(torch.cat([medium(scene, image) for scene, image in pairs]))
    tiers.append(torch.cat([scene.clean for scene in scenes]))
    crops = cut([as_stored(tier, generator) for tier in tiers], side, generator)
    found = torch.cat(crops)
    return found, torch.arange(len(tiers), device=found.device).repeat_interleave(len(scenes))
