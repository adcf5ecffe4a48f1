"""Markdown tables, and figures beside the bar that they must reach."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """A figure and what it must reach.

    Args:
        name: what was measured.
        measured: the figure.
        limit: what it must reach.
        below: whether it must stay under the limit.
    """

    name: str
    measured: float
    limit: float
    below: bool = False

    @property
    def reached(self) -> bool:
        """Whether the figure is on the right side of the limit; NaN never is."""
        return self.measured < self.limit if self.below else self.measured >= self.limit

    def row(self) -> tuple[str, str, str, str]:
        """Name, figure, bar and mark."""
        limit = f"{'<' if self.below else '>='} {self.limit:.3g}"
        return self.name, f"{self.measured:.3f}", limit, "pass" if self.reached else "MISS"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def bars_table(bars: Iterable[Bar]) -> str:
    """Return figures and bars as a Markdown table."""
    return table(("figure", "measured", "bar", ""), (bar.row() for bar in bars))
