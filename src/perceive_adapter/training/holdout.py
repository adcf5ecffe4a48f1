"""What is set aside of training data: contents decide, so that no copy of it is trained on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Final

__all__ = ["FEWEST", "set_aside"]

FEWEST: Final = 5  # parts of a task from which some are set aside
_SHARE: Final = 10  # one in so many


def set_aside(tasks: Sequence[Collection[Collection[str]]]) -> set[str]:
    """Choose contents to set aside: of each task one part in ten, one of five to nine, or none.

    What is set aside of one task is set aside of all, so that tasks with contents in common are
    decided together. Parts that share a content, in whichever tasks, count as one. Hashes decide,
    not names or the order of anything.

    Args:
        tasks: for each the parts that must not be torn apart, such as the frames of a scene or
            copies of one photograph, as digests of their contents.

    Returns:
        The digests of what is set aside.

    Example:
        >>> photos, few = [{f"{index}"} for index in range(30)], [{"3"}, {"4"}]
        >>> aside = set_aside([photos, few])
        >>> len(aside), aside & {"3", "4"}
        (3, set())
    """
    first = _joined(part for parts in tasks for part in parts)
    named = [{first[content] for part in parts for content in part} for parts in tasks]
    spared = {name for names in named if len(names) < FEWEST for name in names}
    taken: set[str] = set()
    seen: Counter[str] = Counter()
    for names in sorted(named, key=lambda names: (len(names), sorted(names))):
        share = max(1, len(names) // _SHARE) if len(names) >= FEWEST else 0
        lacking = max(0, share - len(names & taken))
        # first what no smaller task has, since those have their shares already
        free = sorted(names - taken - spared, key=lambda name: (seen[name], _drawn(name)))
        taken.update(free[:lacking])
        seen.update(names)
    return {content for content, name in first.items() if name in taken}


def _joined(parts: Iterable[Collection[str]]) -> dict[str, str]:
    """Return for each content the least of all contents that it is joined with."""
    above: dict[str, str] = {}

    def top(content: str) -> str:
        while above[content] != content:
            above[content] = content = above[above[content]]
        return content

    for part in parts:
        for content in part:
            above.setdefault(content, content)
        tops = {top(content) for content in part}
        above.update(dict.fromkeys(tops, min(tops, default="")))
    return {content: top(content) for content in above}


def _drawn(name: str) -> str:
    """Hash once more: the least of many contents is small, and large parts would come first."""
    return hashlib.sha256(name.encode()).hexdigest()
