"""Weights of modules: a hash of them, and all of those that are sharded."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

__all__ = ["fingerprint", "full_tensor", "is_sharded"]


def fingerprint(
    backbone: nn.Module,
    originals: Mapping[str, Tensor] | None = None,
    *,
    leave_out: Collection[str] = (),
) -> str:
    """Return a sha256 over the names, shapes, dtypes and values of a backbone's weights.

    Args:
        backbone: any module.
        originals: values to hash in place of the present ones, by name.
        leave_out: names of weights that do not count, such as ``SitePlan.rewritten``.
    """
    digest = hashlib.sha256()
    first = _first_names(backbone)
    for name, value in sorted(backbone.state_dict().items()):
        known = first.get(name, name)
        if isinstance(value, Tensor) and known not in leave_out:
            value = full_tensor((originals or {}).get(known, value)).detach().cpu().contiguous()
            digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
            digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _first_names(backbone: nn.Module) -> dict[str, str]:
    """From all names of each parameter to the first, which is the one that others know it by."""
    first: dict[nn.Parameter, str] = {}
    return {
        name: first.setdefault(parameter, name)
        for name, parameter in backbone.named_parameters(remove_duplicate=False)
    }


def full_tensor(value: Tensor) -> Tensor:
    """Return all of a tensor that FSDP may have sharded; every process must ask for it then."""
    gathered: Tensor = value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]
    return gathered


def is_sharded(value: Tensor) -> bool:
    """Tell whether a tensor is a DTensor, without the second that importing the class takes."""
    return hasattr(value, "full_tensor")
