"""What a perceiver is made of, as its folder records it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from perceive_adapter.errors import ConfigError

__all__ = ["Architecture", "PerceiverConfig"]

_Scalar: TypeAlias = int | float | bool | str | None
_Tower: TypeAlias = Mapping[str, _Scalar | tuple[int, ...] | Mapping[str, _Scalar]]
Architecture: TypeAlias = Mapping[str, _Scalar | _Tower]
"""Keyword arguments of an open_clip model: ``embed_dim``, ``vision_cfg``, ``text_cfg``, ..."""

_FORMAT = 1
_LIMITS = {"layers": 256, "image_size": 2048, "context_length": 1024}
_LIMIT = 65_536
_NAME = re.compile(r"[\w.+-]{1,100}", re.ASCII)


@dataclass(frozen=True)
class PerceiverConfig:
    """What a :class:`~perceive_adapter.perceiver.QualityPerceiver` is made of.

    Args:
        clip: name of an open_clip model, or the keyword arguments of one.
        pretrained: open_clip's tag of its weights; None where they are the perceiver's own, and
            are saved with it.
        tiers: names of the quality tiers, from worst to best.
        words: for each tier, the word that its prompt starts from.
        context_length: learnable vectors in each prompt.
        views: largest number of native-resolution crops that stand for an image.
        degradations: names of the degradations that it tells apart, none without such heads.
        vocabulary: words of the text tower, where it does not have CLIP's own.
        format_version: version of this record.

    Raises:
        ConfigError: a field has a value that cannot work.
    """

    clip: str | Architecture
    pretrained: str | None
    tiers: tuple[str, ...]
    words: tuple[str, ...]
    context_length: int
    views: int
    degradations: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] | None = None
    format_version: int = _FORMAT

    def __post_init__(self) -> None:
        if self.format_version != _FORMAT:
            raise ConfigError(
                f"the perceiver has format_version={self.format_version}: this version of "
                f"perceive_adapter reads {_FORMAT}. Install the version that wrote it."
            )
        if len(self.tiers) < 2 or len(set(self.tiers)) < len(self.tiers) or "" in self.tiers:
            raise ConfigError(
                f"tiers={self.tiers!r}: expected at least two different names, from worst to best."
            )
        if len(self.words) != len(self.tiers):
            raise ConfigError(
                f"words={self.words!r} for tiers={self.tiers!r}: expected one word for each tier."
            )
        for name, value in (("context_length", self.context_length), ("views", self.views)):
            limit = _LIMITS.get(name, _LIMIT)
            if not 1 <= value <= limit:
                raise ConfigError(f"{name}={value}: expected an integer from 1 to {limit}.")
        for name, words in (("degradations", self.degradations), ("vocabulary", self.vocabulary)):
            if words and ("" in words or len(set(words)) < len(words) or len(words) > _LIMIT):
                raise ConfigError(f"{name}={words[:9]!r}: expected different, non-empty words.")
        if isinstance(self.clip, str):
            _check_name(self.clip, "clip")
        else:
            _check_values(self.clip, "clip")
            object.__setattr__(self, "clip", _copied(self.clip))
        if self.pretrained is not None:
            _check_name(self.pretrained, "pretrained")


def _check_name(name: str, where: str) -> None:
    """Refuse paths and addresses, which open_clip and timm would read or download."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where}={name[:200]!r}: expected a plain name of at most 100 letters, digits and "
            "'.+-_', no address, and no path except of an existing file of weights. Give a name "
            "that open_clip or timm lists."
        )


def _check_values(values: Mapping[str, object], where: str) -> None:
    """Refuse sizes that no CLIP has, before anything is allocated for them."""
    for name, value in values.items():
        limit = _LIMITS.get(name, _LIMIT)
        if name == "image_size" and not _are_sides(value):
            raise ConfigError(
                f"{where}.{name}={value!r}: expected the pixels of a side, or of both."
            )
        if isinstance(value, Mapping):
            _check_values(value, f"{where}.{name}")
            continue
        if isinstance(value, str) and name.endswith("_model_name"):
            _check_name(value, f"{where}.{name}")
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, int | float) and not abs(number) <= limit:
                raise ConfigError(
                    f"{where}.{name}={number}: expected at most {limit}. Check the architecture."
                )


def _are_sides(value: object) -> bool:
    sides = tuple(value) if isinstance(value, tuple | list) and len(value) == 2 else (value,)
    return all(type(side) is int and side > 0 for side in sides)


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain dicts all the way down, which nobody else holds."""
    return {
        name: _copied(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
    }
