"""Train the prompt modules of a wrapped backbone on a mix of degradations."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from images import random_crops
from torch import Tensor
from tqdm import tqdm

from perceive_adapter import PerceiveModel
from perceive_adapter.data import DEGRADATIONS, degrade
from perceive_adapter.losses import RestorationObjective

NAMES = tuple(DEGRADATIONS)
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Batch:
    """Two neighbouring crops of each damaged photograph: what ails the one ails the other."""

    target: Tensor
    degraded: Tensor
    neighbour: Tensor
    labels: Tensor


def draw_batch(
    photos: Sequence[Tensor], count: int, side: int, generator: torch.Generator
) -> Batch:
    """Every degradation gets its equal share, every sample its own severity."""
    labels = torch.arange(count) % len(NAMES)
    clean = random_crops(photos, count, (side, 2 * side), generator)
    severity = torch.rand(count, generator=generator)
    degraded = degrade(clean, [NAMES[label] for label in labels], severity, generator)
    left, right = degraded.chunk(2, dim=-1)
    return Batch(clean[..., :side], left, right, labels)


def fine_tune(
    model: PerceiveModel,
    photos: Sequence[Tensor],
    steps: int,
    batch: int,
    crop_sides: Sequence[int],
    seed: int,
) -> None:
    """Adam with a one-cycle learning rate; crops of several sizes, as images come in many."""
    generator = torch.Generator().manual_seed(seed)
    objective = RestorationObjective()
    parameters = list(model.trainable_parameters())
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    model.train()
    bar = tqdm(range(steps), unit="step", ncols=80)
    average = 0.0
    for step in bar:
        side = crop_sides[step % len(crop_sides)]
        sample = draw_batch(photos, batch, side, generator)
        perception = model.perceive(sample.degraded)
        terms = objective(
            model(sample.degraded, perception=perception),
            sample.target,
            degraded=sample.degraded,
            anchor=perception.compact,
            positive=model.perceive(sample.neighbour).compact,
            labels=sample.labels,
        )
        optimizer.zero_grad()
        terms.total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average += (terms.l1.item() - average) / min(step + 1, 50)
        bar.set_postfix_str(f"L1 {average:.3f}", refresh=False)
