"""A perceiver's audit beside the gates that Perceive-IR's authors set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from perceive_adapter.folders import write_json

if TYPE_CHECKING:
    from perceive_adapter.perceiver.audit import Audit

__all__ = ["GATES", "report"]

GATES: Final = (
    ("tier accuracy", "mean", 0.85),
    ("tier accuracy", "worst", 0.75),
    ("triplets right", "mean", 0.70),
    ("monotonic", "mean", 0.90),
    ("monotonic", "worst", 0.80),
)
"""What the authors ask of a perceiver: figure, mean or worst over degradations, least value."""


def report(
    found: Audit, facts: Mapping[str, float | str], photos: Sequence[str], file: Path
) -> dict[str, float | str]:
    """Print an audit and its gates, write them to a file, and return the model card's figures.

    Args:
        found: the audit.
        facts: of the training, for the file and the card.
        photos: names of the photographs that were audited.
        file: JSON file.
    """
    figures = found.figures()
    lines = ["| authors' gate | at least | measured | |", "|---|---|---|---|"]
    card: dict[str, float | str] = dict(facts)
    gates = []
    for name, row, least in GATES:
        measured = figures[row][name]
        met = "met" if measured >= least else "missed"
        what = f"{name}, {row} over degradations"
        lines.append(f"| {what} | {least:.2f} | {measured:.3f} | {met} |")
        card[f"{what} (authors' gate: {least:.2f})"] = measured
        gates.append({"figure": name, "over": row, "at least": least, "measured": measured})
    gated = {name for name, _, _ in GATES}
    for name, measured in figures["mean"].items():
        if name not in gated:
            card[f"{name}, mean over degradations"] = measured
    print(found.table(), "", *lines, sep="\n")
    write_json(file, {**facts, "figures": figures, "gates": gates, "audited": list(photos)})
    return card
