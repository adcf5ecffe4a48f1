"""Checkpoints of training runs: written whole or not at all, read without unpickling code.

What a run was told is in them, so that another run does not take its weights for its own.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from perceive_adapter.errors import CheckpointError
from perceive_adapter.folders import replacing

__all__ = ["REMEDY", "check_settings", "read_checkpoint", "write_checkpoint"]

REMEDY: Final = "Give another output folder, or delete it to start afresh."


def write_checkpoint(file: Path, state: Mapping[str, Any]) -> None:
    """Write a state over the old one, as :func:`~perceive_adapter.folders.replacing` does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in file.parent.glob(f".{file.name}.*"):  # by a run that was killed while it wrote
        if not _is_alive(left.suffix[1:]):
            left.unlink(missing_ok=True)
    with replacing(file, draft=f".{file.name}.{os.getpid()}") as stream:
        torch.save(dict(state), stream)


def _is_alive(process: str) -> bool:
    """Whether there is another process of this number on this machine, as far as that is known."""
    if not process.isdecimal() or int(process) == os.getpid() or os.name != "posix":
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def read_checkpoint(file: Path, keys: Collection[str]) -> dict[str, Any] | None:
    """Read a state that holds ``keys``, on the CPU; None where there is no file.

    Raises:
        CheckpointError: the file is damaged, or no checkpoint of that kind.
    """
    if not file.exists():
        return None
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes of torch.load
        raise CheckpointError(f"{str(file)!r} is no checkpoint ({error}). {REMEDY}") from error
    if not isinstance(state, dict) or not state.keys() >= set(keys):
        raise CheckpointError(f"{str(file)!r} is no checkpoint of a training run. {REMEDY}")
    return state


def check_settings(file: Path | None, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that a checkpoint was written by a run with the same settings.

    Args:
        file: the checkpoint.
        found: what its run was told: plain values and mappings of them, by name.
        wanted: what this run is told.

    Raises:
        CheckpointError: it names each setting that differs, with both values.
    """
    was, now = _flat(found), _flat(wanted)
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    if names:
        raise CheckpointError(
            f"{str(file)!r} was written by a run with {_listed(was, names)}: expected "
            f"{_listed(now, names)}. Run with the same options and data, or {REMEDY[:1].lower()}"
            f"{REMEDY[1:]}"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Bring what is nested to one level, under names such as ``schedule.steps``."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _listed(settings: Mapping[str, Any], names: Collection[str]) -> str:
    return ", ".join(f"{name}={settings.get(name)!r}" for name in names)
