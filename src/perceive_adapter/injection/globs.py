"""Globs over dotted names: ``*`` stays within one level, ``**`` does not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from perceive_adapter.errors import SiteError

__all__ = ["matching"]


def matching(pattern: str, names: Iterable[str], what: str) -> list[str]:
    """Return the names that a pattern matches, in their order.

    Args:
        pattern: dotted name, in which ``*`` and ``?`` stand for anything but a dot and ``**`` for
            anything.
        names: the candidates.
        what: what messages call them, such as ``"module"``.

    Raises:
        SiteError: none matches; the message lists the closest.

    Example:
        >>> matching("body.*", ["body", "body.0", "body.0.conv"], "module")
        ['body.0']
    """
    candidates = [name for name in names if name]
    expression = _compiled(pattern)
    if found := [name for name in candidates if expression.fullmatch(name)]:
        return found
    near = difflib.get_close_matches(pattern, candidates, n=5, cutoff=0.3) or candidates[:5]
    raise SiteError(
        f"{pattern!r} matches none of the backbone's {len(candidates)} {what}s; the closest are "
        f"{', '.join(near) or 'none'}, and backbone.named_{what}s() lists all"
    )


def _compiled(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    wild = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return re.compile("".join(wild.get(part, re.escape(part)) for part in parts))
