"""Synthetic degradations with a known severity, reproducible from a generator's seed."""

from .apply import DEGRADATIONS, FAMILIES, FAMILY_OF, KIND_OF, KINDS, degrade, mix
from .draws import Degradation

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
