"""Perceivers: what quality an image has, told by learnable prompts on a frozen CLIP (stage 1)."""

from perceive_adapter.perceiver.config import PerceiverConfig
from perceive_adapter.perceiver.perceived import Perceived
from perceive_adapter.perceiver.prompts import TierPrompts
from perceive_adapter.perceiver.quality import QualityPerceiver

__all__ = ["Perceived", "PerceiverConfig", "QualityPerceiver", "TierPrompts"]
