"""What a training run is: which photographs it may see, and the folder that is its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from perceive_adapter.data.contents import content_digest
from perceive_adapter.errors import CheckpointError, ConfigError
from perceive_adapter.folders import write_json
from perceive_adapter.training.checkpoints import REMEDY, check_settings

__all__ = ["Split", "audit_elsewhere", "claim_folder", "split_photos"]

_AUDITED: Final = 10  # one photograph in so many
_FEWEST: Final = 3
_MOST: Final = 50  # an audit degrades each one 88 times


@dataclass(frozen=True)
class Split:
    """Photographs to train on and to audit on.

    Args:
        trained: trained on.
        audit: never trained on.
        digest: hash of all contents, which tells apart what is trained on and what is audited.
    """

    trained: tuple[Path, ...]
    audit: tuple[Path, ...]
    digest: str


def split_photos(paths: Sequence[Path], seed: int = 0) -> Split:
    """Set one photograph in ten aside, three at least and fifty at most.

    A hash of the seed and a file's content decides, so that names, folders and their order do not
    matter, and copies of a file count as one.

    Raises:
        ConfigError: there are fewer than five different files.
    """
    found = _by_digest(paths, seed)
    order = sorted(found)
    shuffled = [found[content] for content in order]
    count = min(_MOST, max(_FEWEST, len(shuffled) // _AUDITED))
    if len(shuffled) < count + 2:
        raise ConfigError(
            f"got {len(shuffled)} different photographs: expected at least {_FEWEST + 2}, "
            f"{_FEWEST} for the audit and one for each of two folds. Add photographs; a useful "
            "perceiver takes dozens."
        )
    digest = _digest_of(order[count:], order[:count])
    return Split(tuple(shuffled[count:]), tuple(shuffled[:count]), digest)


def audit_elsewhere(paths: Sequence[Path], audit: Sequence[Path]) -> Split:
    """Train on all photographs, and audit on others.

    Raises:
        ConfigError: there are fewer than two different files to train on, or one of them is to be
            audited on too.
    """
    found, others = _by_digest(paths, 0), _by_digest(audit, 0)
    if both := found.keys() & others.keys():
        raise ConfigError(
            f"{len(both)} photographs are both to be trained on and audited on, such as "
            f"{str(found[min(both)])!r}: an audit must see others. Take them out of one folder."
        )
    if len(found) < 2:
        raise ConfigError(f"got {len(found)} photographs to train on: expected two at least.")
    return Split(tuple(found.values()), tuple(others.values()), _digest_of(found, others))


def _by_digest(paths: Sequence[Path], seed: int) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        found.setdefault(content_digest(path, seed), path)
    return found


def _digest_of(trained: Iterable[str], audit: Iterable[str]) -> str:
    """Hash the contents to train on, in their order, which decides the folds, and the others."""
    return hashlib.sha256(" ".join([*trained, "audit", *sorted(audit)]).encode()).hexdigest()


def claim_folder(out: Path, options: Mapping[str, Any]) -> Path:
    """Make the folder of a run's checkpoints in ``out``, and record the options that decide it.

    A run that never came to a checkpoint may be started again with other options.

    Raises:
        ConfigError: ``out`` is no folder.
        CheckpointError: it holds a run with other options, or a perceiver or an adapter that no run
            here made.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{str(out)!r} is a file: give the name of a folder.")
    checkpoints = out / "checkpoints"
    record = checkpoints / "options.json"
    if record.exists() and any(checkpoints.glob("*.pt")):
        _check_same(record, options)
        return checkpoints
    for kind in ("perceiver", "adapter"):
        if (out / f"{kind}_config.json").exists():
            raise CheckpointError(
                f"{str(out)!r} holds a saved {kind} already, which would be lost. Give another "
                "folder, or delete it first."
            )
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_json(record, options)
    return checkpoints


def _check_same(record: Path, options: Mapping[str, Any]) -> None:
    try:
        recorded = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{str(record)!r} is damaged ({error}). {REMEDY}") from error
    known = recorded if isinstance(recorded, dict) else {}
    check_settings(record.parent, known, json.loads(json.dumps(options)))
