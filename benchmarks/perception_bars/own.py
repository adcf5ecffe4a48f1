"""The package's own degradations, on whole images and on patches of 64 pixels.

The medium tier is the same damage, less severe, and again a blend of the damaged and the clean
image. Blends of the heaviest damage are worse than the mildest images of the low tier (half of
noise of sigma 50 is more than sigma 23), so with them nobody could tell all tiers right.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from perceive_adapter.data.samples import MARGIN, with_surroundings
from perceive_adapter.data.triplets import Blend, Medium, Milder
from perceive_adapter.perceiver.audit import Audit, Findings, audit
from perception_bars.photographs import Subject
from perception_bars.report import Bar, bars_table

PATCH = 64
PATCHES_EACH = 4
MEDIUMS: dict[str, Medium] = {"less severe": Milder(), "blends": Blend()}
STRUCTURE = 8  # standard deviation on the 8-bit scale, above which a patch shows something


def report(subject: Subject) -> str:
    """Audit whole images and patches; every figure beside its bar."""
    if not subject.clean:
        return "Skipped: there are no photographs."
    crops = [crop for photo in enumerate(subject.clean) for crop in _crops(*photo)]
    kept = [index for index, crop in enumerate(crops) if _structure(crop) > STRUCTURE]
    parts = []
    for name, medium in MEDIUMS.items():
        whole = audit(subject.perceiver, subject.clean, medium=medium)
        small = audit(subject.perceiver, crops, patch=PATCH, medium=medium)
        mediums = f"; mediums: {name}"
        parts.append(_part(f"Whole images ({len(subject.clean)}){mediums}", whole))
        title = f"All random patches of {PATCH} pixels ({len(crops)}){mediums}"
        parts.append(_part(title, small))
        if kept:
            title = f"Patches with a standard deviation above {STRUCTURE} of 255 ({len(kept)})"
            parts.append(_part(f"{title}{mediums}", _only(small, kept)))
    return "\n\n".join(parts)


def _crops(index: int, photo: Tensor) -> list[Tensor]:
    """Cut out what is damaged, so that a patch in its middle shows nothing of its border."""
    generator = torch.Generator().manual_seed(index)
    size = with_surroundings(PATCH)
    corners = [
        [int(torch.randint(side - size + 1, (), generator=generator)) for side in photo.shape[1:]]
        for _ in range(PATCHES_EACH)
    ]
    return [photo[:, top : top + size, left : left + size] for top, left in corners]


def _structure(crop: Tensor) -> float:
    """Standard deviation of the gray middle: an even colour has none."""
    inside = slice(MARGIN, -MARGIN)
    return float(crop[:, inside, inside].float().mean(0).std())


def _only(found: Audit, kept: Sequence[int]) -> Audit:
    return Audit({name: _subset(one, kept) for name, one in found.findings.items()})


def _subset(found: Findings, kept: Sequence[int]) -> Findings:
    return Findings(**{name: [rows[i] for i in kept] for name, rows in vars(found).items()})


def _part(title: str, found: Audit) -> str:
    figures = found.figures()
    mean, worst = figures["mean"], figures["worst"]
    bars = [
        Bar("tier accuracy, mean over degradations", mean["tier accuracy"], 0.90),
        Bar("tier accuracy, worst degradation", worst["tier accuracy"], 0.80),
        Bar("triplets in the right order", mean["monotonic"], 0.95),
        Bar("type told at severities from 0.3 on", mean["type accuracy"], 0.95),
        Bar("severity, absolute rank correlation, worst degradation", _rank(found), 0.90),
    ]
    return f"### {title}\n\n{bars_table(bars)}\n\n{found.table()}"


def _rank(found: Audit) -> float:
    """Lowest mean over the images of the absolute rank correlation of the perceived severity."""
    means = [sum(map(abs, one.severity)) / len(one.severity) for one in found.findings.values()]
    return min(means)
