"""Train the two towers of ``perceive-tiny`` on photographs and captions of damage."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

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
    fractions,
    permutation,
    with_surroundings,
)
from perceive_adapter.data.triplets import Blend, Milder
from perceive_adapter.errors import ConfigError
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
from perceive_adapter.training.loop import Prefetcher, Schedule, seeded, train
from perceive_adapter.training.tiers import tier_shares

__all__ = [
    "ARCHITECTURE",
    "FROM_OTHERS",
    "FROM_SCRATCH",
    "Batch",
    "TinyTowers",
    "as_perceiver",
    "blended",
    "draw_batch",
    "draw_triplets",
    "pretrain",
]

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

FROM_SCRATCH: Final = Schedule(
    steps=16_000, learning_rate=2e-3, final_learning_rate=1e-5, warmup=300, weight_decay=0.02
)
FROM_OTHERS: Final = Schedule(
    steps=12_000, learning_rate=5e-4, final_learning_rate=1e-5, warmup=300, weight_decay=0.02
)
_TIERS: Final = 3
_RATED: Final = 2.0  # weight of the captions of quality
_TRIPLETS: Final = 0.5  # share of the images that belong to triplets
_BLENDED: Final = 0.15  # share of the images that are half restored
_DARK: Final = 0.04  # share of the crops that are dark scenes, more than there are in albums
_SIZES: Final = ((64, 128), (96, 64), (64, 128), (128, 40), (64, 128), (192, 20))
_CAPTIONS: Final = 48  # of a batch; writing and reading one costs more than an image
_LARGEST_SCALE: Final = 30.0
_VIEWS: Final = 16
_FAMILY_OF_KIND: Final = {KIND_OF[name]: family for name, family in FAMILY_OF.items()}


class Batch(NamedTuple):
    """What the towers are trained on in one step.

    Args:
        image: (B, 3, H, W) in [0, 1].
        severity: (B, K) in [0, 1], one column for each of ``KINDS``, 0 where absent.
        tiers: (B, 3), how much of each tier an image is, from low to high.
        captioned: (C,), the images that have captions.
        captions: (C + 3, L), tokens of a caption for each of those, then of one for each tier.
    """

    image: Tensor
    severity: Tensor
    tiers: Tensor
    captioned: Tensor
    captions: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class TinyTowers(nn.Module):
    """The open_clip model and the heads while they are trained.

    With batch normalisation where they are trained from scratch; it is folded into the weights of
    those that they start from.

    Args:
        seed: of the weights that are drawn; the global generators are left alone.
        start: perceiver whose towers and heads to start from; None draws them.

    Raises:
        ConfigError: ``start`` has other towers.
    """

    def __init__(self, seed: int = 0, start: QualityPerceiver | None = None) -> None:
        super().__init__()
        import open_clip

        register_trunk()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.clip: Any = open_clip.CLIP(
                **{k: dict(v) if isinstance(v, Mapping) else v for k, v in ARCHITECTURE.items()}
            )
            self.clip.visual.trunk = StatisticsTrunk(normalised=start is None)
            self.heads = DegradationHeads(ARCHITECTURE["embed_dim"], KINDS)
        if start is not None:
            self._start_from(start)
        self.tokenize = WordTokenizer(WORDS, _CONTEXT)
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    @torch.no_grad()
    def _start_from(self, start: QualityPerceiver) -> None:
        """Copy a perceiver's towers, and its heads if it has those of ``FAMILIES``."""
        if start.config.clip != ARCHITECTURE or start.config.vocabulary != WORDS:
            raise ConfigError(
                f"the perceiver to start from has the towers {start.config.clip!r}: expected those "
                "of perceive-tiny, or of one that was trained with --clip perceive-tiny."
            )
        towers, clip = start.towers, self.clip
        clip.visual.load_state_dict(towers.visual.state_dict())
        clip.transformer.load_state_dict(towers.text.transformer.state_dict())
        clip.ln_final.load_state_dict(towers.text.norm.state_dict())
        clip.token_embedding.load_state_dict(cast(nn.Module, towers.tokens).state_dict())
        clip.text_projection.copy_(cast(nn.Linear, towers.text.projection).weight.T)
        # A perceiver keeps the positions that its prompts take; those of longer captions are drawn.
        clip.positional_embedding[: len(towers.text.positions)] = towers.text.positions
        clip.logit_scale.copy_(towers.logit_scale)
        if start.heads is not None and start.heads.names == FAMILIES:
            self.heads.hidden.load_state_dict(start.heads.hidden.state_dict())
            family = [FAMILIES.index(_FAMILY_OF_KIND[kind]) for kind in KINDS]
            for name in ("presence", "severity"):
                new, old = getattr(self.heads, name), getattr(start.heads, name)
                new.weight.copy_(old.weight[family])
                new.bias.copy_(old.bias[family])

    def embed(self, image: Tensor) -> Tensor:
        """Embed (B, 3, H, W) in [0, 1] to unit vectors (B, E)."""
        embedding: Tensor = self.clip.encode_image((image - self.mean) / self.std, normalize=True)
        return embedding

    def loss(self, batch: Batch) -> Tensor:
        """Contrast with captions of damage, rate by captions of quality, train the heads."""
        embedding = self.embed(batch.image)
        text = self.clip.encode_text(batch.captions, normalize=True)
        damage, quality = text[: len(batch.captioned)], text[len(batch.captioned) :]
        scale = self.clip.logit_scale.exp().clamp(max=_LARGEST_SCALE)
        rated = F.cross_entropy(scale * embedding @ quality.T, batch.tiers)
        graded = grades(batch.severity[batch.captioned])
        told = contrast(embedding[batch.captioned], damage, graded, scale)
        return told + _RATED * rated + 4 * self.heads.loss(embedding, batch.severity)

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


def draw_batch(
    sampler: CropSampler,
    count: int,
    side: int,
    tokenize: WordTokenizer,
    generator: torch.Generator,
) -> Batch:
    """Draw a batch for the towers, half of the images damaged in ways of their own.

    The others are triplets as stage 1 sees them: a damaged image, one half restored, a clean one.
    What stage 1 has to tell apart, the towers must have kept apart.
    """
    scenes = int(count * _TRIPLETS / _TIERS)
    photos = sampler.draw(count - 2 * scenes, with_surroundings(side), generator)
    alone = degrade_each(
        photos[scenes:], draw_severities(len(photos) - scenes, generator), generator
    )
    # A blend with the clean image stands for what a half-trained restorer leaves.
    remains = 0.2 + 0.5 * fractions((len(photos) - scenes,), generator)
    half_restored = fractions((len(remains),), generator) < _BLENDED
    alone = blended(alone, torch.where(half_restored, remains, 1.0))
    samples = [*draw_triplets(photos[:scenes], generator), alone]
    severity = torch.cat([part.severity for part in samples])
    stored = as_stored(torch.cat([part.degraded for part in samples]), generator)
    (image,) = cut((stored,), side, generator)
    tiers = tier_shares(severity.amax(dim=1), _TIERS)
    tiers[: 3 * scenes] = torch.eye(_TIERS, device=tiers.device).repeat_interleave(scenes, dim=0)
    captioned = permutation(count, generator)[:_CAPTIONS]
    captions = write_captions(severity[captioned], generator) + write_quality_captions(generator)
    return Batch(image, severity, tiers, captioned, tokenize(captions))


def draw_triplets(photos: Tensor, generator: torch.Generator) -> tuple[Samples, Samples, Samples]:
    """Make the three qualities of each photograph: damaged, half of that or milder, and clean.

    Args:
        photos: (B, 3, H, W) in [0, 1].
        generator: source of randomness.

    Returns:
        Low, medium and high, with what is wrong with each.
    """
    count = len(photos)
    drawn = [one for one in draw_severities(2 * count, generator, low=0.5) if one][:count]
    low = degrade_each(photos, drawn, generator)
    milder = [{name: Milder.share * value for name, value in one.items()} for one in drawn]
    medium = degrade_each(photos, milder, generator)
    half = blended(low, torch.full((count,), Blend.remains, device=photos.device))
    take = fractions((count,), generator) < 0.5
    degraded = torch.where(take.view(-1, 1, 1, 1), half.degraded, medium.degraded)
    severity = torch.where(take[:, None], half.severity, medium.severity)
    clean = Samples(photos, photos, torch.zeros_like(severity))
    return low, Samples(photos, degraded, severity), clean


def blended(samples: Samples, remains: Tensor) -> Samples:
    """Take back part of the damage (B,), and say so in the severity."""
    left = remains.view(-1, 1, 1, 1) * (samples.degraded - samples.clean)
    return Samples(samples.clean, samples.clean + left, samples.severity * remains[:, None])


def pretrain(
    photos: Sequence[Tensor],
    *,
    start: QualityPerceiver | None = None,
    schedule: Schedule | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    every: int = 250,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> TinyTowers:
    """Train the towers and heads on photographs, (3, H, W) uint8 each.

    Args:
        photos: any sizes.
        start: perceiver whose towers to start from; None trains them from scratch.
        schedule: steps and learning rates; None for ``FROM_SCRATCH`` or ``FROM_OTHERS``.
        seed: of weights and samples.
        checkpoint: file to go on from after a kill.
        every: steps between two checkpoints.
        device: where the towers are trained; they come back on the CPU.
        workers: processes that draw samples; 0 for a thread.

    Raises:
        ConfigError: ``start`` has other towers.
        CheckpointError: ``checkpoint`` is of another run.
    """
    schedule = schedule or (FROM_SCRATCH if start is None else FROM_OTHERS)
    sampler = CropSampler(photos, dark=_DARK)
    towers = TinyTowers(seed, start).train()
    settings: dict[str, Any] = {"seed": seed, "photographs": photos_digest(sampler)}
    settings |= {"sizes": _SIZES, "triplets": _TRIPLETS}
    if start is not None:
        settings["start"] = start.fingerprint()
    towers.to(device).to(memory_format=torch.channels_last)

    def draw(step: int) -> Batch:
        side, count = _SIZES[step % len(_SIZES)]
        return draw_batch(sampler, count, side, towers.tokenize, seeded(seed, step))

    with Prefetcher(draw, schedule.steps, workers) as prefetched:
        train(
            {"towers": towers},
            lambda step: towers.loss(prefetched(step).to(device)),
            schedule,
            settings=settings,
            checkpoint=checkpoint,
            every=every,
            title="pretrain",
        )
    return towers.cpu().eval()


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
        kinds = [i for i, kind in enumerate(KINDS) if _FAMILY_OF_KIND[kind] == family]
        for output in ("presence", "severity"):
            new, old = getattr(heads, output), getattr(trained, output)
            new.weight[column] = old.weight[kinds].mean(dim=0)
            new.bias[column] = old.bias[kinds].mean(dim=0)
