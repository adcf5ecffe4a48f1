"""Values of command-line options, checked while they are read."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable

__all__ = ["device", "integer", "rate"]


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
