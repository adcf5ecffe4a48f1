"""From a perception to the condition that every prompt module sees."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perceive_adapter.config import SOURCES, AdapterConfig
from perceive_adapter.errors import ConfigError, PerceptionError
from perceive_adapter.injection.compact import CompactFeatures
from perceive_adapter.injection.perception import Perception

__all__ = ["ConditionEncoder"]

HIDDEN = 64
UNIT_VECTORS = ("compact", "embedding", "semantic")


class ConditionEncoder(nn.Module):
    """Joins what is perceived into one small vector for each depth of the network.

    [semantic vector of the depth, everything else] goes through a two-layer perceptron, as in
    Perceive-IR's prompt guidance module (https://arxiv.org/abs/2408.15994); without semantic
    vectors there is one depth. The compact features are trained here, with the adapter.

    Args:
        config: with ``sources`` set, or none for the compact features alone.
        image_channels: channels of the image that the compact features read.
    """

    def __init__(self, config: AdapterConfig, image_channels: int) -> None:
        super().__init__()
        sources = config.sources
        if sources is None:
            sources = {"compact": config.compact_dim} if config.compact_dim else {}
        if not sources:
            raise ConfigError(
                "nothing steers the prompts: compact_dim=0 and no sources; name a source, "
                "give a perceiver, or leave compact_dim as it is"
            )
        # In one order, whatever the mapping's: JSON does not keep it.
        self.sources = {name: sources[name] for name in SOURCES if name in sources}
        self.compact = (
            CompactFeatures(image_channels, self.sources["compact"])
            if "compact" in self.sources
            else None
        )
        self.mix = nn.Sequential(
            nn.Linear(sum(self.sources.values()), HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, config.condition_dim),
        )

    def forward(self, perception: Perception) -> Tensor:
        """Return the condition (B, L, C) of a perception; L = 1 without semantic vectors.

        Raises:
            PerceptionError: a source is missing or has another width.
        """
        weight = self.mix[0].weight
        assert isinstance(weight, Tensor)
        parts = []
        for name, width in self.sources.items():
            value = getattr(perception, name)
            if value is None or value.shape[-1] != width:
                found = "is missing" if value is None else f"has width {value.shape[-1]}"
                raise PerceptionError(
                    f"perception.{name} {found}; this adapter expects width {width}; fill it in "
                    "with dataclasses.replace(model.perceive(image), ...)"
                )
            value = value.to(weight)
            if name in UNIT_VECTORS:  # so that every source has entries of the order of one
                value = value * width**0.5
            parts.append(value if value.ndim == 3 else value[:, None])
        depths = max(part.shape[1] for part in parts)
        joined = torch.cat([part.expand(-1, depths, -1) for part in parts], dim=-1)
        condition: Tensor = self.mix(joined)
        return condition
