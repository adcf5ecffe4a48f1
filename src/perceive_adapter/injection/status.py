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
        treats: degradations that limit the active adapter to images in which one of them is
            perceived; None where it works on every image.
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
    treats: tuple[str, ...] | None

    def __str__(self) -> str:
        total = f"{self.total / 1e6:.1f} M" if self.total >= 1e6 else f"{self.total:,}"
        text = (
            f"trainable: {self.trainable:,} of {total} "
            f"({100 * self.trainable / self.total:.1f} %), "
            f"{len(self.levels)} level and {len(self.layers)} layer sites"
        )
        if self.treats is not None:
            text += f", treats {', '.join(self.treats)}"
        if self.blocked:
            text += f", {len(self.blocked)} of them blocked by frozen zero scales"
        return text
