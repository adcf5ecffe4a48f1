"""A network, photographs and a recipe small enough to train on in a second.

Run as a script, it trains as told on the command line, in as many processes as it was launched in,
and writes each step's loss.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from small import photos
from torch import Tensor, nn

from perceive_adapter import AdapterConfig, PerceiveModel, wrap
from perceive_adapter.data.restoration import CleanPhotos, RestorationData
from perceive_adapter.data.samples import CropSampler
from perceive_adapter.losses import (
    DifficultyAdaptiveLoss,
    FilterPyramid,
    ObjectiveTerms,
    ObjectiveWeights,
    RestorationObjective,
)
from perceive_adapter.training.loop import Schedule
from perceive_adapter.training.stage2 import Stage2, train_restoration

L1 = ObjectiveWeights(contrastive=0.0, clip_aware=0.0, difficulty_adaptive=0.0)
FULL = ObjectiveWeights(clip_aware=0.0)


class Net(nn.Module):
    """Gives back the image, a little off; one level and three dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1))
        self.tail = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        features = self.head(image)
        return image + 0.1 * self.tail(features + self.body(features))


def model(**options: Any) -> PerceiveModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = {"perceiver": False, "config": AdapterConfig(rank=4), **options}
        return wrap(Net(), **settings)


def data(*tasks: str, **options: Any) -> RestorationData:
    source = CleanPhotos(CropSampler(photos()), tasks or ("rain", "low_light"))
    return RestorationData([source], **{"context": 32, "patch": 24, **options})


def recipe(steps: int = 12, **options: Any) -> Stage2:
    schedule = Schedule(steps, 1e-2, 1e-4, warmup=2, weight_decay=1e-4)
    return Stage2(schedule, **{"batch": 4, "weights": L1, "probe": 2, "probe_every": 5, **options})


class Stopped(Exception):
    """Stands for a kill."""


class Recording(RestorationObjective):
    """Remembers every loss, and dies at a step, if told so."""

    def __init__(self, weights: ObjectiveWeights, dies_at: int = -1) -> None:
        adaptive = DifficultyAdaptiveLoss(FilterPyramid()) if weights.difficulty_adaptive else None
        super().__init__(weights, difficulty_adaptive=adaptive)
        self.losses: list[Tensor] = []
        self.dies_at = dies_at

    def forward(self, *images: Tensor, **options: Any) -> ObjectiveTerms:
        if len(self.losses) == self.dies_at:
            raise Stopped
        terms = super().forward(*images, **options)
        self.losses.append(terms.total.detach())
        return terms


def main() -> None:
    told = json.loads(sys.argv[1])
    out = Path(told["out"])
    accelerator = Accelerator(cpu=True)
    objective = Recording(FULL, told.get("dies_at", -1))
    trained = model(**told.get("model", {}))
    try:
        train_restoration(
            trained,
            data(),
            recipe=recipe(**{"weights": FULL, **told.get("recipe", {})}),
            objective=objective,
            accelerator=accelerator,
            checkpoint=out / "state.pt",
            every=told.get("every", 1000),
        )
    except Stopped:
        accelerator.wait_for_everyone()  # none leaves while another still talks to it
        accelerator.end_training()
        return
    losses = accelerator.reduce(torch.stack(objective.losses), "mean")
    if accelerator.is_main_process:
        (out / "losses.json").write_text(json.dumps(losses.tolist()))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
