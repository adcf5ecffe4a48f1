"""The two frozen towers of a CLIP, built by open_clip, which is imported only when one is built."""

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceive_adapter.errors import CheckpointError, ConfigError
from perceive_adapter.perceiver.config import Architecture
from perceive_adapter.perceiver.trunk import register_trunk
from perceive_adapter.perceiver.vocabulary import WordTokenizer
from perceive_adapter.precision import full_precision

__all__ = ["ClipTowers", "PromptEncoder", "build_clip", "embed_words"]

_VOCABULARY = 49_408


class PromptEncoder(nn.Module):
    """CLIP's text tower, run on token embeddings of a fixed, short length.

    Cutting the sequence off after its end-of-text token is exact: the attention is causal, and the
    feature is read at that token.

    Args:
        clip: open_clip model with a causal text tower.
        length: tokens of a prompt, start and end included.

    Raises:
        ConfigError: the text tower is not causal, is not read at the end of the text, or is too
            short.
    """

    def __init__(self, clip: Any, length: int) -> None:
        super().__init__()
        text = _text_tower(clip)
        if length > text.context_length:
            raise ConfigError(
                f"context_length={length - 2} needs {length} tokens, and this CLIP's text tower "
                f"takes {text.context_length}. Use at most {text.context_length - 2}."
            )
        self.positions = nn.Parameter(text.positional_embedding[:length].detach().clone())
        self.transformer = text.transformer
        self.norm = text.ln_final
        self.projection = _as_linear(text.text_projection)
        weight = getattr(self.projection, "weight", None)
        self.embedding_dim: int = text.positional_embedding.shape[1]
        if weight is not None:
            self.embedding_dim = weight.shape[0]

    def forward(self, embeddings: Tensor) -> Tensor:
        """Encode (K, L, W) token embeddings, the last one the end of the text, to (K, E)."""
        length = embeddings.shape[1]
        tokens = embeddings.to(self.positions.dtype) + self.positions[:length]
        # No buffer: what averages a model's buffers would make NaN of infinite ones.
        causal = tokens.new_full((length, length), float("-inf")).triu(1)
        tokens = self.norm(self.transformer(tokens, attn_mask=causal))
        features: Tensor = self.projection(tokens[:, -1])
        return features


class ClipTowers(nn.Module):
    """Both towers of a CLIP, frozen and in eval mode for good.

    CLIP's own token table is left out; a reduced one is small, and lets texts be encoded.

    Args:
        clip: open_clip model.
        length: tokens of a prompt, start and end included.
        vocabulary: words of the text tower, where it does not have CLIP's own.

    Raises:
        ConfigError: the text tower does not fit, as :class:`PromptEncoder` says.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, clip: Any, length: int, vocabulary: Sequence[str] | None = None) -> None:
        super().__init__()
        from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        self.visual: Any = clip.visual
        self.text = PromptEncoder(clip, length)
        self.logit_scale = nn.Parameter(clip.logit_scale.detach().reshape(()).clone())
        mean = getattr(clip.visual, "image_mean", None) or OPENAI_DATASET_MEAN
        std = getattr(clip.visual, "image_std", None) or OPENAI_DATASET_STD
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))
        self.tokenize = WordTokenizer(vocabulary, length) if vocabulary else None
        self.tokens: nn.Module | None = _text_tower(clip).token_embedding if vocabulary else None
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "ClipTowers":
        """Stay in eval mode: batch statistics and dropout of frozen towers never move."""
        return super().train(False)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width that the image tower takes."""
        size = self.visual.image_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def takes_any_size(self) -> bool:
        """Whether the image tower takes images of any size as they are."""
        return self.side_multiple > 0

    @property
    def side_multiple(self) -> int:
        """Of which sides should be multiples where any size is taken, else 0."""
        return int(getattr(getattr(self.visual, "trunk", None), "side_multiple", 0))

    @property
    def embedding_dim(self) -> int:
        """Width of the space that both towers map to."""
        return self.text.embedding_dim

    def encode_image(self, image: Tensor) -> Tensor:
        """Encode (B, 3, H, W), RGB in [0, 1], to unit vectors (B, E); differentiable.

        Another size than the tower takes is resized (bicubic, antialiased), in single precision if
        need be, since torch has no antialiased resize in half precision on a CPU.
        """
        dtype = self.text.positions.dtype
        if not self.takes_any_size and image.shape[-2:] != self.image_size:
            image = full_precision(image)
            image = F.interpolate(image, self.image_size, mode="bicubic", antialias=True)
        image = (image.to(dtype) - self.mean) / self.std
        return F.normalize(self.visual(image), dim=-1)

    def encode_prompts(self, embeddings: Tensor) -> Tensor:
        """Encode (K, L, W) token embeddings to unit vectors (K, E)."""
        return F.normalize(self.text(embeddings), dim=-1)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Encode N texts to unit vectors (N, E), where the vocabulary is a reduced one.

        Raises:
            ConfigError: the vocabulary is CLIP's own, or a text has a word that is not in it.
        """
        if self.tokenize is None or self.tokens is None:
            raise ConfigError(
                "a perceiver on a CLIP with CLIP's own vocabulary keeps no token table, so it can "
                "encode no text. Build the CLIP with open_clip.create_model for that."
            )
        lengths = [len(text.split()) + 2 for text in texts]
        rows = zip(self.tokenize(texts).to(self.mean.device), lengths, strict=True)
        features = [self.text(self.tokens(row[None, :length])) for row, length in rows]
        return F.normalize(torch.cat(features), dim=-1)


def build_clip(clip: str | Architecture, pretrained: str | os.PathLike[str] | None) -> Any:
    """Build an open_clip model.

    Args:
        clip: name, or keyword arguments such as ``embed_dim``, ``vision_cfg``, ``text_cfg``,
            ``quick_gelu``, and ``custom_text`` for open_clip's layout with a separate text module.
        pretrained: a tag of open_clip, a file of weights, or None for random weights.

    Raises:
        ConfigError: there is no such model or tag, the arguments do not make a model, or the
            weights were trained with another activation than the model has.
        CheckpointError: the weights cannot be downloaded or read.
    """
    import open_clip

    register_trunk()
    if not isinstance(clip, str):
        return _from_architecture(clip, pretrained)
    if clip not in open_clip.list_models():
        near = difflib.get_close_matches(clip, open_clip.list_models(), n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ConfigError(
            f"open_clip has no model {clip!r}.{hint} open_clip.list_models() names all."
        )
    if pretrained is None or os.path.isfile(pretrained):
        return _from_architecture(open_clip.get_model_config(clip), pretrained)
    _check_tag(clip, str(pretrained))
    if open_clip.get_model_config(clip)["text_cfg"].get("hf_model_name"):
        raise ConfigError(_not_causal("it is not one of open_clip's own"))
    try:
        return open_clip.create_model(clip, pretrained=str(pretrained))
    except Exception as error:  # open_clip passes on whatever its download raised
        raise CheckpointError(
            f"open_clip cannot load the weights {pretrained!r} of {clip!r}: {error}. They are "
            "downloaded once: check the network, or pass the file as pretrained=."
        ) from error


def embed_words(
    clip: Any, words: Sequence[str], vocabulary: Sequence[str] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Look up words, each a single token, and the start and the end of a text.

    Args:
        clip: open_clip model.
        words: K of them.
        vocabulary: words of the text tower, where it does not have CLIP's own.

    Returns:
        (K, W), (W,) and (W,), rows of the CLIP's token table.

    Raises:
        ConfigError: a word is not a single token, or the CLIP has another vocabulary.
    """
    import open_clip

    table = _text_tower(clip).token_embedding.weight.detach()
    if vocabulary is not None:
        return _embed_known_words(table, words, WordTokenizer(vocabulary, 3))
    if table.shape[0] != _VOCABULARY:
        raise ConfigError(
            f"this CLIP has a vocabulary of {table.shape[0]} tokens: expected CLIP's own, of "
            f"{_VOCABULARY}, in which the tiers' words are looked up. Choose another CLIP."
        )
    tokens = open_clip.tokenize(list(words))
    ends = tokens.argmax(dim=1)
    if longer := [word for word, end in zip(words, ends.tolist(), strict=True) if end != 2]:
        raise ConfigError(
            f"words {longer} are not single tokens of CLIP's vocabulary. Use common English words, "
            "such as 'terrible', 'mediocre' and 'excellent'."
        )
    start, word, end = tokens[:, 0], tokens[:, 1], tokens[:, 2]
    return table[word], table[start[0]], table[end[0]]


def _embed_known_words(
    table: Tensor, words: Sequence[str], tokenize: WordTokenizer
) -> tuple[Tensor, Tensor, Tensor]:
    if table.shape[0] != tokenize.size:
        raise ConfigError(
            f"vocabulary has {len(tokenize.words)} words, which makes {tokenize.size} tokens, and "
            f"this CLIP's text tower has {table.shape[0]}. Give the words that it was trained with."
        )
    tokens = tokenize(words)
    return table[tokens[:, 1]], table[tokenize.start], table[tokenize.end]


def _from_architecture(
    architecture: Mapping[str, Any], pretrained: str | os.PathLike[str] | None
) -> Any:
    import open_clip

    arguments = dict(architecture)
    build = open_clip.CustomTextCLIP if arguments.pop("custom_text", False) else open_clip.CLIP
    vision, text = arguments.get("vision_cfg"), arguments.get("text_cfg")
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping):
        raise ConfigError(
            f"clip={arguments}: expected embed_dim, vision_cfg and text_cfg, as in open_clip's "
            "model configs, or the name of one of its models."
        )
    if text.get("hf_model_name") or "multimodal_cfg" in arguments:
        raise ConfigError(_not_causal("it is not one of open_clip's own"))
    if pretrained is not None and not os.path.isfile(pretrained):
        raise ConfigError(
            f"pretrained={os.fspath(pretrained)!r} is not a file: a CLIP given by its arguments "
            "has no tags. Pass a file of weights, or None for random ones."
        )
    # A timm tower's own weights would be downloaded here, whatever their format.
    arguments["vision_cfg"] = {**vision, "timm_model_pretrained": False}
    arguments["text_cfg"] = dict(text)
    try:
        clip = build(**arguments)
    except Exception as error:  # whatever a constructor makes of sizes that do not fit
        raise ConfigError(
            f"open_clip cannot build a model of {arguments}: {type(error).__name__}: {error}. "
            "Compare with open_clip.get_model_config('ViT-B-32-quickgelu')."
        ) from error
    if pretrained is not None:
        _load_weights(clip, pretrained)
    return clip


def _load_weights(clip: nn.Module, file: str | os.PathLike[str]) -> None:
    import open_clip

    try:
        open_clip.load_checkpoint(clip, os.fspath(file))  # open_clip's default: weights_only
    except Exception as error:  # whatever safetensors, torch.load or load_state_dict raise
        raise CheckpointError(
            f"open_clip cannot load {os.fspath(file)!r} into this model: {error}. "
            "Give the model that the weights belong to; safetensors is the safest format."
        ) from error


def _check_tag(clip: str, tag: str) -> None:
    """Refuse weights trained with the other GELU: open_clip only warns of that."""
    import open_clip

    weights = open_clip.get_pretrained_cfg(clip, tag)
    if not weights:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(clip))
        hint = f"Its tags are {tags}." if tags else "It has none: give a file of weights, or None."
        raise ConfigError(
            f"open_clip has no weights {tag!r} for {clip!r}, and there is no such file. {hint}"
        )
    trained = bool(weights.get("quick_gelu", False))
    if trained != bool(open_clip.get_model_config(clip).get("quick_gelu", False)):
        other = f"{clip}-quickgelu" if trained else clip.removesuffix("-quickgelu")
        exists = other in open_clip.list_models() and other != clip
        remedy = f"Use clip={other!r}." if exists else "Choose other weights."
        raise ConfigError(
            f"the weights {tag!r} were trained {'with' if trained else 'without'} QuickGELU, and "
            f"{clip!r} is built {'without' if trained else 'with'} it, so its features would be "
            f"silently off. {remedy}"
        )


def _text_tower(clip: Any) -> Any:
    """Whatever holds the parts of the text tower: ``clip.text``, or the CLIP itself."""
    text: Any = getattr(clip, "text", clip)
    if getattr(text, "attn_mask", None) is None or not hasattr(text, "token_embedding"):
        raise ConfigError(_not_causal("its attention has no causal mask"))
    pool = getattr(text, "text_pool_type", None) or getattr(text, "pool_type", None)
    if pool not in ("argmax", "eos") or getattr(text, "cls_emb", None) is not None:
        raise ConfigError(_not_causal(f"its feature is not read there (pool_type={pool!r})"))
    return text


def _not_causal(why: str) -> str:
    return (
        "tier prompts need a causal text tower that is read at the end of the text, and this "
        f"CLIP's is not: {why}. Use a CLIP such as 'ViT-B-32-quickgelu'."
    )


def _as_linear(projection: Tensor | nn.Linear | None) -> nn.Module:
    """Express open_clip's three kinds of text projection as one module."""
    if projection is None:
        return nn.Identity()
    if isinstance(projection, nn.Linear):
        return projection
    width, embedding_dim = projection.shape
    linear = nn.Linear(width, embedding_dim, bias=False, device="meta")
    linear.weight = nn.Parameter(projection.detach().T.contiguous())
    return linear
