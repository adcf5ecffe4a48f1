"""Write docs/fleet.md: what every network of the fleet does when it is wrapped.

    python tests/fleet/table.py [--results out/fleet.jsonl] [--only NAFNet SwinIR ...] [--seconds]

Takes most of an hour on one core. Results are kept as they come, so that a run that was stopped
goes on; ``--only`` runs these members again, and ``--seconds`` times discovery again for all.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import platform
import re
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from checks import CHECKS, run_checks, timed
from compiling import Unsupported, check
from members import LARGE, LEFT_OUT, MEMBERS, Member

from perceive_adapter import plan_sites

DOC = Path(__file__).parents[2] / "docs" / "fleet.md"
COMPILING = ("compiles", "compiles to train", "exports")
COLUMNS = (*CHECKS, *COMPILING)
PACKAGES = (
    "torch",
    "torchvision",
    "spandrel",
    "spandrel_extra_arches",
    "deepinv",
    "diffusers",
    "monai",
    "segmentation_models_pytorch",
    "transformers",
)

NOR_BARE = "Nor does the bare network. "

Row = dict[str, Any]


def examine(member: Member) -> Row:
    """Run every check on one member; a check is True, or why not."""
    outcome = run_checks(member)
    row: Row = {"date": datetime.date.today().isoformat(), "seconds": round(outcome.seconds, 2)}
    if outcome.plan is None:
        return row | {"wraps": _last_line(outcome.failures["wraps"])}
    plan = outcome.plan
    row |= {
        "levels": len(plan.of("level")),
        "layers": len(plan.of("layer")),
        "backbone": plan.backbone_parameters,
        "trainable": plan.parameters,
    }
    for name in CHECKS:
        row[name] = _last_line(outcome.failures[name]) if name in outcome.failures else True
    for name in COMPILING:
        row[name] = _outcome(member, name)
    return row


def _outcome(member: Member, name: str) -> bool | str:
    try:
        check(member, name)
    except Unsupported as error:
        return f"{NOR_BARE}{error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return True


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def _short(text: str) -> str:
    """Return the first line of an error, or the one in which torch.compile tells the cause."""
    prefix = NOR_BARE if text.startswith(NOR_BARE) else ""
    lines = [line.strip() for line in text.removeprefix(prefix).splitlines() if line.strip()]
    told = [line.partition(": ")[2] for line in lines if line.startswith("Developer debug")]
    return prefix + re.sub(r"/\S*/site-packages/", "", (told or lines)[0])[:200]


def full_size() -> float:
    """Return the seconds of one core that discovery takes in a Restormer of the published size."""
    from spandrel_extra_arches.architectures.Restormer import Restormer

    net = Restormer()
    taken = []
    for _ in range(3):
        start = time.process_time()
        plan_sites(net)
        taken.append(time.process_time() - start)
    return min(taken)


def write(rows: dict[str, Row], restormer: float) -> str:
    """Return the document."""
    reasons: dict[str, int] = {}
    lines = [_line(name, rows[name], reasons) for name in MEMBERS if name in rows]
    through = sum(all(row.get(name) is True for name in CHECKS) for row in rows.values())
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    left = [f"- {name}: {why}." for name, why in LEFT_OUT.items()]
    head = ("network", "levels", "layers", "parameters", "trainable", "seconds", *COLUMNS)
    return "\n".join(
        [
            "# The fleet",
            "",
            "The restoration architectures of spandrel and spandrel_extra_arches, all but the",
            f"{len(left)} at the end, and networks of other packages, unmodified, small, with",
            "random weights. Written by `python tests/fleet/table.py` from the checks that",
            "`tests/fleet` runs.",
            "",
            f"{_versions(rows)}",
            "",
            f"{through} of {len(rows)} networks go all the way: wrapped without configuration (or",
            "with an example, where they take more than an image of 64 px), the output at step 0",
            "that of the frozen bare network bit for bit, every prompt parameter trained, branches",
            "folded, the adapter saved and loaded, the bare network given back. Seconds are those",
            "of one core that `wrap` takes; discovery in a Restormer of the published size, 26 M",
            f"parameters, takes {restormer:.1f}. Compiled means `torch.compile(fullgraph=True)`",
            "with the backend aot_eager, training with the perception given from outside; exported",
            "means `torch.export` with `strict=False` and the perception as an input. Numbers are",
            "those of the reasons below.",
            "",
            f"| {' | '.join(head)} |",
            f"|{'---|' * len(head)}",
            *lines,
            "",
            "## Reasons",
            "",
            *notes,
            "",
            "## Not built",
            "",
            *left,
            "",
        ]
    )


def _line(name: str, row: Row, reasons: dict[str, int]) -> str:
    if "levels" not in row:
        number = reasons.setdefault(_short(row["wraps"]), len(reasons) + 1)
        return f"| {name} | not wrapped ({number}) |"
    cells = [f"{row['levels']}", f"{row['layers']}", f"{row['backbone']:,}"]
    cells += [f"{row['trainable']:,}", f"{row['seconds']:.1f}"]
    for column in COLUMNS:
        outcome = row[column]
        if outcome is not True:
            number = reasons.setdefault(_short(outcome), len(reasons) + 1)
        cells.append("yes" if outcome is True else f"no ({number})")
    return f"| {' | '.join([name, *cells])} |"


def _versions(rows: dict[str, Row]) -> str:
    dates = sorted({row["date"] for row in rows.values()})
    found = [f"{name} {metadata.version(name)}" for name in PACKAGES]
    ran = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return f"{ran}, CPU, Python {platform.python_version()}, {', '.join(found)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("out/fleet.jsonl"))
    parser.add_argument("--only", nargs="*", default=[], choices=list(MEMBERS), metavar="NETWORK")
    parser.add_argument("--seconds", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows: dict[str, Row] = {}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    if options.results.exists():
        rows = dict(json.loads(line) for line in options.results.read_text().splitlines())
    missing = [name for name in sorted(MEMBERS, key=LARGE.__contains__) if name not in rows]
    for name in options.only or missing:
        rows[name] = examine(MEMBERS[name])
        print(name, rows[name], flush=True)
        with options.results.open("a") as file:
            file.write(json.dumps([name, rows[name]]) + "\n")
    if options.seconds:
        for name, row in rows.items():
            row["seconds"] = round(timed(MEMBERS[name])[1], 2)
        lines = [json.dumps([name, row]) + "\n" for name, row in rows.items()]
        options.results.write_text("".join(lines))
    DOC.write_text(write(rows, full_size()))


if __name__ == "__main__":
    main()
