"""The ways to make one network restore more; each is trained by the same loop on the same data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import skimage.data
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from perceive_adapter import AdapterConfig, PerceiveModel, Perception, wrap
from perceive_adapter.data import FAMILIES
from perceive_adapter.data.restoration import RestorationData
from perceive_adapter.losses import ClipAwareLoss, ObjectiveWeights, RestorationObjective
from perceive_adapter.training.restoration import Perceive
from perceive_adapter.training.treated import find_treated
from restoration_rows.images import TASKS, Case
from restoration_rows.promptir import Prompted

L1 = ObjectiveWeights(l1=1.0, contrastive=0.0, clip_aware=0.0, difficulty_adaptive=0.0)
TOLD = {"degradations": len(FAMILIES), "severity": len(FAMILIES)}


Told = Callable[[PerceiveModel, Tensor, Tensor], Perception]
"""From a wrapped model, degraded images and their true severity (B, D) to what it is told."""


@dataclass(frozen=True)
class Row:
    """How a model is made of a backbone, and what its objective is.

    Args:
        make: from the trained backbone to what is trained.
        weights: of the objective.
        perceive: what a wrapped model is told of a case in place of what it perceives.
        like: row whose learning rate it takes over; None tunes its own.
        rates: that are tried, where it tunes its own.
        tasks: that it is trained on.
        ratios: how often each is drawn, 1 where none is given.
        perceives: whether the weights of the perceiver decide what becomes of it.
    """

    make: Callable[[nn.Module, RestorationData], nn.Module]
    weights: ObjectiveWeights = L1
    perceive: Told | None = None
    like: str | None = "wrapped"
    tasks: tuple[str, ...] = TASKS
    ratios: Mapping[str, float] = field(default_factory=dict)
    rates: tuple[float, ...] = (1e-3, 2e-3, 5e-3, 1e-2)
    perceives: bool = True

    def restore(self, model: nn.Module) -> Callable[[Case], Tensor]:
        """Return what restores a case."""
        told, device = self.perceive, next(model.parameters()).device

        def restored(case: Case) -> Tensor:
            degraded = case.degraded.to(device)
            if told is None or not isinstance(model, PerceiveModel):
                return model(degraded).cpu()
            perception = told(model, degraded, case.severity.to(device))
            return model(degraded, perception=perception).cpu()

        return restored

    def told(self) -> Perceive | None:
        """Return what a batch's perception is while the row trains."""
        told = self.perceive
        if told is None:
            return None
        return lambda model, samples: told(model, samples.context, samples.severity)

    def objective(self, model: nn.Module) -> RestorationObjective:
        """Build the objective."""
        aware = None
        if self.weights.clip_aware:
            assert isinstance(model, PerceiveModel)
            aware = ClipAwareLoss(model.perceiver)
        return RestorationObjective(self.weights, clip_aware=aware)


def lora(backbone: nn.Module, _: RestorationData) -> nn.Module:
    """peft's LoRA on every dense layer, of the lowest rank that trains as much as `wrap` would."""
    dense = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }
    of_rank_one = sum(m.weight[0].numel() + m.weight.shape[0] for m in dense.values())
    ours = wrap(backbone)
    trained = ours.status().trainable
    ours.unwrap()
    rank = -(-trained // of_rank_one)
    return get_peft_model(backbone, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(dense)))


def everything(backbone: nn.Module, _: RestorationData) -> nn.Module:
    return backbone.requires_grad_(True)


def wrapped(
    *, treat: bool = True, unfreeze: bool = False, perceiver: Any = None, **config: Any
) -> Callable[[nn.Module, RestorationData], nn.Module]:
    def make(backbone: nn.Module, data: RestorationData) -> nn.Module:
        model = wrap(backbone, config=AdapterConfig(**config), perceiver=perceiver)
        if treat:
            model.treat(*find_treated(model, data))
        if unfreeze:
            model.unfreeze("**")
        return model

    return make


def oracle(*, severity: bool) -> Told:
    """The true degradations, and their true severity or the same for all."""

    def told(_: PerceiveModel, degraded: Tensor, truth: Tensor) -> Perception:
        present = (truth > 0).float()
        return Perception(degradations=present, severity=truth if severity else present / 2)

    return told


def nothing(model: PerceiveModel, degraded: Tensor, _: Tensor) -> Perception:
    """The same for every image."""
    seen = model.perceive(degraded)
    return replace(seen, **{name: torch.zeros_like(value) for name, value in seen.known().items()})


def shuffled(model: PerceiveModel, degraded: Tensor, _: Tensor) -> Perception:
    """What is in the image is told of another one: of the batch, or of a photograph of a cat."""
    seen = model.perceive(degraded)
    if len(degraded) > 1:
        return replace(seen, semantic=seen.semantic.roll(1, 0))
    cat = torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1)[None].to(degraded) / 255
    return replace(seen, semantic=model.perceive(cat).semantic)


TREATED = tuple(FAMILIES.index(name) for name in ("haze", "rain", "low_light"))
MIXED = ("gaussian_noise+rain", "haze+low_light")
WITH_EMBEDDING = {"compact": AdapterConfig.compact_dim, "tiers": 3, **TOLD, "embedding": 128}
ORACLE = wrapped(treat=False, perceiver=False, sources=TOLD, treats=TREATED)

ROWS: dict[str, Row] = {
    "LoRA": Row(lora, like=None, perceives=False),
    "everything": Row(everything, like=None, rates=(2e-4, 5e-4, 1e-3, 2e-3), perceives=False),
    "wrapped": Row(wrapped(), like=None),
    # What it is steered by
    "works everywhere": Row(wrapped(treat=False)),
    "oracle": Row(ORACLE, perceive=oracle(severity=False), perceives=False),
    "oracle with severity": Row(ORACLE, perceive=oracle(severity=True), perceives=False),
    "zero perception": Row(wrapped(treat=False), perceive=nothing),
    "without the perceiver": Row(wrapped(treat=False, perceiver=False), perceives=False),
    "with the embedding": Row(wrapped(perceiver="perceive-tiny", sources=WITH_EMBEDDING)),
    "without compact features": Row(wrapped(compact_dim=0)),
    "with semantics": Row(wrapped(semantic="perceive-tiny")),
    "with shuffled semantics": Row(wrapped(semantic="perceive-tiny"), perceive=shuffled),
    # What it is made of
    "low rank alone": Row(wrapped(level=None)),
    "modulation alone": Row(wrapped(layer=None)),
    "with cross-attention": Row(wrapped(level="cross_attention")),
    # What it is trained by
    "with the contrastive loss": Row(wrapped(), replace(L1, contrastive=0.1)),
    "with the difficulty-adaptive loss": Row(wrapped(), replace(L1, difficulty_adaptive=0.1)),
    "with the CLIP-aware loss": Row(wrapped(), replace(L1, clip_aware=0.05)),
    "with mixtures": Row(wrapped(), tasks=(*TASKS, *MIXED), ratios=dict.fromkeys(MIXED, 0.5)),
    # Nothing frozen
    "PromptIR's prompts, everything": Row(
        lambda backbone, _: Prompted(backbone),
        like=None,
        rates=(2e-4, 5e-4, 1e-3, 2e-3),
        perceives=False,
    ),
    "wrapped, everything": Row(wrapped(unfreeze=True), like="everything"),
}
