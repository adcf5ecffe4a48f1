"""What one pass of stage 2 computes: restore a batch, and how far it is from the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from perceive_adapter.data.restoration import RestorationSample
from perceive_adapter.errors import ConfigError
from perceive_adapter.injection.model import PerceiveModel
from perceive_adapter.injection.perception import Perception
from perceive_adapter.losses import RestorationObjective
from perceive_adapter.training.calling import psnr, restored_by
from perceive_adapter.training.mediums import Mediums, MediumSource

__all__ = ["Perceive", "RestorationStep"]

Perceive: TypeAlias = Callable[[PerceiveModel, RestorationSample], Perception]


class RestorationStep(nn.Module):
    """Restore a batch and compare it with its targets, as one module that can be distributed.

    Args:
        model: a :class:`~perceive_adapter.PerceiveModel`, or any network from degraded to restored
            image in [0, 1].
        objective: what is minimised.
        perceive: what a wrapped model is told of samples; None for what it perceives itself.
        mediums: sources of half-restored images, see :class:`~.mediums.Mediums`.

    Raises:
        ConfigError: the model's image is neither its first argument nor known by name.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: RestorationObjective,
        perceive: Perceive | None = None,
        mediums: Sequence[MediumSource] = (),
    ) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.mediums = Mediums(model, mediums)
        self.perceive = perceive or _perceive
        if isinstance(model, PerceiveModel) and model.image_arg[0] != 0 and not model.image_arg[1]:
            raise ConfigError(
                "the backbone's image is neither its first argument nor known by name; wrap it "
                "with the name, image_arg=..."
            )

    def forward(self, samples: RestorationSample, *, measure: bool = False) -> dict[str, Tensor]:
        """Return the objective's total and terms, or, to ``measure``, the ``psnr`` (B,) in dB."""
        perception = None
        if isinstance(self.model, PerceiveModel):
            with torch.autocast(samples.context.device.type, enabled=False):  # as when it is used
                perception = self.perceive(self.model, samples)
        if measure:
            restored = restored_by(self.model, samples.degraded, perception)
            return {"psnr": psnr(restored, samples.target)}
        # Before the pass with gradient: hooks that run again in its backward see the last one.
        mediums = self.mediums(self.model, samples.degraded, perception)
        restored = restored_by(self.model, samples.degraded, perception)
        terms = self.objective(
            restored,
            samples.target,
            degraded=samples.degraded,
            medium=mediums,
            **self._vectors(samples, perception),
        )
        return {**terms.as_dict(), "total": terms.total}

    def _vectors(
        self, samples: RestorationSample, perception: Perception | None
    ) -> dict[str, Tensor]:
        """What the contrastive loss compares: compact features of two crops of one image."""
        compact = None if perception is None else perception.compact
        if compact is None or self.objective.contrastive is None:
            return {}
        assert isinstance(self.model, PerceiveModel)
        half = samples.context.shape[-1] // 2
        other = self.model.injector.perceive(samples.context.flip(3)[..., :half]).compact
        assert other is not None
        return {"anchor": compact, "positive": other, "labels": samples.task}


def _perceive(model: PerceiveModel, samples: RestorationSample) -> Perception:
    return model.perceive(model.value_range.from_unit(samples.context))
