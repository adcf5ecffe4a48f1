"""What one pass of stage 2 computes: restore a batch, and how far it is from the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from perceive_adapter.data.restoration import RestorationSample
from perceive_adapter.errors import ConfigError
from perceive_adapter.injection.model import PerceiveModel
from perceive_adapter.injection.perception import Perception
from perceive_adapter.injection.probe import image_in
from perceive_adapter.losses import RestorationObjective

__all__ = ["Perceive", "RestorationStep", "psnr", "restored_by"]

_MIN_MSE = 1e-10

Perceive: TypeAlias = Callable[[PerceiveModel, RestorationSample], Perception]


class RestorationStep(nn.Module):
    """Restore a batch and compare it with its targets, as one module that can be distributed.

    Args:
        model: a :class:`~perceive_adapter.PerceiveModel`, or any network from degraded to restored
            image in [0, 1].
        objective: what is minimised.
        perceive: what a wrapped model is told of samples; None for what it perceives itself.

    Raises:
        ConfigError: the model's image is neither its first argument nor known by name.
    """

    def __init__(
        self, model: nn.Module, objective: RestorationObjective, perceive: Perceive | None = None
    ) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.perceive = perceive or _perceive
        if isinstance(model, PerceiveModel) and model.image_arg[0] != 0 and not model.image_arg[1]:
            raise ConfigError(
                "the backbone's image is neither its first argument nor known by name; wrap it "
                "with the name, image_arg=..."
            )

    def forward(self, samples: RestorationSample, *, measure: bool = False) -> dict[str, Tensor]:
        """Return the objective's total and terms, or, to ``measure``, the ``psnr`` (B,) in dB."""
        model = self.model
        if not isinstance(model, PerceiveModel):
            restored = restored_by(model, samples.degraded)
            return self._compare(restored, samples, None, measure)
        with torch.autocast(samples.context.device.type, enabled=False):  # as when it is used
            perception = self.perceive(model, samples)
        restored = restored_by(model, samples.degraded, perception)
        return self._compare(restored, samples, perception, measure)

    def _compare(
        self,
        restored: Tensor,
        samples: RestorationSample,
        perception: Perception | None,
        measure: bool,
    ) -> dict[str, Tensor]:
        if measure:
            return {"psnr": psnr(restored, samples.target)}
        vectors: dict[str, Tensor] = {}
        compact = None if perception is None else perception.compact
        if compact is not None and self.objective.contrastive is not None:
            assert isinstance(self.model, PerceiveModel)
            half = samples.context.shape[-1] // 2
            other = self.model.injector.perceive(samples.context.flip(3)[..., :half]).compact
            assert other is not None
            vectors = {"anchor": compact, "positive": other, "labels": samples.task}
        terms = self.objective(restored, samples.target, degraded=samples.degraded, **vectors)
        return {**terms.as_dict(), "total": terms.total}


def _perceive(model: PerceiveModel, samples: RestorationSample) -> Perception:
    return model.perceive(model.value_range.from_unit(samples.context))


def restored_by(model: nn.Module, degraded: Tensor, perception: Perception | None = None) -> Tensor:
    """Return what a network makes of images in [0, 1], in [0, 1] again but not clamped."""
    if not isinstance(model, PerceiveModel):
        return image_in(model(degraded), len(degraded))
    image, (position, name) = model.value_range.from_unit(degraded), model.image_arg
    if position == 0:
        output = model(image, perception=perception)
    else:
        output = model(perception=perception, **{str(name): image})
    return model.value_range.to_unit(image_in(output, len(image)))


def psnr(restored: Tensor, target: Tensor) -> Tensor:
    """Return the PSNR of each image in dB, (B,), at most 100, of images clamped to [0, 1]."""
    error = (restored.clamp(0, 1) - target.clamp(0, 1)).float().square().flatten(1).mean(1)
    return -10 * error.clamp_min(_MIN_MSE).log10()
