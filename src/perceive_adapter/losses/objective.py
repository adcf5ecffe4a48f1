"""The training objective: L1, contrastive, CLIP-aware and difficulty-adaptive, weighted."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch.nn.functional as F
from torch import Tensor, nn

from perceive_adapter.errors import ConfigError, LossInputError
from perceive_adapter.losses._inputs import check_image, check_number
from perceive_adapter.losses.clip_aware import ClipAwareLoss
from perceive_adapter.losses.contrastive import DegradationContrastiveLoss
from perceive_adapter.losses.difficulty import DifficultyAdaptiveLoss
from perceive_adapter.precision import full_precision

__all__ = ["ObjectiveTerms", "ObjectiveWeights", "RestorationObjective"]


@dataclass(frozen=True)
class ObjectiveWeights:
    """Weights of the terms; a term of weight 0 is neither built nor computed.

    Raises:
        ConfigError: a weight that is negative or not finite, or all of them 0.

    Example:
        >>> ObjectiveWeights(clip_aware=0.0)
        ObjectiveWeights(l1=1.0, contrastive=0.1, clip_aware=0.0, difficulty_adaptive=0.1)
    """

    l1: float = 1.0
    contrastive: float = 0.1
    clip_aware: float = 0.05
    difficulty_adaptive: float = 0.1

    def __post_init__(self) -> None:
        values = [check_number(field.name, getattr(self, field.name)) for field in fields(self)]
        if not any(values):
            raise ConfigError("at least one weight of the objective must be above 0")


@dataclass(frozen=True)
class ObjectiveTerms:
    """What one call of ``RestorationObjective`` gives: a total to train with, terms to log.

    Attributes:
        total: weighted sum, a scalar with a graph.
        l1: mean absolute error, detached and unweighted, as the other terms; None where a term
            was not computed.
        contrastive: see ``DegradationContrastiveLoss``.
        clip_aware: see ``ClipAwareLoss``.
        difficulty_adaptive: see ``DifficultyAdaptiveLoss``.
    """

    total: Tensor
    l1: Tensor | None = None
    contrastive: Tensor | None = None
    clip_aware: Tensor | None = None
    difficulty_adaptive: Tensor | None = None

    def as_dict(self) -> dict[str, Tensor]:
        """Return the total and the terms that were computed, detached, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.detach() for name, value in values.items() if value is not None}


class RestorationObjective(nn.Module):
    """Weighted sum of the four terms of stage 2.

    A term is left out, and costs nothing, where its weight is 0 or its inputs are absent:
    contrastive without vectors, CLIP-aware without a perceiver, difficulty-adaptive without the
    degraded image. Epochs should begin with ``objective.difficulty_adaptive.update_difficulty``.

    Source: Perceive-IR, IEEE TIP 2025, arXiv 2408.15994, restoration stage (overall loss).

    Args:
        weights: of the terms; None for the paper's 1, 0.1, 0.05 and 0.1.
        contrastive: None for the default ``DegradationContrastiveLoss``.
        clip_aware: None for no such term; a ``ClipAwareLoss`` of a perceiver for one.
        difficulty_adaptive: None for the default ``DifficultyAdaptiveLoss``.

    Example:
        >>> import torch
        >>> objective = RestorationObjective()
        >>> target = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
        >>> terms = objective(target / 2, target, degraded=target / 2)
        >>> {name: round(value.item(), 4) for name, value in terms.as_dict().items()}
        {'total': 0.5667, 'l1': 0.25, 'difficulty_adaptive': 3.1667}
    """

    def __init__(
        self,
        weights: ObjectiveWeights | None = None,
        *,
        contrastive: DegradationContrastiveLoss | None = None,
        clip_aware: ClipAwareLoss | None = None,
        difficulty_adaptive: DifficultyAdaptiveLoss | None = None,
    ) -> None:
        super().__init__()
        self.weights = weights or ObjectiveWeights()
        self.contrastive = (
            (contrastive or DegradationContrastiveLoss()) if self.weights.contrastive else None
        )
        self.clip_aware = clip_aware if self.weights.clip_aware else None
        self.difficulty_adaptive = (
            (difficulty_adaptive or DifficultyAdaptiveLoss())
            if self.weights.difficulty_adaptive
            else None
        )

    def forward(
        self,
        restored: Tensor,
        target: Tensor,
        *,
        degraded: Tensor | None = None,
        medium: Sequence[Tensor] = (),
        valid: Tensor | None = None,
        anchor: Tensor | None = None,
        positive: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ObjectiveTerms:
        """Return the total and its terms.

        Args:
            restored: (B, 3, H, W) or (B, 1, H, W), RGB or gray, in [0, 1].
            target: same shape.
            degraded: same shape, or None for no difficulty-adaptive term.
            medium: n tensors of the same shape.
            valid: (B, n), which medium images exist.
            anchor: (B', D), degradation vectors, or None for no contrastive term.
            positive: (B', D), vectors of other crops of the same images.
            labels: (B',), integers: which degradation.

        Raises:
            LossInputError: inputs that do not fit each other, a contrastive input without the
                other two, medium images without the degraded one, or no term left to compute.
        """
        terms: dict[str, Tensor] = {}
        if self.weights.l1:
            image = full_precision(check_image("restored", restored))
            truth = full_precision(check_image("target", target, like=restored))
            terms["l1"] = F.l1_loss(image, truth)
        if self.contrastive is not None:
            vectors = _all_or_none(anchor=anchor, positive=positive, labels=labels)
            if vectors is not None:
                terms["contrastive"] = self.contrastive(*vectors)
        if self.clip_aware is not None:
            terms["clip_aware"] = self.clip_aware(restored)
        if self.difficulty_adaptive is not None:
            if degraded is not None:
                terms["difficulty_adaptive"] = self.difficulty_adaptive(
                    restored, target, degraded, medium, valid
                )
            elif len(medium):
                raise LossInputError("medium images were given without the degraded image")
        return self._sum(terms)

    def _sum(self, terms: dict[str, Tensor]) -> ObjectiveTerms:
        if not terms:
            raise LossInputError(
                f"no term of {self.weights} can be computed from the inputs that were given"
            )
        total = sum(value * getattr(self.weights, name) for name, value in terms.items())
        assert isinstance(total, Tensor)
        return ObjectiveTerms(total, **{name: value.detach() for name, value in terms.items()})


def _all_or_none(**inputs: Tensor | None) -> list[Tensor] | None:
    given = {name: value for name, value in inputs.items() if value is not None}
    if given and len(given) < len(inputs):
        missing = ", ".join(name for name in inputs if name not in given)
        raise LossInputError(f"{', '.join(given)} given without {missing}")
    return list(given.values()) or None
