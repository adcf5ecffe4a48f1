"""Synthetic degradations with a known severity, reproducible from a generator's seed."""

from perceive_adapter.data.degradations.apply import (
    DEGRADATIONS,
    FAMILIES,
    FAMILY_OF,
    KIND_OF,
    KINDS,
    degrade,
    mix,
)
from perceive_adapter.data.degradations.draws import Degradation

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
