"""What one pass of stage 2 computes: restore a batch, and how far it is from the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from perceive_adapter.data.restoration import RestorationSample
from perceive_adapter.errors import BackboneError
from perceive_adapter.injection.model import PerceiveModel
from perceive_adapter.injection.perception import Perception
from perceive_adapter.injection.probe import image_alone
from perceive_adapter.losses import RestorationObjective
from perceive_adapter.losses.difficulty import psnr
from perceive_adapter.training.calling import restored_by
from perceive_adapter.training.mediums import Mediums, MediumSource

__all__ = ["Perceive", "RestorationStep", "check_patch"]

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
        if isinstance(model, PerceiveModel):
            image_alone(model.image_arg, torch.empty(0))

    def forward(self, samples: RestorationSample, *, measure: bool = False) -> dict[str, Tensor]:
        """Return the objective's total and terms, or, to ``measure``, the ``psnr`` (B,) in dB."""
        perception, vectors = None, {}
        if isinstance(self.model, PerceiveModel):
            with torch.autocast(samples.context.device.type, enabled=False):  # as when it is used
                perception = self.perceive(self.model, samples)
                vectors = {} if measure else self._vectors(samples, perception)
        if measure:
            restored = self._restored(samples, perception)
            return {"psnr": psnr(restored.float(), samples.target)}
        # Before the pass with gradient: hooks that run again in its backward see the last one.
        given = self._given_mediums(samples, perception)
        restored = self._restored(samples, perception)
        degraded, target = samples.degraded, samples.target
        terms = self.objective(restored, target, degraded=degraded, **given, **vectors)
        return {**terms.as_dict(), "total": terms.total}

    def _given_mediums(
        self, samples: RestorationSample, perception: Perception | None
    ) -> dict[str, Any]:
        """Half-restored images, those made here and those read, and which of them there are."""
        if self.objective.difficulty_adaptive is None:
            return {}
        made = self.mediums(self.model, samples.degraded, perception)
        there = samples.mediums.isfinite().flatten(2).all(2)
        valid = torch.cat([there.new_ones(len(there), len(made)), there], dim=1)
        return {"medium": [*made, *samples.mediums.unbind(1)], "valid": valid}

    def _restored(self, samples: RestorationSample, perception: Perception | None) -> Tensor:
        restored = restored_by(self.model, samples.degraded, perception)
        if restored.shape != samples.target.shape:
            raise BackboneError(
                f"the network restores {tuple(samples.degraded.shape)} to {tuple(restored.shape)}, "
                f"and the targets are {tuple(samples.target.shape)}: expected images of the same "
                "size. Wrap what returns the restored image, and no upscaler."
            )
        return restored

    def _vectors(self, samples: RestorationSample, perception: Perception) -> dict[str, Tensor]:
        """What the contrastive loss compares: compact features of two crops of one image."""
        if perception.compact is None or self.objective.contrastive is None:
            return {}
        assert isinstance(self.model, PerceiveModel)
        half = samples.context.shape[-1] // 2
        other = self.model.injector.perceive(samples.context.flip(3)[..., :half]).compact
        assert other is not None
        return {"anchor": perception.compact, "positive": other, "labels": samples.task}


def check_patch(model: nn.Module, side: int) -> None:
    """Raise if a wrapped network cannot be trained on RGB patches of this side.

    Raises:
        BackboneError: it takes other images, is an upscaler, or needs other sides.
    """
    if not isinstance(model, PerceiveModel):
        return
    plan = model.sites
    if plan.image_channels != 3 or plan.scale != 1:
        raise BackboneError(
            f"the network takes images of {plan.image_channels} channels and scales them by "
            f"{plan.scale:g}: stage 2 trains restoration of RGB images at their own size. Wrap it "
            "in a module that converts, or write a loop of your own "
            "(examples/finetune_your_own.py)."
        )
    if side % model.size_multiple:
        raise BackboneError(
            f"the network runs on sides that are multiples of {model.size_multiple}, and the "
            f"patches have {side}: give a patch that is one."
        )


def _perceive(model: PerceiveModel, samples: RestorationSample) -> Perception:
    return model.perceive(model.value_range.from_unit(samples.context))
