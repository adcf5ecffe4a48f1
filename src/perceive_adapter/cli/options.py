"""Values of command-line options, checked while they are read."""

from __future__ import annotations

import sys
from argparse import Action, ArgumentParser, ArgumentTypeError, BooleanOptionalAction
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from perceive_adapter.errors import ConfigError, MissingDependencyError

__all__ = [
    "between",
    "check_falls",
    "check_folder",
    "device",
    "integer",
    "name_or_path",
    "needs",
    "rate",
    "read_path",
    "say",
    "with_config",
    "with_progress",
]

T = TypeVar("T")


def read_path(text: str) -> Path:
    """Read a path; ``~`` is the home folder, also where no shell has put it there.

    Example:
        >>> read_path("photos/a.png").name
        'a.png'
    """
    if not text:
        raise ArgumentTypeError("'' names nothing: expected a path; the current folder is .")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # the home of nobody
        raise ArgumentTypeError(f"{text!r}: {error}") from None


def name_or_path(text: str) -> str:
    """Read what may be a path and may be a name; ``~`` is the home folder, as for paths.

    Example:
        >>> name_or_path("user/repo")
        'user/repo'
    """
    return str(read_path(text)) if not text or text.startswith("~") else text


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
            f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}, or "
            f"perceive_adapter anew with its extra {extra!r}, which brings all that commands need."
        )


def say(message: str) -> None:
    """Tell of what is done, on stderr, where it does not get into what is asked for."""
    print(message, file=sys.stderr, flush=True)


def with_progress(items: Sequence[T], title: str) -> Iterable[T]:
    """Go through items behind a progress bar on stderr, which is gone at the end."""
    from tqdm import tqdm

    progress: Iterable[T] = tqdm(items, title, ncols=80, file=sys.stderr, leave=False)
    return progress


def check_falls(learning_rate: float, final: float) -> None:
    """Raise ConfigError if a learning rate would rise."""
    if final > learning_rate:
        raise ConfigError(
            f"--final-learning-rate {final:g} is above --learning-rate {learning_rate:g}: expected "
            "it to fall. Give both."
        )


def check_folder(out: Path) -> None:
    """Raise ConfigError if an output folder's name is a file's."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{str(out)!r} is a file: give the name of a folder.")


def with_config(argv: Sequence[str], commands: Mapping[str, ArgumentParser]) -> list[str]:
    """Put the options of YAML files, ``--config FILE``, before those of the command line.

    A file is a mapping of option names to values: ``learning-rate: 1e-3``, ``tasks: [rain,
    haze]``, ``ratios: {rain: 2}``, ``compile: true``. Of several files the later win, and what
    the line says too wins over all.

    Args:
        argv: the command's name and its arguments.
        commands: parsers of the commands, by name.

    Raises:
        ConfigError: a file is missing or no such mapping, or the command has no such option.
        MissingDependencyError: PyYAML is not installed.
    """
    files, line = _taken_out([part for told in argv for part in _separated(told)])
    if not files or line[0] not in commands:
        return list(argv)
    # A parser tells its options' kinds by no public name.
    actions = commands[line[0]]._option_string_actions
    options: dict[str, list[str]] = {}  # by what they set, so that a later file wins
    for file in files:
        for name, value in _read_yaml(file).items():
            flag = f"--{str(name).replace('_', '-')}"
            action = _action(flag, actions, file)
            options[action.dest] = _as_arguments(flag, value, action, file)
    return [line[0], *(part for parts in options.values() for part in parts), *line[1:]]


def _taken_out(given: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Separate the files of options from the rest of the line."""
    files: list[Path] = []
    line = list(given)
    while "--config" in line[1:-1]:
        place = line.index("--config", 1)
        files.append(Path(line[place + 1]))
        del line[place : place + 2]
    return files, line


def _action(flag: str, actions: Mapping[str, Action], file: Path) -> Action:
    known = [name for name in actions if name[:2] == "--" and name not in ("--config", "--help")]
    if flag in known:
        return actions[flag]
    near = get_close_matches(flag, known, 1) or known
    raise ConfigError(
        f"--config {file} names {flag[2:]}, which is no option of this command: expected "
        f"{', '.join(name[2:] for name in near)}. Correct the name, or leave it out."
    )


def _as_arguments(flag: str, value: object, action: Action, file: Path) -> list[str]:
    """Write a value as on the command line; nothing leaves the option at its default."""
    if value is None or value in ([], {}):
        return []
    if not isinstance(value, bool):
        return [flag, *_as_texts(value)]
    if isinstance(action, BooleanOptionalAction):
        yes, no = action.option_strings
        return [yes if value == (flag == yes) else no]
    if action.nargs == 0:
        return [flag] if value else []
    if action.choices is not None:  # YAML reads the words yes and no as booleans
        return [flag, "yes" if value else "no"]
    raise ConfigError(
        f"--config {file}: {flag[2:]} is {str(value).lower()}, which YAML also makes of yes, no, "
        "on and off: expected a value. Put such a word in quotes, or leave the option out."
    )


def _separated(told: str) -> list[str]:
    return told.split("=", 1) if told.startswith("--config=") else [told]


def _as_texts(value: object) -> list[str]:
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
    except (OSError, ValueError, yaml.YAMLError) as error:  # a date of month 13 is a ValueError
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
