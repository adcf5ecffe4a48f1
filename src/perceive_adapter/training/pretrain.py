"""Train the two towers of ``perceive-tiny`` from scratch, on photographs and captions of damage."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from perceive_adapter.data import FAMILIES, FAMILY_OF, KIND_OF, KINDS
from perceive_adapter.data.contents import photos_digest
from perceive_adapter.data.samples import (
    CropSampler,
    Samples,
    as_stored,
    cut,
    degrade_each,
    draw_severities,
    with_surroundings,
)
from perceive_adapter.perceiver.heads import DegradationHeads
from perceive_adapter.perceiver.quality import QualityPerceiver
from perceive_adapter.perceiver.trunk import TRUNK_NAME, StatisticsTrunk, register_trunk
from perceive_adapter.perceiver.vocabulary import WordTokenizer
from perceive_adapter.training.captions import (
    WORDS,
    grades,
    write_captions,
    write_quality_captions,
)
from perceive_adapter.training.loop import Ahead, Schedule, seeded, train
from perceive_adapter.training.tiers import tier_shares

__all__ = ["ARCHITECTURE", "SCHEDULE", "TinyTowers", "as_perceiver", "draw_samples", "pretrain"]

_CONTEXT: Final = 24
ARCHITECTURE: Final[Mapping[str, Any]] = {
    "embed_dim": 128,
    "vision_cfg": {"timm_model_name": TRUNK_NAME, "timm_pool": "", "image_size": 256},
    "text_cfg": {
        "vocab_size": len(WORDS) + 3,
        "context_length": _CONTEXT,
        "width": 128,
        "heads": 4,
        "layers": 2,
    },
}
"""Keyword arguments of the open_clip model that perceive-tiny is."""

SCHEDULE: Final = Schedule(
    steps=8_000, learning_rate=2e-3, final_learning_rate=1e-5, warmup=300, weight_decay=0.02
)
_SIZES: Final = ((64, 128), (96, 64), (128, 40), (64, 128), (192, 20))
_CAPTIONS: Final = 48  # of a batch; writing and reading one costs more than an image
_LARGEST_SCALE: Final = 30.0
_VIEWS: Final = 16


class TinyTowers(nn.Module):
    """The open_clip model and the heads while they are trained, with batch normalisation.

    Args:
        seed: of the weights; the global generators are left alone.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        import open_clip

        register_trunk()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.clip: Any = open_clip.CLIP(
                **{k: dict(v) if isinstance(v, Mapping) else v for k, v in ARCHITECTURE.items()}
            )
            self.clip.visual.trunk = StatisticsTrunk(normalised=True)
            self.heads = DegradationHeads(ARCHITECTURE["embed_dim"], KINDS)
        self.tokenize = WordTokenizer(WORDS, _CONTEXT)
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def embed(self, image: Tensor) -> Tensor:
        """Embed (B, 3, H, W) in [0, 1] to unit vectors (B, E)."""
        embedding: Tensor = self.clip.encode_image((image - self.mean) / self.std, normalize=True)
        return embedding

    def loss(self, samples: Samples, generator: torch.Generator) -> Tensor:
        """Contrast with captions of damage, rate by captions of quality, train the heads."""
        embedding = self.embed(samples.degraded)
        chosen = torch.randperm(len(embedding), generator=generator)[:_CAPTIONS]
        severity = samples.severity[chosen]
        captions = write_captions(severity, generator) + write_quality_captions(generator)
        text = self.clip.encode_text(self.tokenize(captions), normalize=True)
        damage, quality = text[: len(chosen)], text[len(chosen) :]
        scale = self.clip.logit_scale.exp().clamp(max=_LARGEST_SCALE)
        shares = tier_shares(samples.severity.amax(dim=1), quality.shape[0])
        rated = F.cross_entropy(scale * embedding @ quality.T, shares)
        told = contrast(embedding[chosen], damage, grades(severity), scale)
        return told + rated + 4 * self.heads.loss(embedding, samples.severity)

    def fused_clip(self) -> Any:
        """Return the open_clip model with plain convolutions, as it is published."""
        self.clip.visual.trunk = self.clip.visual.trunk.fused()
        with torch.no_grad():
            self.clip.logit_scale.clamp_(max=torch.tensor(_LARGEST_SCALE).log().item())
        return self.clip.eval()


def contrast(image: Tensor, text: Tensor, graded: Tensor, scale: Tensor) -> Tensor:
    """Contrast images with captions, where captions of equal content are all right.

    Source: unified contrastive learning (UniCL, CVPR 2022, https://arxiv.org/abs/2204.03610).

    Args:
        image: (B, E), unit vectors.
        text: (B, E), unit vectors, caption i of image i.
        graded: (B, D), what the captions say.
        scale: of the logits.
    """
    same = (graded[:, None] == graded[None]).all(dim=2).to(image.dtype)
    target = same / same.sum(dim=1, keepdim=True)
    logits = scale * image @ text.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def draw_samples(
    sampler: CropSampler, count: int, side: int, generator: torch.Generator
) -> Samples:
    """Draw a batch for the towers: damaged crops, some half restored, as files would hold them."""
    photos = sampler.draw(count, with_surroundings(side), generator)
    samples = degrade_each(photos, draw_severities(count, generator), generator)
    # A blend with the clean image stands for what a half-trained restorer leaves.
    remains = 0.2 + 0.5 * torch.rand(count, generator=generator)
    remains = torch.where(torch.rand(count, generator=generator) < 0.15, remains, 1.0)
    damaged = photos + remains.view(-1, 1, 1, 1) * (samples.degraded - photos)
    clean, degraded = cut((photos, as_stored(damaged, generator)), side, generator)
    return Samples(clean, degraded, samples.severity * remains[:, None])


def pretrain(
    photos: Sequence[Tensor],
    *,
    schedule: Schedule = SCHEDULE,
    seed: int = 0,
    checkpoint: Path | None = None,
    every: int = 250,
) -> TinyTowers:
    """Train the towers and heads on photographs, (3, H, W) uint8 each.

    Args:
        photos: any sizes.
        schedule: steps and learning rates.
        seed: of weights and samples.
        checkpoint: file to go on from after a kill.
        every: steps between two checkpoints.

    Raises:
        CheckpointError: ``checkpoint`` is of another run.
    """
    sampler = CropSampler(photos)
    towers = TinyTowers(seed).train()
    towers.to(memory_format=torch.channels_last)

    def draw(step: int) -> tuple[Samples, torch.Generator]:
        generator = seeded(seed, step)
        side, count = _SIZES[step % len(_SIZES)]
        return draw_samples(sampler, count, side, generator), generator

    with Ahead(draw, schedule.steps) as ahead:
        train(
            {"towers": towers},
            lambda step: towers.loss(*ahead(step)),
            schedule,
            settings={"seed": seed, "photographs": photos_digest(sampler)},
            checkpoint=checkpoint,
            every=every,
            title="pretrain",
        )
    return towers.eval()


def as_perceiver(
    towers: TinyTowers,
    *,
    words: Sequence[str] | None = None,
    context_length: int = 16,
    seed: int = 0,
    degradations: Sequence[str] = FAMILIES,
) -> QualityPerceiver:
    """Make a perceiver with untrained prompts on trained towers, which are left as they are.

    Args:
        towers: what :func:`pretrain` gave.
        words: of ``WORDS``, one for each tier; None for the paper's.
        context_length: learnable vectors in each prompt.
        seed: of the prompts.
        degradations: ``FAMILIES``, for heads that start from the towers', or none.

    Raises:
        ConfigError: an argument cannot work.
    """
    clip = copy.deepcopy(towers).fused_clip()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, file)
        perceiver = QualityPerceiver.create(
            dict(ARCHITECTURE),
            file,
            words=words,
            context_length=context_length,
            seed=seed,
            views=_VIEWS,
            degradations=degradations,
            vocabulary=WORDS,
        )
    if perceiver.heads is not None:
        _start_heads(perceiver.heads, towers.heads)
    return perceiver


@torch.no_grad()
def _start_heads(heads: DegradationHeads, trained: DegradationHeads) -> None:
    """Copy the hidden layer, and for each family the mean of its kinds' outputs."""
    heads.hidden.load_state_dict(trained.hidden.state_dict())
    for column, family in enumerate(FAMILIES):
        names = {KIND_OF[name] for name, other in FAMILY_OF.items() if other == family}
        kinds = [index for index, kind in enumerate(KINDS) if kind in names]
        for output in ("presence", "severity"):
            new, old = getattr(heads, output), getattr(trained, output)
            new.weight[column] = old.weight[kinds].mean(dim=0)
            new.bias[column] = old.bias[kinds].mean(dim=0)
