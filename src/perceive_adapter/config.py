"""Frozen configuration dataclasses and their JSON round trip."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from perceive_adapter.errors import CheckpointError, ConfigError
from perceive_adapter.warning import warn

__all__ = ["LAYER_KINDS", "LEVEL_KINDS", "SOURCES", "AdapterConfig", "from_dict", "to_dict"]

LEVEL_KINDS = ("modulation", "cross_attention")
LAYER_KINDS = ("low_rank",)
SOURCES = ("compact", "tiers", "degradations", "severity", "embedding", "semantic")

T = TypeVar("T")


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter consists of, before it meets a backbone.

    Args:
        level: kind of prompt module at level sites, ``"modulation"`` (prompt guidance),
            ``"cross_attention"`` (prompt guidance and channel cross-attention) or None for none.
        layer: kind at layer sites, ``"low_rank"`` (perception-gated low-rank branch) or None.
        rank: rank of the low-rank branches; None takes the highest that fits the budget.
        max_rank: what ``rank=None`` stops at.
        sources: fields of a :class:`~perceive_adapter.Perception` that steer the prompts, each
            with its width. None: the compact features, and the perceiver's tiers, presence and
            severity; its embedding where it tells no degradations.
        compact_dim: width of the compact features where ``sources`` is None; 0 for none.
        condition_dim: width of the condition that the prompt modules see.
        attention_dim: inner width of cross-attention, shared by its heads.
        attention_heads: heads of cross-attention.
        semantic: name of a timm image model that tells what is in the image, or
            ``"perceive-tiny"``, whose image tower does; None for none.
        semantic_weights: ``.safetensors`` file for a timm model; None takes its pretrained weights.
        treats: columns of the perception's ``severity`` and ``degradations`` that the adapter is
            for: on an image in which none of them is perceived the backbone is left alone. None: it
            works on every image. See :meth:`~perceive_adapter.PerceiveModel.treat`, which takes
            their names.
        budget: most trainable parameters; None is 3 % of the backbone, at least 120 000, and does
            not bind where a rank is named.

    Raises:
        ConfigError: a field has a value that cannot work.

    Example:
        >>> AdapterConfig(rank=4).level
        'modulation'
    """

    level: str | None = "modulation"
    layer: str | None = "low_rank"
    rank: int | None = None
    max_rank: int = 16
    sources: Mapping[str, int] | None = None
    compact_dim: int = 64
    condition_dim: int = 16
    attention_dim: int = 32
    attention_heads: int = 4
    semantic: str | None = None
    semantic_weights: str | None = None
    treats: tuple[int, ...] | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        _one_of("level", self.level, LEVEL_KINDS)
        _one_of("layer", self.layer, LAYER_KINDS)
        for name in ("max_rank", "condition_dim", "attention_dim", "attention_heads"):
            _positive(name, getattr(self, name))
        for name in ("rank", "budget"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        if self.compact_dim != 0 or isinstance(self.compact_dim, bool):
            _positive("compact_dim", self.compact_dim)
        if self.level is None and self.layer is None:
            raise ConfigError(
                "level=None and layer=None leave nothing to inject; name at least one kind"
            )
        if self.attention_dim % self.attention_heads:
            raise ConfigError(
                f"attention_dim={self.attention_dim} is not a multiple of "
                f"attention_heads={self.attention_heads}"
            )
        if self.sources is not None:
            _widths("sources", self.sources)
            object.__setattr__(self, "sources", dict(self.sources))  # the caller's may change
        if self.treats is not None:
            _columns("treats", self.treats)


def _one_of(name: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise ConfigError(f"{name}={value!r} is unknown; expected one of {', '.join(allowed)}")


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r}; expected a positive integer")


def _widths(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{name}={value!r}; expected a width for each field of a perception, such as "
            '{"compact": 64}'
        )
    if not value:
        raise ConfigError(f"{name} is empty; name at least one of {', '.join(SOURCES)}")
    for field, width in value.items():
        _one_of(name, field, SOURCES)
        _positive(f"{name}[{field!r}]", width)


def _columns(name: str, value: Any) -> None:
    fits = isinstance(value, tuple) and all(type(column) is int and column >= 0 for column in value)
    if not fits or not value or len(set(value)) < len(value):
        raise ConfigError(
            f"{name}={value!r}; expected a tuple of different columns from 0, or None for no limit"
        )


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass as nested plain dictionaries, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], data: object, where: str) -> T:
    """Build the dataclass ``cls`` from parsed JSON, checking the type of every field.

    Unknown keys warn, so that a file of a newer minor version still loads; a missing key or a value
    of another type raises.

    Args:
        cls: a dataclass whose fields are JSON types, tuples, mappings or dataclasses.
        data: what ``json.load`` gave.
        where: how messages name the place, for example ``"adapter_config.json: plan"``.

    Raises:
        CheckpointError: ``data`` does not describe a ``cls``.
    """
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: expected an object, found {_short(data)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(data) - set(fields)):
        warn(f"{where}: ignoring unknown keys {', '.join(unknown)}")
    values = {
        name: _convert(hints[name], data[name], f"{where}.{name}")
        for name in fields
        if name in data
    }
    try:
        return cls(**values)
    except TypeError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is typing.Literal:
        if value in args:
            return value
    elif dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type[Any], hint), value, where)
    elif origin is tuple and isinstance(value, (list, tuple)):
        item = args[0] if args[1:] == (Ellipsis,) else None
        if item is not None or len(args) == len(value):
            kinds = [item] * len(value) if item is not None else args
            return tuple(
                _convert(kind, part, f"{where}[{i}]")
                for i, (kind, part) in enumerate(zip(kinds, value, strict=True))
            )
    elif origin is not None and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: _convert(args[1], part, f"{where}.{key}") for key, part in value.items()}
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    raise CheckpointError(f"{where}: expected {_name(hint)}, found {_short(value)}")


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    *options, last = (arg for arg in args if arg is not type(None))
    for option in options:
        with suppress(CheckpointError):
            return _convert(option, value, where)
    return _convert(last, value, where)


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint)


def _short(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
