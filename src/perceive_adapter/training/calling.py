"""Call a network on images in [0, 1], wrapped or not, whatever its own range and arguments are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from perceive_adapter.injection.model import PerceiveModel
from perceive_adapter.injection.perception import Perception
from perceive_adapter.injection.probe import find_image, image_alone

__all__ = ["restored_by"]


def restored_by(
    model: nn.Module,
    degraded: Tensor,
    perception: Perception | None = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Return what a network makes of images in [0, 1], in [0, 1] again but not clamped.

    Args:
        model: a :class:`~perceive_adapter.PerceiveModel`, or any network that works in [0, 1].
        degraded: (B, 3, H, W).
        perception: what a wrapped model is told; None for what it perceives.
        weights: to run with in place of its own, by the names of parameters and buffers.
    """
    degraded = degraded.clone()  # some networks write into their input
    arguments: tuple[Tensor, ...] = (degraded,)
    keywords: dict[str, Any] = {}
    if isinstance(model, PerceiveModel):
        image = model.value_range.from_unit(degraded)
        arguments, named = image_alone(model.image_arg, image)
        keywords = {"perception": perception, **named}
    if weights is None:
        output = model(*arguments, **keywords)
    else:
        output = functional_call(model, dict(weights), arguments, keywords)
    restored = find_image(output, len(degraded))
    return model.value_range.to_unit(restored) if isinstance(model, PerceiveModel) else restored
