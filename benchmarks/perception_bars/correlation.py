"""Does the score follow severity, beside BRISQUE and a pair of prompts that was never trained?"""

from collections.abc import Callable
from statistics import fmean

import numpy as np
import torch
from brisque import BRISQUE
from torch import Tensor

from perceive_adapter.data import DEGRADATIONS, degrade
from perceive_adapter.data.samples import as_file
from perceive_adapter.errors import ConfigError
from perceive_adapter.perceiver.audit import LEVELS, spearman
from perception_bars.photographs import Subject, spread, to_batch
from perception_bars.report import Bar, bars_table, table

PHOTOS = 8
PROMPTS = ("a good photo", "a bad photo")


class Brisque(BRISQUE):
    """BRISQUE on current versions of NumPy, which no longer take arrays of one entry for floats."""

    def scale_features(self, features: np.ndarray) -> np.ndarray:
        """Scale the features as the parent does."""
        return super().scale_features(np.array([np.asarray(one).item() for one in features]))


@torch.no_grad()
def report(subject: Subject) -> str:
    """Rank correlation of each score with severity over eight levels."""
    photos = spread(subject.clean or subject.bundled, PHOTOS)
    scorers = _scorers(subject)
    found = {name: {scorer: [] for scorer in scorers} for name in DEGRADATIONS}
    for index, photo in enumerate(photos):
        for name, ranks in found.items():
            images = _levels(photo, name, index)
            for scorer, score in scorers.items():
                ranks[scorer].append(-spearman(score(images), LEVELS))
    figures = {
        name: {scorer: fmean(map(abs, values)) for scorer, values in ranks.items()}
        for name, ranks in found.items()
    }
    means = {scorer: fmean(row[scorer] for row in figures.values()) for scorer in scorers}
    ours, *others = scorers
    bars = [Bar(f"mean over degradations, at least {o}'s", means[ours], means[o]) for o in others]
    rows = [_row(name, row, found[name]) for name, row in figures.items()]
    signed = {
        scorer: [rank for ranks in found.values() for rank in ranks[scorer]] for scorer in means
    }
    rows.append(_row("mean", means, signed))
    about = (
        f"Means over {len(photos)} images of the absolute rank correlation with severity, eight "
        "levels each; in parentheses with the sign, positive where more damage scores worse. "
        "Chance alone makes the absolute value 0.31."
    )
    return "\n\n".join([bars_table(bars), about, table(("degradation", *scorers), rows)])


def _row(name: str, row: dict[str, float], ranks: dict[str, list[float]]) -> list[str]:
    cells = [f"{figure:.3f} ({fmean(ranks[scorer]):+.2f})" for scorer, figure in row.items()]
    return [name.replace("_", " "), *cells]


def _levels(photo: Tensor, name: str, seed: int) -> Tensor:
    """One photograph at all severities, with the same streaks, noise and depth (8, 3, H, W)."""
    clean = to_batch(photo)
    images = [degrade(clean, name, level, torch.Generator().manual_seed(seed)) for level in LEVELS]
    return as_file(torch.cat(images))


def _scorers(subject: Subject) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions from images to scores (B,), higher for better ones."""
    brisque = Brisque(url=False)

    def by_brisque(images: Tensor) -> Tensor:
        pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
        return torch.tensor([-float(brisque.score(one)) for one in pixels])

    scorers = {"perceiver": lambda images: subject.perceiver(images).score, "BRISQUE": by_brisque}
    towers = subject.perceiver.towers
    try:
        texts = towers.encode_texts(PROMPTS)
    except ConfigError:  # the perceiver keeps no token table
        return scorers

    def by_prompts(images: Tensor) -> Tensor:
        cosines = subject.perceiver.embed(images) @ texts.T
        return (towers.logit_scale.exp() * cosines).softmax(dim=1)[:, 0]

    return {**scorers, "prompt pair": by_prompts}
