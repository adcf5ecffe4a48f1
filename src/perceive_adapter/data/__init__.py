"""Images to train and measure on: degradations with a known severity."""

from perceive_adapter.data.degradations import (
    DEGRADATIONS,
    FAMILIES,
    FAMILY_OF,
    KIND_OF,
    KINDS,
    Degradation,
    degrade,
    mix,
)

__all__ = [
    "DEGRADATIONS",
    "FAMILIES",
    "FAMILY_OF",
    "KINDS",
    "KIND_OF",
    "Degradation",
    "degrade",
    "mix",
]
