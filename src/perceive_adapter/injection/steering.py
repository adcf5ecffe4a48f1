"""The frozen models that perceive for an adapter, and what of them steers its prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from perceive_adapter.errors import ConfigError, PerceptionError
from perceive_adapter.injection.injector import PromptInjector
from perceive_adapter.injection.perception import Perception
from perceive_adapter.injection.semantic import SemanticGuidance
from perceive_adapter.perceiver.quality import QualityPerceiver
from perceive_adapter.weights import fingerprint

__all__ = ["Steering", "check_sources", "see", "widths", "with_compact"]


@dataclass(frozen=True)
class Steering:
    """What perceives in front of a backbone.

    The fingerprints are of the weights as they were given: ``.to(dtype)`` casts them later, and
    they are the same models still.

    Args:
        perceiver: or None.
        perceiver_name: folder or repository that it was loaded by, or None.
        semantic: frozen vision model, or None.
        perceiver_fingerprint: of the perceiver, where it is known; computed else.
        semantic_fingerprint: of the semantic model's tower, likewise.
    """

    perceiver: QualityPerceiver | None = None
    perceiver_name: str | None = None
    semantic: SemanticGuidance | None = None
    perceiver_fingerprint: str | None = None
    semantic_fingerprint: str | None = None

    def __post_init__(self) -> None:
        if self.perceiver is not None and self.perceiver_fingerprint is None:
            object.__setattr__(self, "perceiver_fingerprint", self.perceiver.fingerprint())
        if self.semantic is not None and self.semantic_fingerprint is None:
            object.__setattr__(self, "semantic_fingerprint", fingerprint(self.semantic.tower))


def widths(perceiver: QualityPerceiver | None, semantic: SemanticGuidance | None) -> dict[str, int]:
    """Return the fields of a perception that these models tell, and how wide they are."""
    told: dict[str, int] = {}
    if perceiver is not None:
        told |= {"tiers": len(perceiver.tiers), "embedding": perceiver.embedding_dim}
        if kinds := len(perceiver.degradations):
            told |= {"degradations": kinds, "severity": kinds}
    if semantic is not None:
        told["semantic"] = semantic.dim
    return told


def check_sources(sources: Mapping[str, int], told: Mapping[str, int]) -> None:
    """Raise where what is told has another width than a source; others may be given later.

    Raises:
        ConfigError: a width differs.
    """
    for name, width in sources.items():
        if width != told.get(name, width):
            raise ConfigError(
                f"AdapterConfig(sources=...) says that {name} has width {width}, and what perceives"
                f" here tells {told[name]}: expected that, or no sources, which are found then"
            )


def see(
    perceiver: QualityPerceiver | None, semantic: SemanticGuidance | None, unit: Tensor
) -> dict[str, Tensor]:
    """Return what all adapters share of a perception, without gradients.

    Args:
        perceiver: or None.
        semantic: or None.
        unit: images (B, C, H, W) in [0, 1].

    Raises:
        PerceptionError: they are neither RGB nor gray.
    """
    fields: dict[str, Tensor] = {}
    if perceiver is None and semantic is None:
        return fields
    rgb = _as_rgb(unit)
    with torch.no_grad():
        if perceiver is not None:
            seen = perceiver(rgb)
            for name in ("tiers", "degradations", "severity", "embedding"):
                if getattr(seen, name).shape[1]:  # a perceiver may tell no degradations
                    fields[name] = getattr(seen, name)
        if semantic is not None:
            fields["semantic"] = semantic(rgb)
    return fields


def with_compact(
    shared: Mapping[str, Tensor], injector: PromptInjector, unit: Tensor
) -> Perception:
    """Add an adapter's own compact features of images in [0, 1], with gradient."""
    own = {} if injector.encoder.compact is None else injector.perceive(unit).known()
    return Perception(**shared, **own)


def _as_rgb(image: Tensor) -> Tensor:
    if image.shape[1] == 1:
        return image.expand(-1, 3, -1, -1)
    if image.shape[1] == 3:
        return image
    raise PerceptionError(
        f"a perceiver sees RGB or gray images, and this backbone takes {image.shape[1]} channels; "
        "wrap it with perceiver=False"
    )
