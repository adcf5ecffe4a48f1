"""A perceiver of image quality: learnable tier prompts on a frozen CLIP."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from perceive_adapter.data.views import flipped_views, native_views
from perceive_adapter.errors import ConfigError, LossInputError, UntrainedPerceiverWarning
from perceive_adapter.hub import PushOptions
from perceive_adapter.perceiver import official, saving
from perceive_adapter.perceiver.checks import check_finite, check_image, check_range
from perceive_adapter.perceiver.config import Architecture, PerceiverConfig
from perceive_adapter.perceiver.heads import DegradationHeads
from perceive_adapter.perceiver.maps import quality_map
from perceive_adapter.perceiver.perceived import Perceived
from perceive_adapter.perceiver.prompts import TierPrompts, tier_words
from perceive_adapter.perceiver.towers import ClipTowers, build_clip, embed_words
from perceive_adapter.precision import full_precision
from perceive_adapter.warning import warn

__all__ = ["QualityPerceiver"]


class _EncodedText(NamedTuple):
    """Features of prompts, and by what it is told whether they are still those of the context."""

    context: Tensor
    key: tuple[object, ...]
    values: Tensor
    features: Tensor


def _version(tensor: Tensor) -> tuple[object, ...]:
    """By what it is told that a tensor is the one that it was."""
    count = 0 if tensor.is_inference() else tensor._version
    return count, tensor.data_ptr(), tensor.dtype, tensor.device


class QualityPerceiver(nn.Module):
    """Tell the quality tier of an image with learnable prompts on a frozen CLIP.

    Make one with :meth:`create` or :meth:`from_pretrained`. The logits are
    ``logit_scale * cos(image, prompt)``, with CLIP's own scale, in training (:meth:`tier_loss`), in
    scoring and in any loss that is built on ``tiers``. The prompts' context trains, and the heads
    that tell degradations, if there are any (``heads.loss``, as :meth:`tier_loss` trains the
    context alone); the towers stay frozen and in eval mode. Gradients reach the image, so a frozen
    perceiver serves in a loss.

    An image is perceived through at most ``config.views`` square crops at native resolution
    (:func:`~perceive_adapter.data.views.native_views`), of the size that the image tower takes:
    noise is not averaged away, and memory does not grow with the image. Their unit embeddings are
    averaged. Only what is smaller than the tower's input is enlarged. ``perceive-tiny`` enlarges
    nothing: an image is cut into tiles (:func:`~perceive_adapter.data.views.flipped_views`) whose
    sides are multiples of its stride, flipped in turn.

    Text features are computed once while the context is frozen (``requires_grad_(False)``, as
    :meth:`from_pretrained` leaves it), and at every call while it trains.

    Source: stage 1 of Perceive-IR (IEEE TIP 2025, https://arxiv.org/abs/2408.15994). The heads that
    tell which degradations are present, and how severe they are, are beyond the paper.

    Attributes:
        lower_better: False, since a higher score is better.
        score_range: (0.0, 1.0).

    Example:
        >>> perceiver = QualityPerceiver.create(
        ...     clip={
        ...         "embed_dim": 16,
        ...         "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        ...         "text_cfg": {"width": 16, "heads": 2, "layers": 1},
        ...     },
        ...     pretrained=None,
        ... )
        >>> perceiver.tiers
        ('low', 'medium', 'high')
        >>> images = torch.rand(2, 3, 48, 64)
        >>> perceiver.tier_loss(images, torch.tensor([0, 2])).shape
        torch.Size([])
        >>> perceiver.logits(images).shape
        torch.Size([2, 3])
    """

    lower_better: ClassVar[bool] = False
    score_range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __init__(
        self,
        towers: ClipTowers,
        prompts: TierPrompts,
        config: PerceiverConfig,
        heads: DegradationHeads | None = None,
    ) -> None:
        super().__init__()
        self.towers = towers
        self.prompts = prompts
        self.heads = heads
        self.config = config
        self._text_cache: _EncodedText | None = None
        self._scored = False

    @classmethod
    @torch.inference_mode(False)  # tensors that are made there can do little elsewhere
    def create(
        cls,
        clip: str | Architecture = "ViT-B-32-quickgelu",
        pretrained: str | os.PathLike[str] | None = "openai",
        tiers: Sequence[str] = ("low", "medium", "high"),
        words: Sequence[str] | None = None,
        context_length: int = 16,
        seed: int = 0,
        views: int = 4,
        degradations: Sequence[str] = (),
        vocabulary: Sequence[str] | None = None,
    ) -> "QualityPerceiver":
        """Make a perceiver with untrained prompts.

        Args:
            clip: name of an open_clip model, or its keyword arguments: ``embed_dim``,
                ``vision_cfg``, ``text_cfg``, ``quick_gelu``, ``custom_text``.
            pretrained: a tag of open_clip (downloaded once), a file of weights, or None for random
                ones. OpenAI's weights need a model with QuickGELU.
            tiers: names from worst to best.
            words: for each tier, the word that its prompt starts from; None for the paper's words
                where the tiers are the paper's.
            context_length: learnable vectors in each prompt.
            seed: of the prompts, and of the towers where ``pretrained`` is None; the global
                generators are left alone.
            views: largest number of crops that stand for an image.
            degradations: names of those that heads will tell apart, such as
                ``perceive_adapter.data.FAMILIES``; untrained, like the prompts.
            vocabulary: words of the text tower, where it was trained with a reduced vocabulary.

        Raises:
            ConfigError: an argument cannot work, or the weights do not belong to the model.
            CheckpointError: the weights cannot be downloaded or read.
        """
        own_weights = pretrained is None or os.path.isfile(pretrained)
        several = {"tiers": tiers, "words": words, "degradations": degradations}
        for name, given in (several | {"vocabulary": vocabulary}).items():
            if isinstance(given, str):
                raise ConfigError(f"{name}={given!r}: expected several names, as [{given!r}, ...]")
        config = PerceiverConfig(
            clip=clip,
            pretrained=None if own_weights else str(pretrained),
            tiers=tuple(tiers),
            words=tier_words(tiers, words),
            context_length=context_length,
            views=views,
            degradations=tuple(degradations),
            vocabulary=None if vocabulary is None else tuple(vocabulary),
        )
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            model = build_clip(clip, pretrained)
            towers = ClipTowers(model, context_length + 2, config.vocabulary)
            words_start_end = embed_words(model, config.words, config.vocabulary)
            names = config.degradations
            heads = DegradationHeads(towers.embedding_dim, names) if names else None
        prompts = TierPrompts.draw(*words_start_end, length=context_length, seed=seed)
        return cls(towers, prompts, config, heads)

    @classmethod
    def from_official_prompts(
        cls,
        file: str | os.PathLike[str],
        *,
        clip: str | Architecture = "ViT-B-32-quickgelu",
        pretrained: str | os.PathLike[str] | None = "openai",
        views: int = 4,
    ) -> "QualityPerceiver":
        """Import trained prompts from a file in the format of Perceive-IR's release.

        The file is read without running any code in it. The perceiver is frozen, as one that was
        loaded is; :meth:`save_pretrained` keeps it in this package's format.

        Args:
            file: what ``torch.save`` wrote, a dict with the key ``prompt_learner``: ``context``
                (3, 16, 512), ``token_prefix``, ``token_suffix``, ``tokenized_prompts``; tiers low,
                medium, high.
            clip: the CLIP that the prompts were trained on.
            pretrained: its weights, as in :meth:`create`.
            views: largest number of crops that stand for an image.

        Raises:
            CheckpointError: the file cannot be read, needs more than tensors, holds something
                else, or belongs to another CLIP.
            ConfigError: an argument cannot work.
        """
        prompts = official.read_prompts(file)
        length = prompts.context.shape[1]
        perceiver = cls.create(clip, pretrained, context_length=length, views=views)
        official.put_prompts(perceiver.prompts, prompts, os.fspath(file))
        perceiver.prompts.requires_grad_(False)
        return perceiver

    @classmethod
    @torch.inference_mode(False)
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        is_trainable: bool = False,
    ) -> "QualityPerceiver":
        """Load a folder that :meth:`save_pretrained` wrote, or a Hub repository of one.

        Args:
            name_or_path: ``perceive-tiny``, which is bundled, a folder, ``user/repo``, or
                ``user/repo@revision``.
            revision: branch, tag or commit of the repository.
            token: access token to the Hub.
            cache_dir: cache in place of huggingface_hub's own.
            local_files_only: make no request for the repository.
            is_trainable: whether the prompts' context and the heads require a gradient.

        Raises:
            CheckpointError: there is no such perceiver, it is damaged, or open_clip now builds
                another CLIP than the one that it was saved with.
        """
        loaded = saving.load(
            name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        perceiver = cls(*loaded.parts)
        perceiver.requires_grad_(False)
        for part in (perceiver.prompts, perceiver.heads):
            if part is not None:
                part.requires_grad_(is_trainable)
        saving.check_probe(perceiver, loaded)
        return perceiver

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, figures: Mapping[str, float | str] | None = None
    ) -> Path:
        """Write ``perceiver_config.json``, ``perceiver_model.safetensors`` and a model card.

        The towers are saved too unless open_clip can name and load their weights. A ``README.md``
        that somebody wrote or edited is kept, with a warning.

        Args:
            folder: made if it does not exist.
            figures: what was measured of this perceiver, for the model card.

        Raises:
            ConfigError: a figure is not finite.
            CheckpointError: ``folder`` is a file, or cannot be made or written to.
        """
        return saving.save(self, folder, figures)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        figures: Mapping[str, float | str] | None = None,
        **options: Unpack[PushOptions],
    ) -> str:
        """Save the perceiver and upload it to the Hugging Face Hub.

        A ``README.md`` of the repository that somebody wrote or edited is kept, with a warning.

        Args:
            repo_id: ``user/repo``.
            figures: what was measured of this perceiver, for the model card.
            **options: of :func:`perceive_adapter.hub.push_folder`: private, token, revision, ...

        Returns:
            URL of the commit.

        Raises:
            CheckpointError: the Hub refuses or cannot be reached.
        """
        return saving.push(self, repo_id, figures, **options)

    def fingerprint(self) -> str:
        """Return the SHA-256 of what decides a score, in 64 hexadecimal digits.

        It covers the prompts, the heads and both towers in their present dtype, the CLIP's name or
        arguments, the names of tiers and degradations, and the views. It reads all weights: about a
        second for a ViT-B/32.
        """
        return saving.fingerprint(self)

    @property
    def tiers(self) -> tuple[str, ...]:
        """Names of the tiers, from worst to best."""
        return self.config.tiers

    @property
    def degradations(self) -> tuple[str, ...]:
        """Names of the degradations that it tells apart; none where it has no heads."""
        return self.config.degradations

    @property
    def embedding_dim(self) -> int:
        """Width E of the embedding."""
        return self.towers.embedding_dim

    @property
    def trained(self) -> bool:
        """Whether the prompts differ from those that were drawn."""
        return self.prompts.trained

    def forward(self, image: Tensor) -> Perceived:
        """Perceive images.

        Args:
            image: (B, 3, H, W), RGB in [0, 1], floating point, any size.

        Returns:
            Score, tier probabilities, presence and severity of the degradations, and embedding, in
            single precision or better.

        Raises:
            ImageError: the image has another shape or dtype, is empty, or, on a CPU, has the values
                of 8-bit images or is not finite.

        Warns:
            ImageRangeWarning: on a CPU, where the image has the values of one in [-1, 1].
            UntrainedPerceiverWarning: once, where the prompts were never trained.
        """
        self._warn_if_untrained()
        embedding = self.embed(image)
        tiers = self.tier_logits(embedding).softmax(dim=1)
        check_finite(tiers)
        ranks = torch.linspace(0, 1, len(self.tiers), dtype=tiers.dtype, device=tiers.device)
        presence = severity = tiers.new_zeros(len(tiers), 0)
        if self.heads is not None:
            presence, severity = (logits.sigmoid() for logits in self.heads(embedding))
        return Perceived((tiers * ranks).sum(dim=1), tiers, presence, severity, embedding)

    def quality_map(self, image: Tensor, patch: int | None = None) -> Tensor:
        """Score the image patch by patch, without gradients.

        Args:
            image: (B, 3, H, W), RGB in [0, 1], floating point, any size.
            patch: side of a patch in pixels, 16 or more; patches overlap by half. None takes 64,
                or the size of the image tower where it takes no other.

        Returns:
            (B, h, w) scores in [0, 1], one for each patch, from the top left on.

        Raises:
            ImageError: as for calling the perceiver.
            ConfigError: ``patch`` is too small.
        """
        return quality_map(self, image, patch)

    def logits(self, image: Tensor) -> Tensor:
        """Return ``logit_scale * cos(image, prompt)``, (B, K), for images (B, 3, H, W) in [0, 1].

        Raises:
            ImageError: as for calling the perceiver, except that NaN is not looked for.
        """
        return self.tier_logits(self.embed(image))

    def tier_loss(self, image: Tensor, tier: Tensor) -> Tensor:
        """Return stage 1's loss, the cross entropy over tiers, a scalar.

        Args:
            image: (B, 3, H, W), RGB in [0, 1].
            tier: (B,), int64, index into :attr:`tiers`.

        Raises:
            ImageError: as for :meth:`logits`.
            LossInputError: ``tier`` does not have one index for each image, or, on a CPU, one that
                names no tier.
        """
        if tier.shape != image.shape[:1] or tier.dtype != torch.int64:
            raise LossInputError(
                f"tier has shape {tuple(tier.shape)} and dtype {tier.dtype} for images of shape "
                f"{tuple(image.shape)}: expected one int64 index into {self.tiers} for each image."
            )
        if tier.device.type == "cpu" and not ((tier >= 0) & (tier < len(self.tiers))).all():
            raise LossInputError(
                f"tier has values from {tier.min()} to {tier.max()}: expected indices into "
                f"{self.tiers}, from 0 to {len(self.tiers) - 1}."
            )
        return F.cross_entropy(self.logits(image), tier)

    def embed(self, image: Tensor) -> Tensor:
        """Return the embedding (B, E), unit vectors, of images (B, 3, H, W), RGB in [0, 1].

        Raises:
            ImageError: as for :meth:`logits`.
        """
        check_image(image)
        if self.towers.takes_any_size:
            largest, multiple = min(self.towers.image_size), self.towers.side_multiple
            views = flipped_views(image, largest, self.config.views, multiple)
        else:
            # Square crops, so that an image narrower than the tower's input is not distorted.
            size = min(*self.towers.image_size, *image.shape[-2:])
            views = native_views(image, size, self.config.views)
            for side in views.shape[-2:]:  # torch.export is told what the tower asks for
                torch._check(side == size)
        # Contiguous, since the same pixels must give the same bits whatever their strides are.
        check_range(views)
        embeddings = self.towers.encode_image(views.flatten(0, 1).contiguous())
        embeddings = full_precision(embeddings)
        return F.normalize(embeddings.reshape(*views.shape[:2], -1).mean(dim=1), dim=1)

    def text_features(self) -> Tensor:
        """Return the features of the prompts, (K, E), unit vectors."""
        context = self.prompts.context
        if context.requires_grad or torch.compiler.is_compiling():
            return self.towers.encode_prompts(self.prompts())
        kept = not context.is_inference()  # such a tensor does not count its versions
        decisive = (context, self.prompts.start, self.prompts.end, *self.towers.text.parameters())
        key = tuple(map(_version, decisive))
        cached = self._text_cache
        if (
            kept
            and cached is not None
            and cached.context is context
            and cached.key == key
            # Writing to .data changes no version; on a GPU, a look at the values would wait for it.
            and (context.device.type != "cpu" or torch.equal(cached.values, context))
        ):
            return cached.features
        # Out of the caller's modes, which later calls need not share.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(context.device.type, enabled=False),
        ):
            features = self.towers.encode_prompts(self.prompts())
            values = context.detach().clone()
        self._text_cache = _EncodedText(context, key, values, features) if kept else None
        return features

    def tier_logits(self, embedding: Tensor) -> Tensor:
        """Return the logits (B, K) of embeddings (B, E) that :meth:`embed` gave."""
        # A sum of products rather than a matrix product, which autocast would round to half.
        text = self.text_features().to(embedding.dtype)
        cosine = (embedding.unsqueeze(1) * text).sum(dim=2)
        return self.towers.logit_scale.to(embedding.dtype).exp() * cosine

    def _warn_if_untrained(self) -> None:
        if torch.compiler.is_compiling() or self._scored:
            return
        self._scored = True
        if not self.trained:
            warn(
                "this perceiver's prompts were never trained, so its scores mean nothing yet. "
                "Train them with `perceive-adapter train-perceiver`, or with tier_loss in your own "
                "loop, or load a trained perceiver with from_pretrained.",
                UntrainedPerceiverWarning,
            )
