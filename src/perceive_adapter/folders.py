"""Folders of JSON and safetensors, as peft's adapters are: a config, tensors and a model card.

Pickle is neither written nor read.
"""

import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import IO, Any, NoReturn

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from perceive_adapter.errors import CheckpointError, ConfigError
from perceive_adapter.warning import warn

__all__ = [
    "CARD_NAME",
    "PICKLES",
    "DamagedError",
    "figures_table",
    "is_own_card",
    "load_folder",
    "replace_file",
    "replacing",
    "save_folder",
    "table_cell",
    "write_json",
]

CARD_NAME = "README.md"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SEAL_OF = b"\n<!-- written by perceive_adapter, and not edited since: %b -->\n"
_SEAL = re.compile(_SEAL_OF.strip() % b"([0-9a-f]{16})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_CONFIG_BYTES = 16 * 2**20
_LFS_POINTER = b"version https://git-lfs"


class DamagedError(CheckpointError):
    """A file's content is not what was saved, so that another copy of it may be sound."""


def save_folder(
    path: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    config_name: str,
    tensors_name: str,
    card: str,
) -> Path:
    """Write a config, tensors and a model card into a folder, and give back the folder.

    Each file is replaced atomically: a crash leaves the old file or the new one. The config gains
    ``sha256``, the digest of the tensors file, so that :func:`load_folder` detects a truncated file
    and a config beside another save's tensors. (It does not authenticate: whoever can change both
    files can make them agree.) A ``README.md`` that somebody else wrote or edited stays, with a
    warning.

    Args:
        path: folder, made if it does not exist.
        config: what JSON can hold, except NaN and infinity; no key ``sha256``.
        tensors: by name, any device and layout; they are stored contiguous and unshared.
        config_name: file name of the config, such as ``adapter_config.json``.
        tensors_name: file name of the tensors, such as ``adapter_model.safetensors``.
        card: text of ``README.md``; it gains a comment that tells, later, whether it was edited.

    Raises:
        CheckpointError: ``path`` is empty, a file, or cannot be made or written to.
        ConfigError: the config cannot be written as JSON.

    Example:
        >>> import tempfile, torch
        >>> names = {"config_name": "a.json", "tensors_name": "a.safetensors"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_folder(folder, config={"rank": 4}, tensors={"w": torch.ones(2)},
        ...                 card="# Adapter", **names) and None
        ...     config, tensors = load_folder(folder, **names)
        >>> config["rank"], tensors["w"]
        (4, tensor([1., 1.]))
    """
    if not os.fspath(path):
        raise CheckpointError(
            "cannot save to '', which names no folder: give the name of one, or '.' for this one."
        )
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(
            f"cannot save to {str(folder)!r}: it is a file, and a folder is needed. "
            "Give the name of a folder; it is made if it does not exist."
        )
    _dump({**config, "sha256": ""})  # fails before anything is written
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {str(folder)!r}: {error}") from error
    stored = {name: _detached(tensor) for name, tensor in tensors.items()}
    data = safetensors.torch.save(stored, metadata={"format": "pt"})
    try:
        replace_file(folder / tensors_name, data)
        replace_file(folder / config_name, _dump({**config, "sha256": _sha256(data)}))
        _replace_card(folder / CARD_NAME, _sealed(card))
    except OSError as error:  # whose name is a draft's
        raise CheckpointError(
            f"cannot save to {str(folder)!r}: {error.strerror or error}. Give a folder that can be "
            "written to, on a disk with space left."
        ) from error
    return folder


def is_own_card(file: Path) -> bool:
    """Tell whether a model card is as this package wrote it, whatever its line ends are."""
    text, seal = _without_seal(file.read_bytes())
    return seal == _digest(text)


def _sealed(card: str) -> bytes:
    """Add a comment with the digest of the card, by which it is told when somebody edits it."""
    text = card.encode(errors="backslashreplace").rstrip() + b"\n"
    return text + _SEAL_OF % _digest(text)


def _without_seal(data: bytes) -> tuple[bytes, bytes | None]:
    """Take a card and its digest apart; None where it has none."""
    text, _, last = data.replace(b"\r\n", b"\n").rstrip().rpartition(b"\n")
    match = _SEAL.fullmatch(last)
    return text, match and match[1]


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text.rstrip()).hexdigest()[:16].encode()


def load_folder(
    path: str | os.PathLike[str], config_name: str, tensors_name: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`save_folder` wrote: the config, without its ``sha256``, and the tensors.

    Values of the config are whatever the file says: callers check those that they use.

    Args:
        path: folder.
        config_name: file name of the config.
        tensors_name: file name of the tensors.

    Returns:
        The config, and the tensors by name, on the CPU.

    Raises:
        CheckpointError: the folder or a file is missing, or it holds pickle only.
        DamagedError: a file is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"cannot load from {str(folder)!r}: it {what}, and a folder with {config_name} and "
            f"{tensors_name} is needed. Give the folder that save_pretrained wrote."
        )
    config = _read_config(folder, config_name)
    expected = config.pop("sha256", None)
    if not isinstance(expected, str) or not _SHA256.fullmatch(expected):
        raise CheckpointError(
            f"{config_name} in {str(folder)!r} has sha256={_shorten(expected)}: expected the 64 "
            f"hexadecimal digits of {tensors_name}'s digest, as save_pretrained writes them. "
            "Save it again, or load another copy."
        )
    return config, _read_tensors(folder, tensors_name, expected)


def figures_table(figures: Mapping[str, float | str] | None) -> str:
    """Format measured figures as a section of a model card.

    Args:
        figures: by what was measured, with the unit and the data, such as ``"PSNR, rain (dB)"``.

    Raises:
        ConfigError: a figure is not finite.

    Example:
        >>> print(figures_table({"PSNR, rain (dB)": 31.237, "images": 100}))
        ## Measured
        | what | value |
        |---|---|
        | PSNR, rain (dB) | 31.24 |
        | images | 100 |
    """
    if not figures:
        return "## Measured\nNo figures were given when this was saved."
    rows = ["## Measured", "| what | value |", "|---|---|"]
    for what, value in figures.items():
        if isinstance(value, Real) and not math.isfinite(value):
            raise ConfigError(f"figures[{what!r}]={value}: expected a finite number or a string.")
        told = str(value) if isinstance(value, (Integral, str)) else f"{value:.4g}"
        rows.append(f"| {table_cell(what)} | {table_cell(told)} |")
    return "\n".join(rows)


def table_cell(text: str) -> str:
    r"""Write text as a cell of a Markdown table, on one line.

    Example:
        >>> table_cell("a | b\nc")
        'a \\| b c'
    """
    return " ".join(text.split("\n")).replace("|", r"\|")


def _replace_card(file: Path, text: bytes) -> None:
    """Write a model card, but not over one that somebody else wrote or edited."""
    if not file.exists() or is_own_card(file):
        replace_file(file, text)
    elif file.read_bytes() != text:
        warn(
            f"{str(file)!r} is not a model card as perceive_adapter wrote it, and is kept. Move it "
            "away to have such a card."
        )


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    where = f"{name} in {str(folder)!r}"
    remedy = "Load another copy, or save it again with save_pretrained."
    if not file.is_file():
        raise CheckpointError(
            f"{where} is missing; the folder holds {_listing(folder)}. Give the folder that "
            "save_pretrained wrote, and check that it holds this kind of checkpoint."
        )
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"{where} has {file.stat().st_size} bytes: expected at most {_MAX_CONFIG_BYTES}. "
            + remedy
        )
    try:
        config = json.loads(
            file.read_text(encoding="utf-8"), parse_constant=_refuse_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where} is not JSON ({error}). {remedy}") from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{where} holds a JSON {type(config).__name__}: expected an object. {remedy}"
        )
    return config


def _read_tensors(folder: Path, name: str, expected: str) -> dict[str, Tensor]:
    file = folder / name
    where = f"{name} in {str(folder)!r}"
    remedy = "Copy or download the whole folder again."
    if not file.is_file():
        if any(entry.suffix in PICKLES for entry in folder.iterdir()):
            raise CheckpointError(
                f"{where} is missing; the folder holds {_listing(folder)}. Pickle is never loaded, "
                "since it can run code. Ask for a safetensors copy, or convert it yourself if you "
                "trust its source."
            )
        raise CheckpointError(f"{where} is missing; the folder holds {_listing(folder)}. {remedy}")
    data = file.read_bytes()
    if data.startswith(_LFS_POINTER):
        raise DamagedError(f"{where} is a git LFS pointer, not the file. Run `git lfs pull`.")
    actual = _sha256(data)
    if actual != expected:
        raise DamagedError(
            f"{where} ({len(data)} bytes) has the SHA-256 {actual}: expected {expected}. It was "
            f"truncated or changed, or belongs to another save. {remedy}"
        )
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise DamagedError(f"{where} is not a safetensors file ({error}). {remedy}") from error


def replace_file(target: Path, data: bytes) -> None:
    """Write a file as :func:`replacing` does."""
    with replacing(target) as stream:
        stream.write(data)


@contextmanager
def replacing(target: Path, draft: str | None = None) -> Iterator[IO[bytes]]:
    """Write a file beside ``target`` and move it into place: one of them is always whole.

    Args:
        target: file to replace, if there is one.
        draft: name of the file beside it, which a process that is killed leaves behind. A short one
            is made up, as ``target`` may have the longest name that there can be.
    """
    beside = target.with_name(draft or f".{uuid.uuid4().hex}")
    try:
        with beside.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())  # or a power cut may leave the new name without its content
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _dump(config: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the config cannot be saved as JSON ({error}). "
            "Use strings, finite numbers, booleans, None, lists and dicts."
        ) from error
    return text.encode()


def _detached(tensor: Tensor) -> Tensor:
    """A contiguous copy in memory of its own, which safetensors needs of tied weights."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse_constant(digits[:20])


def _listing(folder: Path) -> str:
    return _shorten(sorted(entry.name for entry in folder.iterdir()))


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file beside the old one and move it into place."""
    replace_file(file, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
