"""Images to train and measure on: degradations with a known severity."""

from .degradations import DEGRADATIONS, Degradation, degrade

__all__ = ["DEGRADATIONS", "Degradation", "degrade"]
