"""Warnings that point at the user's line, however deep in the package they come up."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

__all__ = ["warn"]

_INSIDE = ("perceive_adapter", "torch", "contextlib")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn where the package was called from.

    Calls come through torch's modules, decorators and contexts, so that no fixed number of frames
    leads there.

    Args:
        message: what was given, what was expected, and the remedy.
        category: class of the warning.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_inside(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _is_inside(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in _INSIDE
