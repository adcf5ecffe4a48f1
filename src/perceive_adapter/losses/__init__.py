"""Training objectives of stage 2: difficulty-adaptive, CLIP-aware, contrastive, and their sum.

Losses of images take RGB in [0, 1] of shape (B, 3, H, W) (gray images of one channel are repeated)
and return a scalar; the contrastive loss takes vectors, and the objective gives its terms beside
their sum. Method: Perceive-IR, IEEE TIP 2025, arXiv 2408.15994.
"""

from perceive_adapter.losses.clip_aware import ClipAwareLoss
from perceive_adapter.losses.contrastive import DegradationContrastiveLoss
from perceive_adapter.losses.difficulty import DifficultyAdaptiveLoss
from perceive_adapter.losses.features import (
    FeatureExtractor,
    FilterPyramid,
    ModuleFeatures,
    resolve_features,
    timm_features,
    tiny_features,
)
from perceive_adapter.losses.objective import ObjectiveTerms, ObjectiveWeights, RestorationObjective

__all__ = [
    "ClipAwareLoss",
    "DegradationContrastiveLoss",
    "DifficultyAdaptiveLoss",
    "FeatureExtractor",
    "FilterPyramid",
    "ModuleFeatures",
    "ObjectiveTerms",
    "ObjectiveWeights",
    "RestorationObjective",
    "resolve_features",
    "timm_features",
    "tiny_features",
]
