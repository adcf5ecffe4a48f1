"""Prompts in the format of Perceive-IR's released checkpoint, read without unpickling code.

Their arithmetic is CoOp's: ``token_prefix``, ``context`` and ``token_suffix`` in one sequence of 77
tokens, read at the end-of-text token that ``tokenized_prompts`` marks. The attention is causal, so
what follows that token does not matter, and :class:`TierPrompts` leaves it out.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perceive_adapter.errors import CheckpointError
from perceive_adapter.perceiver.prompts import TierPrompts

__all__ = ["OfficialPrompts", "put_prompts", "read_prompts"]

_KEY = "prompt_learner"
_NAMES = ("context", "token_prefix", "token_suffix", "tokenized_prompts")
_TIERS = 3
_SAME_TOKEN = 0.99


class OfficialPrompts(NamedTuple):
    """What such a file says: (3, N, W), (W,) and (W,), in single precision."""

    context: Tensor
    start: Tensor
    end: Tensor


def read_prompts(file: str | os.PathLike[str]) -> OfficialPrompts:
    """Read a file of tier prompts, in the order low, medium, high.

    Args:
        file: what ``torch.save`` wrote of a dict with the key ``prompt_learner``: ``context``
            (3, N, W), ``token_prefix`` (3, 1, W), ``token_suffix`` (3, L - 1 - N, W) and
            ``tokenized_prompts`` (3, L). Other keys do not matter.

    Raises:
        CheckpointError: the file cannot be read, needs more than tensors and plain values, or
            holds something else.
    """
    where = repr(os.fspath(file))
    found = _load(file, where)
    learner = found.get(_KEY) if isinstance(found, Mapping) else None
    if not isinstance(learner, Mapping):
        keys = sorted(map(str, found))[:8] if isinstance(found, Mapping) else type(found).__name__
        raise CheckpointError(
            f"{where} holds {keys}: expected a dict with the key {_KEY!r}, itself a dict of "
            f"{', '.join(_NAMES)}. Give the released checkpoint of the tier prompts."
        )
    tensors = {name: _tensor(learner, name, where) for name in _NAMES}
    _check_shapes(tensors, where)
    _check_end(tensors, where)
    context, prefix, suffix = (tensors[name].float() for name in _NAMES[:3])
    start, end = prefix[:, 0], suffix[:, 0]
    for name, rows in (("token_prefix", start), ("token_suffix", end)):
        if not torch.equal(rows, rows[:1].expand_as(rows)):
            raise CheckpointError(
                f"{where}: the first vector of {name} differs from tier to tier: expected the "
                "same token's embedding in all. Give the released checkpoint."
            )
    return OfficialPrompts(context, start[0], end[0])


def put_prompts(prompts: TierPrompts, official: OfficialPrompts, file: str) -> None:
    """Replace the values of freshly drawn prompts by those of a file.

    Raises:
        CheckpointError: the file's prompts are of another text tower.
    """
    given, expected = official.context.shape, prompts.context.shape
    if given != expected:
        raise CheckpointError(
            f"{file!r} has a context of shape {tuple(given)}: expected {tuple(expected)} for this "
            "CLIP. Pass the clip= that the prompts were trained on, a ViT-B/32 for the released."
        )
    for name, token in (("start", official.start), ("end", official.end)):
        cosine = F.cosine_similarity(token, getattr(prompts, name), dim=0).item()
        if not cosine >= _SAME_TOKEN:
            raise CheckpointError(
                f"{file!r} was trained on another CLIP: the embeddings of the {name}-of-text token "
                f"have the cosine {cosine:.3f}, expected at least {_SAME_TOKEN}. Pass the clip= "
                "and pretrained= that the prompts were trained on."
            )
    with torch.no_grad():
        for name, value in official._asdict().items():
            getattr(prompts, name).copy_(value)


def _load(file: str | os.PathLike[str], where: str) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {where}. Check the path.") from error
    except Exception as error:  # whatever a damaged or hostile file makes the unpickler raise
        first = str(error).partition("\n")[0][:300]
        raise CheckpointError(
            f"{where} cannot be read without running what it says "
            f"({type(error).__name__}: {first}): expected a file of torch.save with tensors and "
            "plain values only. Download it again; or, if you trust its source, load it yourself "
            f"and save {{'{_KEY}': ...}} alone with torch.save."
        ) from error


def _tensor(learner: Mapping[str, object], name: str, where: str) -> Tensor:
    value = learner.get(name)
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        raise CheckpointError(
            f"{where}: {_KEY} has {name} of type {type(value).__name__}: expected a dense tensor. "
            f"It holds {sorted(map(str, learner))[:8]}. Give the released checkpoint."
        )
    return value.detach()


def _check_shapes(tensors: Mapping[str, Tensor], where: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    kinds = [tensor.is_floating_point() for tensor in tensors.values()]
    context, tokens = tensors["context"], tensors["tokenized_prompts"]
    length, width = context.shape[1:] if context.ndim == 3 else (0, 0)
    total = tokens.shape[1] if tokens.ndim == 2 else 0
    expected = [
        (_TIERS, length, width),
        (_TIERS, 1, width),
        (_TIERS, total - 1 - length, width),
        (_TIERS, total),
    ]
    fits = list(shapes.values()) == expected and 0 < length < total - 1 and width > 0
    if not fits or kinds != [True, True, True, False]:
        raise CheckpointError(
            f"{where} has tensors of shapes {shapes}: expected context (3, N, W), token_prefix "
            "(3, 1, W), token_suffix (3, L - 1 - N, W) and integers tokenized_prompts (3, L), in "
            "the release N = 16, W = 512, L = 77. Give the released checkpoint."
        )
    if bad := [name for name in _NAMES[:3] if not tensors[name].isfinite().all()]:
        raise CheckpointError(
            f"{where} has NaN or infinite values in {', '.join(bad)}: expected finite ones. "
            "Download it again, or train the prompts again."
        )


def _check_end(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse class words between the context and the end-of-text token."""
    expected = 1 + tensors["context"].shape[1]
    ends = tensors["tokenized_prompts"].argmax(dim=1).tolist()
    if ends != [expected] * _TIERS:
        raise CheckpointError(
            f"{where}: tokenized_prompts ends its texts at the indices {ends}: expected {expected} "
            "for each tier, right after the context. Prompts with more words are not supported; "
            "give the released checkpoint, or train with `perceive-adapter train-perceiver`."
        )
