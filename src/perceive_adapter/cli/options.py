"""Values of command-line options, checked while they are read."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from perceive_adapter.errors import ConfigError, MissingDependencyError

__all__ = ["between", "device", "integer", "needs", "rate", "with_config"]


def integer(low: int, high: int) -> Callable[[str], int]:
    """Return a reader of whole numbers from ``low`` to ``high``.

    Example:
        >>> integer(1, 9)("4")
        4
    """

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise ArgumentTypeError(f"{text!r}: expected a whole number from {low} to {high}")
        return value

    return read


def rate(text: str) -> float:
    """Read a learning rate, above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"{text!r}: expected a number above 0 and at most 1, such as 4e-5")
    return value


def between(low: float, high: float) -> Callable[[str], float]:
    """Return a reader of numbers from ``low`` to below ``high``.

    Example:
        >>> between(0, 1)("0.5")
        0.5
    """

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = high
        if not low <= value < high:
            raise ArgumentTypeError(
                f"{text!r}: expected a number of {low:g} or more, below {high:g}"
            )
        return value

    return read


def needs(*modules: str, extra: str) -> None:
    """Raise, before anything is done, if a module is not installed.

    Raises:
        MissingDependencyError: it names the extra that installs it.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"{' and '.join(missing)} not installed: pip install "
            f'"perceive-adapter[{extra}]", or that alone.'
        )


def with_config(argv: Sequence[str]) -> list[str]:
    """Put the options of a YAML file, ``--config FILE``, before those of the command line.

    The file is a mapping of option names to values: ``learning-rate: 1e-3``, ``tasks: [rain,
    haze]``, ``ratios: {rain: 2}``, ``compile: true``. What the line says too wins.

    Raises:
        ConfigError: the file is missing or no such mapping.
        MissingDependencyError: PyYAML is not installed.
    """
    given = [part for told in argv for part in _separated(told)]
    if "--config" not in given[1:-1]:
        return given
    place = given.index("--config")
    options: list[str] = []
    for name, value in _read_yaml(Path(given[place + 1])).items():
        flag = f"--{str(name).replace('_', '-')}"
        if isinstance(value, bool):
            options += [flag] if value else []
        elif value is not None:
            options += [flag, *_told(value)]
    return [given[0], *options, *given[1:place], *given[place + 2 :]]


def _separated(told: str) -> list[str]:
    return told.split("=", 1) if told.startswith("--config=") else [told]


def _told(value: object) -> list[str]:
    if isinstance(value, dict):
        return [f"{name}={part}" for name, part in value.items()]
    return [str(part) for part in (value if isinstance(value, list) else [value])]


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError(
            "--config reads YAML, and PyYAML is not installed: pip install pyyaml."
        ) from error
    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file}: cannot be read as YAML ({error}).") from error
    if not isinstance(options, dict):
        raise ConfigError(
            f"--config {file} holds a {type(options).__name__}: expected options and their values, "
            "such as learning-rate: 1e-3."
        )
    return options


def device(text: str) -> str:
    """Read the name of a torch device that is there; ``auto`` is a GPU, or else the CPU."""
    import torch

    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentTypeError(
            f"{text!r}: torch has no such device here ({reason}); use cpu, or cuda with a GPU"
        ) from None
    return text
