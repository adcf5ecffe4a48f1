"""From a perception to the condition that every prompt module sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceive_adapter.config import SOURCES, AdapterConfig
from perceive_adapter.errors import ConfigError, PerceptionError
from perceive_adapter.injection.compact import CompactFeatures
from perceive_adapter.injection.perception import Perception

__all__ = ["ConditionEncoder", "strength"]

HIDDEN = 64
WHOLE = 0.2  # severity from which the prompts do all that they can
SURE = (0.6, 0.9)  # presence up to which a severity is nothing, and from which it counts in full
UNIT_VECTORS = ("compact", "embedding", "semantic")


class ConditionEncoder(nn.Module):
    """Joins what is perceived into one small vector for each depth of the network.

    [semantic vector of the depth, everything else] goes through a two-layer perceptron, as in
    Perceive-IR's prompt guidance module (https://arxiv.org/abs/2408.15994); without semantic
    vectors there is one depth. The compact features are trained here, with the adapter.

    What leaves is ``strength * [c, 1]``. The strength is 1, or, where ``config.treats`` names
    degradations, grows with the severity that is perceived of them, as far as their presence is not
    in doubt, where presence steers too. Where there are none, no prompt does anything.

    Args:
        config: with ``sources`` set, or none for the compact features alone.
        image_channels: channels of the image that the compact features read.

    Raises:
        ConfigError: nothing steers the prompts, or ``config.treats`` names columns that
            ``sources["severity"]`` does not have.
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
        self.treat(config.treats)
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

    def treat(self, columns: tuple[int, ...] | None) -> None:
        """Set which degradations make the strength, by their columns; None: it is 1.

        Raises:
            ConfigError: a column is not there.
        """
        width = self.sources.get("severity", 0)
        width = min(width, self.sources.get("degradations", width))
        if columns is not None and max(columns) >= width:
            raise ConfigError(
                f"treats={columns} names columns of perception.severity and "
                f"perception.degradations, of which this adapter's sources have {width}: expected "
                "columns that are there, which AdapterConfig(sources={'severity': ..., ...}) names"
            )
        self.treats = columns

    def forward(self, perception: Perception) -> Tensor:
        """Return the condition (B, L, C + 1) of a perception; L = 1 without semantic vectors.

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
        return F.pad(condition, (0, 1), value=1.0) * self._strength(perception, condition)

    def _strength(self, perception: Perception, like: Tensor) -> Tensor:
        """Return how strongly the prompts work on each image, (B, 1, 1) in [0, 1]."""
        if self.treats is None:
            return like.new_ones(1, 1, 1)
        treated = list(self.treats)
        assert perception.severity is not None
        severity, presence = perception.severity[:, treated].to(like), None
        if "degradations" in self.sources:
            assert perception.degradations is not None
            presence = perception.degradations[:, treated].to(like)
        return strength(severity, presence)[:, None, None]


def strength(severity: Tensor, presence: Tensor | None = None) -> Tensor:
    """Return how strongly prompts work on images with these degradations.

    What is hardly there, or hardly believed to be, is hardly touched; from a severity of 0.2 on,
    and where presence is told one of 0.9, it is treated in full, with smooth steps between. What
    is present with a probability of 0.6 or less is left alone.

    Args:
        severity: (B, D) in [0, 1], of the degradations that are treated.
        presence: (B, D) in [0, 1], of the same.

    Returns:
        (B,) in [0, 1].
    """
    severity = severity.clamp(0, 1)
    if presence is not None:
        doubtful, sure = SURE
        severity = severity * _smooth_step((presence - doubtful) / (sure - doubtful))
    return _smooth_step((1 - (1 - severity).prod(dim=1)) / WHOLE)


def _smooth_step(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return x.square() * (3 - 2 * x)
