"""State of a wrapped model, as data."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AdapterStatus"]


@dataclass(frozen=True)
class AdapterStatus:
    """State of a wrapped model. ``print(status)`` is one line.

    Args:
        adapters: names of all adapters.
        active: name of the one that is in use.
        enabled: False inside :meth:`~perceive_adapter.PerceiveModel.disabled`.
        levels: names of the active adapter's level sites.
        layers: names of its layer sites.
        blocked: sites that a frozen zero scale of the backbone hides from the output, so that
            their prompts do not train.
        trainable: number of parameters that train.
        total: parameters of the backbone and of the active adapter.
        unfrozen: names of the backbone's parameters that train.
    """

    adapters: tuple[str, ...]
    active: str
    enabled: bool
    levels: tuple[str, ...]
    layers: tuple[str, ...]
    blocked: tuple[str, ...]
    trainable: int
    total: int
    unfrozen: tuple[str, ...]

    def __str__(self) -> str:
        text = (
            f"trainable: {self.trainable:,} of {self.total / 1e6:.1f} M "
            f"({100 * self.trainable / self.total:.1f} %), "
            f"{len(self.levels)} level and {len(self.layers)} layer sites"
        )
        if self.blocked:
            text += f", {len(self.blocked)} of them blocked by frozen zero scales"
        return text
