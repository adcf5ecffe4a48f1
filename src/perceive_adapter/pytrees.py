"""Dataclasses of tensors as what torch's exporters call a pytree: inputs and outputs of a graph."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx._pytree import register_pytree_flatten_spec
from torch.utils._pytree import GetAttrKey, register_pytree_node

__all__ = ["register_pytree"]


def register_pytree(cls: Any) -> None:
    """Let exported graphs take and give a dataclass, field by field, and be saved with one.

    Fields that are None are left out. (``torch.export.register_dataclass`` warns on torch 2.6, and
    graphs with keyword arguments of such a class cannot be exported there.)

    Args:
        cls: a dataclass whose fields are tensors or None.
    """
    names = [field.name for field in dataclasses.fields(cls)]

    def known(value: Any) -> list[str]:
        return [name for name in names if getattr(value, name) is not None]

    def flatten(value: Any) -> tuple[list[Any], list[str]]:
        return [getattr(value, name) for name in known(value)], known(value)

    def flatten_with_keys(value: Any) -> tuple[list[Any], list[str]]:
        pairs = [(GetAttrKey(name), getattr(value, name)) for name in known(value)]
        return pairs, known(value)

    def unflatten(values: Any, context: list[str]) -> Any:
        return cls(**dict(zip(context, values, strict=True)))

    register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"perceive_adapter.{cls.__name__}",
        to_dumpable_context=list,
        from_dumpable_context=list,
        flatten_with_keys_fn=flatten_with_keys,
    )
    register_pytree_flatten_spec(cls, lambda value, spec: flatten(value)[0])
    torch.serialization.add_safe_globals([cls])
