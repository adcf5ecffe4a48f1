"""Train a wrapped backbone on a mix of degradations: first to perceive, then to restore."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from images import random_crops
from torch import Tensor
from tqdm import tqdm

from perceive_adapter import PerceiveModel
from perceive_adapter.data import degrade
from perceive_adapter.losses import (
    DegradationContrastiveLoss,
    ObjectiveWeights,
    RestorationObjective,
)

NAMES = ("gaussian_noise", "rain", "haze", "low_light")


@dataclass(frozen=True)
class Stage:
    """How long a stage of training lasts, and on how much at a time."""

    steps: int
    batch: int
    learning_rate: float


@dataclass(frozen=True)
class Batch:
    """Two neighbouring crops of each damaged photograph: what ails the one ails the other."""

    target: Tensor
    degraded: Tensor
    neighbour: Tensor
    labels: Tensor


def draw_batches(
    photos: Sequence[Tensor], sides: Sequence[int], stage: Stage, generator: torch.Generator
) -> Iterator[Batch]:
    """An equal share of every degradation; crops of several sizes, as images come in many."""
    labels = torch.arange(stage.batch) % len(NAMES)
    names = [NAMES[label] for label in labels]
    for step in range(stage.steps):
        side = sides[step % len(sides)]
        clean = random_crops(photos, stage.batch, (side, 2 * side), generator)
        severity = torch.rand(stage.batch, generator=generator)
        degraded, neighbour = degrade(clean, names, severity, generator).chunk(2, dim=-1)
        yield Batch(clean[..., :side], degraded, neighbour, labels)


def learn_to_perceive(model: PerceiveModel, batches: Iterator[Batch], stage: Stage) -> None:
    """Tell degradations apart before anything depends on it; the backbone need not run."""
    objective = DegradationContrastiveLoss()

    def loss(batch: Batch) -> Tensor:
        pair = model.perceive(torch.cat([batch.degraded, batch.neighbour])).compact
        return objective(*pair.chunk(2), batch.labels)

    train(model, batches, stage, loss, title="perceive")


def learn_to_restore(
    model: PerceiveModel, batches: Iterator[Batch], stage: Stage, weights: ObjectiveWeights
) -> None:
    """Train everything that was added, perception included."""
    objective = RestorationObjective(weights)

    def loss(batch: Batch) -> Tensor:
        perception = model.perceive(batch.degraded)
        terms = objective(
            model(batch.degraded, perception=perception),
            batch.target,
            degraded=batch.degraded,
            anchor=perception.compact,
            positive=model.perceive(batch.neighbour).compact,
            labels=batch.labels,
        )
        return terms.total

    train(model, batches, stage, loss, title=" restore")


def train(
    model: PerceiveModel,
    batches: Iterator[Batch],
    stage: Stage,
    loss_of: Callable[[Batch], Tensor],
    title: str,
) -> None:
    """Adam with a one-cycle learning rate, behind a progress bar."""
    parameters = list(model.trainable_parameters())
    optimizer = torch.optim.Adam(parameters)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, stage.learning_rate, total_steps=stage.steps
    )
    bar = tqdm(batches, desc=title, total=stage.steps, unit="step", ncols=80)
    average = 0.0
    for step, batch in enumerate(bar, start=1):
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average += (loss.item() - average) / min(step, 50)
        bar.set_postfix_str(f"loss {average:.3f}", refresh=False)
