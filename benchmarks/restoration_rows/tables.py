"""Markdown tables of the runs."""

from statistics import mean, stdev

from restoration_rows.images import MIXTURES, REAL, TASKS, UNSEEN

__all__ = ["report"]


def report(bare: dict, rows: dict[str, list[dict]]) -> list[str]:
    """The tasks with their mean, then what was never trained on."""
    lines = ["| | trained | rate | seeds | " + " | ".join(map(_told, TASKS)) + " | mean | +- |"]
    lines.append("|---" * (6 + len(TASKS)) + "|")
    named = {"backbone, untouched": [bare], **rows}
    for name, runs in named.items():
        means = [mean(run["test"][task] for task in TASKS) for run in runs]
        spread = f"{stdev(means):.2f}" if len(means) > 1 else ""
        cells = [f"{_over(runs, task):.2f}" for task in TASKS]
        rate = f"{runs[0]['rate']:g}" if "rate" in runs[0] else ""
        cells = [
            f"{runs[0]['trainable']:,}",
            rate,
            str(len(runs)),
            *cells,
            f"{mean(means):.2f}",
            spread,
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    groups = [group for group in (*MIXTURES, *UNSEEN, *REAL) if group in bare["test"]]
    lines += [
        "",
        "Not trained on, but for what a row's name says, and the distance to the bare backbone:",
        "",
    ]
    lines.append("| | " + " | ".join(named) + " |")
    lines.append("|---" * (1 + len(named)) + "|")
    for group in groups:
        base = bare["test"][group]
        cells = [
            f"{_over(runs, group):.2f} ({_over(runs, group) - base:+.2f})" for runs in rows.values()
        ]
        lines.append(f"| {_told(group)} | {base:.2f} | " + " | ".join(cells) + " |")
    return lines


def _over(runs: list[dict], group: str) -> float:
    return mean(run["test"][group] for run in runs)


def _told(group: str) -> str:
    return group.replace("_", " ").replace("+", " + ")
