"""Configurations check themselves, and survive JSON."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

import pytest

from perceive_adapter import AdapterConfig, CheckpointError, ConfigError
from perceive_adapter.config import from_dict, to_dict


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(),
        AdapterConfig(level=None, rank=3, budget=10),
        AdapterConfig(level="cross_attention", attention_dim=12, attention_heads=3),
        AdapterConfig(sources={"compact": 8, "severity": 3}, semantic="vit_tiny_patch16_224"),
    ],
)
def test_a_config_survives_json(config: AdapterConfig) -> None:
    assert from_dict(AdapterConfig, json.loads(json.dumps(to_dict(config))), "file") == config


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"level": "film"}, "level='film'.*modulation, cross_attention"),
        ({"layer": "lora"}, "layer='lora'.*low_rank"),
        ({"rank": 0}, "rank=0"),
        ({"rank": True}, "rank=True"),
        ({"rank": 2.0}, "rank=2.0"),
        ({"budget": -1}, "budget=-1"),
        ({"max_rank": 0}, "max_rank=0"),
        ({"condition_dim": 0}, "condition_dim=0"),
        ({"compact_dim": -1}, "compact_dim=-1"),
        ({"compact_dim": "64"}, "compact_dim='64'"),
        ({"compact_dim": False}, "compact_dim=False"),
        ({"attention_dim": 30, "attention_heads": 4}, "not a multiple"),
        ({"level": None, "layer": None}, "nothing to inject"),
        ({"sources": {}}, "sources is empty"),
        ({"sources": {"colour": 3}}, "'colour'.*compact"),
        ({"sources": {"tiers": 0}}, r"sources\['tiers'\]=0"),
        ({"sources": ["tiers"]}, "a width for each field"),
        ({"treats": 1}, "treats=1; expected a tuple"),
        ({"treats": ()}, r"treats=\(\)"),
        ({"treats": (0, 0)}, "different columns"),
        ({"treats": (-1,)}, "columns from 0"),
    ],
)
def test_values_that_cannot_work_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        AdapterConfig(**fields)
    with pytest.raises(CheckpointError):
        from_dict(AdapterConfig, fields, "file")


def test_sources_are_a_copy_of_what_was_given() -> None:
    sources = {"compact": 8}
    config = AdapterConfig(sources=sources)
    sources["tiers"] = 99
    assert config.sources == {"compact": 8}


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        AdapterConfig().rank = 3  # type: ignore[misc]


@dataclasses.dataclass(frozen=True)
class Inner:
    number: int = 1


@dataclasses.dataclass(frozen=True)
class Outer:
    text: str
    real: float = 0.5
    pair: tuple[int, int] = (1, 2)
    many: tuple[Inner, ...] = ()
    choice: Literal["a", "b"] = "a"
    table: Mapping[str, int] | None = None
    either: tuple[int, int] | str = "same"


def test_types_are_restored_from_json() -> None:
    given = Outer("x", 2, (3, 4), (Inner(), Inner(5)), "b", {"k": 1}, (5, 6))
    back = from_dict(Outer, json.loads(json.dumps(to_dict(given))), "file")
    assert back == given
    assert (type(back.real), type(back.pair), type(back.many[1])) == (float, tuple, Inner)
    assert from_dict(Outer, {"text": "x"}, "file") == Outer("x")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "file: expected an object, found list"),
        ({}, "text"),
        ({"text": 3}, "file.text: expected str, found int 3"),
        ({"text": "x", "real": "1"}, "file.real: expected float"),
        ({"text": "x", "real": True}, "file.real: expected float"),
        ({"text": "x", "pair": [1]}, "file.pair: expected tuple"),
        ({"text": "x", "pair": [1, 2.5]}, r"file.pair\[1\]: expected int"),
        ({"text": "x", "many": [{"number": "1"}]}, r"file.many\[0\].number"),
        ({"text": "x", "choice": "c"}, "file.choice"),
        ({"text": "x", "choice": ["a"]}, "file.choice"),
        ({"text": "x", "table": {"k": "v"}}, "file.table.k: expected int"),
        ({"text": "x", "either": 3}, "file.either"),
        ({"text": "x" * 9, "table": "y" * 900}, "file.table.*y{9}"),
    ],
)
def test_other_types_are_refused_with_their_place(data: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as error:
        from_dict(Outer, data, "file")
    assert len(str(error.value)) < 200


def test_unknown_keys_warn() -> None:
    with pytest.warns(UserWarning, match="file: ignoring unknown keys a, b"):
        assert from_dict(Outer, {"text": "x", "b": 1, "a": 2}, "file") == Outer("x")
