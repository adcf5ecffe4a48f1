"""Plug degradation perception into any image restoration network.

Example:
    >>> import torch
    >>> from perceive_adapter import wrap
    >>> backbone = torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 16, 3, padding=1),
    ...     torch.nn.ReLU(),
    ...     torch.nn.Conv2d(16, 3, 3, padding=1),
    ... )
    >>> model = wrap(backbone)
    >>> degraded = torch.rand(1, 3, 64, 64)
    >>> torch.equal(model(degraded), model.unwrap()(degraded))
    True
"""

import importlib
from typing import TYPE_CHECKING, Any

from perceive_adapter import errors
from perceive_adapter._version import __version__

if TYPE_CHECKING:
    from perceive_adapter.config import AdapterConfig
    from perceive_adapter.errors import (
        AdapterMismatchError,
        AlreadyWrappedError,
        BackboneError,
        CheckpointError,
        CompiledBackboneError,
        ConfigError,
        ImageError,
        ImageRangeWarning,
        LossInputError,
        MissingDependencyError,
        PerceiveError,
        PerceptionError,
        SiteError,
        TrainingError,
        UnseenTaskWarning,
        UntrainedPerceiverWarning,
    )
    from perceive_adapter.injection.discovery import plan_sites
    from perceive_adapter.injection.injector import PromptInjector
    from perceive_adapter.injection.model import PerceiveModel
    from perceive_adapter.injection.perception import Perception, ValueRange
    from perceive_adapter.injection.plan import Layout, Site, SitePlan
    from perceive_adapter.injection.status import AdapterStatus
    from perceive_adapter.injection.wrap import wrap
    from perceive_adapter.losses.difficulty import DifficultyAdaptiveLoss
    from perceive_adapter.perceiver.perceived import Perceived
    from perceive_adapter.perceiver.quality import QualityPerceiver

_HOMES = {
    "AdapterConfig": "config",
    "AdapterStatus": "injection.status",
    "DifficultyAdaptiveLoss": "losses.difficulty",
    "Layout": "injection.plan",
    "Perceived": "perceiver.perceived",
    "PerceiveModel": "injection.model",
    "Perception": "injection.perception",
    "PromptInjector": "injection.injector",
    "QualityPerceiver": "perceiver.quality",
    "Site": "injection.plan",
    "SitePlan": "injection.plan",
    "ValueRange": "injection.perception",
    "plan_sites": "injection.discovery",
    "wrap": "injection.wrap",
} | dict.fromkeys(errors.__all__, "errors")

__all__ = [
    "AdapterConfig",
    "AdapterMismatchError",
    "AdapterStatus",
    "AlreadyWrappedError",
    "BackboneError",
    "CheckpointError",
    "CompiledBackboneError",
    "ConfigError",
    "DifficultyAdaptiveLoss",
    "ImageError",
    "ImageRangeWarning",
    "Layout",
    "LossInputError",
    "MissingDependencyError",
    "PerceiveError",
    "PerceiveModel",
    "Perceived",
    "Perception",
    "PerceptionError",
    "PromptInjector",
    "QualityPerceiver",
    "Site",
    "SiteError",
    "SitePlan",
    "TrainingError",
    "UnseenTaskWarning",
    "UntrainedPerceiverWarning",
    "ValueRange",
    "__version__",
    "plan_sites",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
