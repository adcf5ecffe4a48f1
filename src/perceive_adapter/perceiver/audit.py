"""How right a perceiver is on photographs that it never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from types import EllipsisType

import torch
from torch import Tensor
from tqdm import tqdm

from perceive_adapter.data.degradations import DEGRADATIONS, FAMILY_OF
from perceive_adapter.data.samples import (
    MARGIN,
    as_file,
    integer_below,
    with_surroundings,
)
from perceive_adapter.data.triplets import Medium, Milder, Scene
from perceive_adapter.errors import ConfigError
from perceive_adapter.perceiver.perceived import Perceived
from perceive_adapter.perceiver.quality import QualityPerceiver

__all__ = ["LEVELS", "Audit", "Findings", "audit", "spearman"]

LEVELS = tuple(index / 7 for index in range(8))
"""Severities at which every photograph is degraded."""

_PROGRESS_AFTER = 2  # seconds
_VISIBLE = 0.3  # severity from which the type must be told
_LOW = 0.5  # severity from which an image is of the low tier


@dataclass
class Findings:
    """What was found about one degradation, one entry for each photograph.

    Args:
        tiers: for each triplet, whether low, medium and high were each told right.
        scores: of low, medium and high.
        types: shares of the visible severities at which the type was told right.
        severity: rank correlation of the perceived severity with the true one.
        score_rank: rank correlation of the score with the true severity, its sign turned.
    """

    tiers: list[tuple[bool, ...]] = field(default_factory=list)
    scores: list[tuple[float, ...]] = field(default_factory=list)
    types: list[float] = field(default_factory=list)
    severity: list[float] = field(default_factory=list)
    score_rank: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Return the means: in [0, 1], the rank correlations in [-1, 1]."""
        figures = {
            "tier accuracy": fmean(fmean(right) for right in self.tiers),
            "triplets right": fmean(all(right) for right in self.tiers),
            "monotonic": fmean(all(a < b for a, b in pairwise(s)) for s in self.scores),
            "score rank": fmean(self.score_rank),
        }
        if self.types:
            figures |= {"type accuracy": fmean(self.types), "severity rank": fmean(self.severity)}
        return figures


@dataclass(frozen=True)
class Audit:
    """Findings for each degradation.

    Args:
        findings: by name of the degradation.
    """

    findings: Mapping[str, Findings]

    def figures(self) -> dict[str, dict[str, float]]:
        """Return the figures of every degradation, and ``mean`` and ``worst`` over them."""
        rows = {name: found.figures() for name, found in self.findings.items()}
        columns = next(iter(rows.values())).keys()
        mean = {column: fmean(row[column] for row in rows.values()) for column in columns}
        worst = {column: min(row[column] for row in rows.values()) for column in columns}
        return {**rows, "mean": mean, "worst": worst}

    def table(self) -> str:
        """Return the figures as a Markdown table."""
        figures = self.figures()
        columns = list(figures["mean"])
        lines = [f"| degradation | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for name, row in figures.items():
            cells = " | ".join(f"{row[column]:.3f}" for column in columns)
            lines.append(f"| {name.replace('_', ' ')} | {cells} |")
        return "\n".join(lines)


@torch.no_grad()
def audit(
    perceiver: QualityPerceiver,
    photos: Sequence[Tensor],
    *,
    medium: Medium | None = None,
    degradations: Sequence[str] = tuple(DEGRADATIONS),
    patch: int | None = None,
    seed: int = 0,
) -> Audit:
    """Measure tiers, types and severities on photographs that the perceiver never saw.

    Every photograph is damaged by every degradation at eight severities from 0 to 1. One of those
    of 0.5 and more is the low tier of a triplet, the photograph itself the high one. The type must
    be told at severities of 0.3 and more: the most probable of ``perceiver.degradations``, if it
    has any, must be the family of the degradation.

    Args:
        perceiver: with three tiers, from worst to best.
        photos: (3, H, W) uint8 each, any size.
        medium: what makes the half-restored images, from images on the CPU; None for
            :class:`~perceive_adapter.data.triplets.Milder`, which is never as severe as a low tier.
            A blend of the severest damage may be.
        degradations: which to measure, keys of ``perceive_adapter.data.DEGRADATIONS``.
        patch: side of the square that the perceiver sees of each photograph, cut out after the
            damage was done, so that nothing of the photograph's border shows; None for all of it.
            A photograph must have :func:`~perceive_adapter.data.samples.with_surroundings` of that.
        seed: of everything random.

    Raises:
        ConfigError: the perceiver has another number of tiers or does not tell one of the
            degradations, or there is no photograph or no degradation.
    """
    _check_audit(perceiver, photos, degradations, patch)
    medium = medium or Milder()
    device = perceiver.prompts.context.device
    findings = {name: Findings() for name in degradations}
    # A terminal is shown how far it is, once that takes a while.
    progress = tqdm(photos, "audit", ncols=80, delay=_PROGRESS_AFTER, disable=None, leave=False)
    for index, photo in enumerate(progress):
        clean = photo[None].float() / 255
        window = _window(photo, patch, seed * 1009 + index)
        high = perceiver(clean[window].to(device))
        for kind, name in enumerate(degradations):
            scene_seed = (seed * 1009 + index) * 1009 + kind
            scenes = [Scene(clean, {name: level}, scene_seed, fold=index % 2) for level in LEVELS]
            images = [as_file(scene.degraded()) for scene in scenes]
            low = sum(level < _LOW for level in LEVELS) + scene_seed % 4
            half = as_file(medium(scenes[low], images[low]))
            perceived = perceiver(torch.cat([*images, half])[window].to(device))
            found = findings[name]
            rows = [(perceived.tiers[low], perceived.score[low])]
            rows += [(perceived.tiers[-1], perceived.score[-1]), (high.tiers[0], high.score[0])]
            found.tiers.append(tuple(int(t.argmax()) == i for i, (t, _) in enumerate(rows)))
            found.scores.append(tuple(float(score) for _, score in rows))
            found.score_rank.append(-spearman(perceived.score[: len(LEVELS)], LEVELS))
            if perceiver.degradations:
                _judge_heads(found, perceiver.degradations.index(FAMILY_OF[name]), perceived)
    return Audit(findings)


def _window(photo: Tensor, patch: int | None, seed: int) -> tuple[EllipsisType | slice, ...]:
    """Choose the part of a damaged photograph that the perceiver sees."""
    if patch is None:
        return (...,)
    generator = torch.Generator().manual_seed(seed)
    places = [side - patch - 2 * MARGIN + 1 for side in photo.shape[1:]]
    starts = [MARGIN + integer_below(count, generator) for count in places]
    return (..., *(slice(start, start + patch) for start in starts))


def _check_audit(
    perceiver: QualityPerceiver,
    photos: Sequence[Tensor],
    degradations: Sequence[str],
    patch: int | None,
) -> None:
    smallest = min((min(photo.shape[1:]) for photo in photos), default=0)
    if patch is not None and photos and smallest < with_surroundings(patch):
        raise ConfigError(
            f"patch={patch} needs photographs of {with_surroundings(patch)} pixels, so that "
            f"nothing of their border shows: the smallest has {smallest}. Take a smaller patch."
        )
    if len(perceiver.tiers) != 3 or not photos or not degradations:
        raise ConfigError(
            "an audit needs three tiers, at least one photograph and at least one degradation: got "
            f"{perceiver.tiers}, {len(photos)} photographs and {tuple(degradations)}."
        )
    if unknown := [name for name in degradations if name not in FAMILY_OF]:
        raise ConfigError(f"no degradations {unknown}; there are {', '.join(FAMILY_OF)}")
    told = perceiver.degradations or FAMILY_OF.values()
    if untold := [name for name in degradations if FAMILY_OF[name] not in told]:
        raise ConfigError(
            f"the perceiver tells {perceiver.degradations}, which {untold} do not belong to: "
            "measure other degradations."
        )


def _judge_heads(found: Findings, column: int, perceived: Perceived) -> None:
    severity = perceived.severity[: len(LEVELS), column]
    types = perceived.degradations[: len(LEVELS)].argmax(dim=1)
    visible = [row for row, level in enumerate(LEVELS) if level >= _VISIBLE]
    found.types.append(fmean(float(types[row] == column) for row in visible))
    found.severity.append(spearman(severity, LEVELS))


def spearman(values: Tensor, levels: Sequence[float]) -> float:
    """Return the rank correlation of values (N,) with N different levels, 0 where all are equal."""
    ranks = torch.stack([_ranks(values.cpu()), _ranks(torch.tensor(levels, device="cpu"))]).double()
    if (ranks[0] == ranks[0, 0]).all():
        return 0.0
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, the mean rank where values are equal."""
    below = (values[None] < values[:, None]).sum(1)
    return below + ((values[None] == values[:, None]).sum(1) - 1) / 2
