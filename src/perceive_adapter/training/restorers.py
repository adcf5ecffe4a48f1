"""Half-trained restorers, whose outputs are stage 1's medium images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceive_adapter.data.contents import photos_digest
from perceive_adapter.data.samples import (
    CropSampler,
    cut,
    degrade_each,
    draw_severities,
    with_surroundings,
)
from perceive_adapter.training.loop import Schedule, seeded, train

__all__ = ["SCHEDULE", "SmallRestorer", "train_restorers"]

SCHEDULE: Final = Schedule(steps=400, learning_rate=2e-3, final_learning_rate=1e-4, warmup=20)
_BATCH: Final = 16
_SIDE: Final = 64
_WIDTH: Final = 32
_BLOCKS: Final = 5


class SmallRestorer(nn.Module):
    """Residual blocks at half resolution, and a gain and an offset for the whole image.

    Untrained, it gives back the image.

    Shape:
        (B, 3, H, W) in [0, 1] to the same shape, any size; the result is not clamped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(12, _WIDTH, 3, padding=1)
        self.blocks = nn.ModuleList(_block(2 ** (index % 3)) for index in range(_BLOCKS))
        self.tail = nn.Conv2d(_WIDTH, 12, 3, padding=1)
        gain_and_offset = nn.Linear(_WIDTH, 6)
        self.light = nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.ReLU(), gain_and_offset)
        for parameter in (*self.tail.parameters(), *gain_and_offset.parameters()):
            nn.init.zeros_(parameter)  # what does nothing yet is the identity

    def forward(self, image: Tensor) -> Tensor:
        """Return restored images (B, 3, H, W)."""
        height, width = image.shape[-2:]
        padded = F.pad(image, (0, width % 2, 0, height % 2), mode="replicate")
        features = self.head(F.pixel_unshuffle(padded, 2))
        for block in self.blocks:
            features = features + block(features)
        gain, offset = self.light(features.mean((2, 3)))[..., None, None].chunk(2, dim=1)
        detail = F.pixel_shuffle(self.tail(features), 2)[..., :height, :width]
        restored: Tensor = image * gain.exp() + offset + detail
        return restored


def train_restorers(
    folds: Sequence[CropSampler],
    *,
    schedule: Schedule = SCHEDULE,
    seed: int = 0,
    folder: Path | None = None,
    every: int = 500,
    device: torch.device | str = "cpu",
) -> tuple[SmallRestorer, ...]:
    """Train one blind restorer on the crops of each fold, a few hundred steps and no more.

    Args:
        folds: crops of the two halves of the photographs.
        schedule: steps and learning rates.
        seed: of weights and samples.
        folder: where checkpoints go, one file for each fold.
        every: steps between two checkpoints.
        device: where the restorers are trained, and stay.

    Raises:
        CheckpointError: a checkpoint in ``folder`` is of another run.
    """
    files = [folder / f"restorer-{fold}.pt" if folder else None for fold in range(len(folds))]
    restorers = []
    for fold, (sampler, file) in enumerate(zip(folds, files, strict=True)):
        restorer = _draw_restorer(seed * 2 + fold).to(device)
        train(
            {"restorer": restorer},
            _loss(restorer, sampler, seed * 2 + fold, device),
            schedule,
            settings={"seed": seed, "photographs": photos_digest(sampler)},
            checkpoint=file,
            every=every,
            title=f"restorer {fold + 1} of {len(folds)}",
        )
        restorers.append(restorer.requires_grad_(False).eval())
    return tuple(restorers)


def _draw_restorer(seed: int) -> SmallRestorer:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return SmallRestorer()


def _loss(
    restorer: SmallRestorer, sampler: CropSampler, seed: int, device: torch.device | str
) -> Callable[[int], Tensor]:
    def loss_at(step: int) -> Tensor:
        generator = seeded(seed, step)
        photos = sampler.draw(_BATCH, with_surroundings(_SIDE), generator)
        damaged = degrade_each(photos, draw_severities(_BATCH, generator), generator).degraded
        clean, degraded = cut((photos, damaged), _SIDE, generator)
        return F.l1_loss(restorer(degraded.to(device)), clean.to(device))

    return loss_at


def _block(dilation: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(_WIDTH, _WIDTH, 3, padding=dilation, dilation=dilation),
        nn.ReLU(),
        nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1),
    )
