"""The command line, ``perceive-adapter COMMAND ...``: one module for each command."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Protocol, TextIO

from perceive_adapter._version import __version__
from perceive_adapter.cli import evaluate, finetune, inspect, perceive, restore, train_perceiver
from perceive_adapter.cli.options import read_path, with_config
from perceive_adapter.errors import PerceiveError

__all__ = ["COMMANDS", "Command", "main"]


class Command(Protocol):
    """What a command's module has; heavy imports belong into ``run``, so that help is fast."""

    NAME: str
    SUMMARY: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it, and return the exit code."""
        ...


COMMANDS: tuple[Command, ...] = (perceive, train_perceiver, finetune, evaluate, restore, inspect)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        0: done. 1: done, except for files that could not be read. 2: cannot be done; why and the
        remedy are on stderr. 70: a fault of the program, or of the user's code, whose traceback is
        on stderr. 130: interrupted. 141: nobody reads the output.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it: no name ends a run
    if argv is None:
        warnings.showwarning = _show_warning
    try:
        parser, commands = _parsers()
        given = sys.argv[1:] if argv is None else argv
        arguments = parser.parse_args(with_config(given, commands))
        code: int = arguments.run(arguments)
    except BrokenPipeError:  # who reads the output has enough; nor may the last flush fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (PerceiveError, OSError) as error:
        print(f"perceive-adapter: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("perceive-adapter: interrupted", file=sys.stderr)
        return 130
    except Exception:  # not 1, which says that most is done
        traceback.print_exc()
        return 70
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print what a user of the command line has use for, without a line of our code."""
    text = f"perceive-adapter: note: {message}\n"
    if not issubclass(category, UserWarning):
        text = warnings.formatwarning(message, category, filename, lineno, line)
    print(text, end="", file=file or sys.stderr)


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Make the parser of the line, and those of the commands, by name."""
    parser = argparse.ArgumentParser(
        "perceive-adapter", description="Perceive what is wrong with images, and teach networks to."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    by_name = {}
    for command in COMMANDS:
        about = command.SUMMARY
        by_name[command.NAME] = added = commands.add_parser(
            command.NAME, help=about, description=f"{about}.", allow_abbrev=False
        )
        command.add_arguments(added)
        added.add_argument(
            "--config", metavar="FILE", type=read_path, help="YAML of these options; the line wins"
        )
        added.set_defaults(run=command.run)
    return parser, by_name
