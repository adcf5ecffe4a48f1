"""What perception and prompts cost beside the bare network, in multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from perceive_adapter.errors import BackboneError, ConfigError
from perceive_adapter.injection.model import PerceiveModel
from perceive_adapter.injection.probe import weight_like_images

__all__ = ["Cost", "measure_cost"]


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of a forward pass per pixel of its image. ``print(cost)`` is a table.

    Counted are convolutions, matrix products and attention, as torch's ``FlopCounterMode`` does,
    which leaves out what is done element by element, such as a modulation.

    Args:
        size: height and width of the image.
        bare: of the network alone.
        perception: of perceiving the image.
        folded: what the prompts add to ``bare`` where one perception is folded into the weights,
            the folding with it: one image, without gradients.
        unfolded: what they add otherwise: images with perceptions of their own, and training.
    """

    size: tuple[int, int]
    bare: float
    perception: float
    folded: float
    unfolded: float

    def __str__(self) -> str:
        rows = {
            "network alone": self.bare,
            "perception": self.perception,
            "prompts, one image": self.folded,
            "prompts, a batch": self.unfolded,
        }
        height, width = self.size
        return "\n".join(
            [
                f"multiply-adds per pixel, {height} x {width}     beside the network",
                *(
                    f"{name:20}{value:14,.0f}{100 * value / max(self.bare, 1):14.1f} %"
                    for name, value in rows.items()
                ),
            ]
        )


@torch.no_grad()
def measure_cost(model: PerceiveModel, size: int) -> Cost:
    """Count the multiply-adds of a wrapped network by running it.

    Args:
        model: whose backbone takes an image and nothing else.
        size: height and width of the image.

    Raises:
        ConfigError: the network takes no image of that size.
        BackboneError: it fails on one all the same.
    """
    if size % model.size_multiple:
        nearest = max(1, round(size / model.size_multiple)) * model.size_multiple
        raise ConfigError(
            f"size={size}: this network takes sides that are multiples of {model.size_multiple}; "
            f"give {nearest}"
        )
    weight = weight_like_images(model.backbone)
    image = weight.new_full((1, model.sites.image_channels, size, size), 0.5)
    try:
        with model.disabled():
            bare = _counted(lambda: model(image))
    except Exception as error:  # whatever a network raises
        raise BackboneError(
            f"{type(model.backbone).__name__} fails on an image {tuple(image.shape)}: {error}; "
            "give another size"
        ) from error
    seen = model.perceive(image)

    def folded() -> None:
        with model.fold(seen):
            model(image)

    def unfolded() -> None:
        with model.injector.conditioned(seen):
            model.backbone(image)

    perception = _counted(lambda: model.perceive(image))
    counts = bare, perception, _counted(folded) - bare, _counted(unfolded) - bare
    return Cost((size, size), *(count / size**2 for count in counts))


def _counted(run: Callable[[], object]) -> float:
    """Multiply-adds of what ``run`` does; torch counts a multiplication and an addition as two."""
    in_place = {torch.ops.aten.baddbmm_: _of_product}  # torch knows the other form only
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run()
    return int(counter.get_total_flops()) / 2


def _of_product(_: Any, left: Any, right: Any, **__: Any) -> int:
    """Operations of a product of matrices (B, N, K) and (B, K, M), by their shapes."""
    operations: int = 2 * math.prod(left) * right[-1]
    return operations
