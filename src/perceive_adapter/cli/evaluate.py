"""``perceive-adapter evaluate``: a backbone alone beside the same one wrapped."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from perceive_adapter.cli.backbones import (
    add_network,
    add_restoring,
    load_wrapped,
    side_by_side,
)
from perceive_adapter.cli.options import (
    check_folder,
    integer,
    needs,
    read_path,
    with_progress,
)
from perceive_adapter.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from perceive_adapter.evaluation.cases import Case
    from perceive_adapter.evaluation.measure import Measured, Restore

NAME = "evaluate"
SUMMARY = "Measure PSNR and SSIM of a backbone alone and of the same one with an adapter"

_NAMES = ("pairs", "synthetic", "three-tasks", "five-tasks")


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add_network(parser, without_adapter="the backbone alone")
    add(
        "--data",
        metavar="DIR",
        type=read_path,
        required=True,
        help="where the sets are, at any depth",
    )
    add(
        "--protocol",
        choices=_NAMES,
        default="pairs",
        help="pairs: every set of pairs (default); synthetic: every image with each degradation; "
        "three-tasks: SOTS, Rain100L, CBSD68; five-tasks: GoPro and LOL too",
    )
    add(
        "--broken",
        choices=("raise", "skip"),
        default="raise",
        help="what to do with files without a partner, and images that are damaged, tiny, or that "
        "the network fails on",
    )
    add(
        "--out",
        metavar="DIR",
        type=read_path,
        help="where table, CSV, stamp and pictures are written",
    )
    add("--limit", type=integer(1, 10**6), metavar="N", help="images of each group (all)")
    add_restoring(parser)


def run(arguments: Namespace) -> int:
    """Evaluate, print the table, and write what was asked for."""
    needs("torchmetrics", "matplotlib", extra="train")
    from perceive_adapter.evaluation.measure import compare
    from perceive_adapter.evaluation.protocols import PROTOCOLS
    from perceive_adapter.evaluation.report import GRID_ROWS, table, thumbnail

    out: Path | None = arguments.out
    if out is not None:
        check_folder(out)
        if arguments.protocol == "synthetic" and out.resolve().is_relative_to(
            arguments.data.resolve()
        ):
            raise ConfigError(
                f"--out {out} lies in --data, whose images are all measured, the report's pictures "
                "among them: give a folder elsewhere."
            )
    skipped: list[str] | None = [] if arguments.broken == "skip" else None
    cases = PROTOCOLS[arguments.protocol].cases(arguments.data, skipped)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    if arguments.limit is not None:
        cases = _limited(cases, arguments.limit)
    shown: dict[str, dict[str, Tensor]] = {}

    def keep(case: Case, images: dict[str, Tensor]) -> None:
        if case.group not in shown and len(shown) < GRID_ROWS:
            shown[case.group] = {name: thumbnail(image) for name, image in images.items()}

    measured = compare(
        _networks(arguments),
        with_progress(cases, "evaluate"),
        device=arguments.device,
        skipped=skipped,
        keep=keep if out is not None else None,
    )
    if skipped:
        print(f"Skipped {len(skipped)} images, such as: {skipped[0]}.", file=sys.stderr)
    if not measured:
        raise ConfigError(f"of {str(arguments.data)!r} nothing is left to measure.")
    print(table(measured))
    if out is not None:
        _write(arguments, out, measured, shown, skipped or [])
    return 0


def _networks(arguments: Namespace) -> dict[str, Restore]:
    """The backbone alone, and wrapped where there is an adapter."""
    both = side_by_side(load_wrapped(arguments), arguments.tile)
    return both if arguments.adapter is not None else {"backbone": both["backbone"]}


def _limited(cases: list[Case], limit: int) -> list[Case]:
    """So many images of each group, the same ones every time."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group, []).append(case)
    chosen = []
    for group in groups.values():
        places = Random(0).sample(range(len(group)), min(limit, len(group)))
        chosen += [group[place] for place in sorted(places)]
    return chosen


def _write(
    arguments: Namespace,
    out: Path,
    measured: list[Measured],
    shown: dict[str, dict[str, Tensor]],
    skipped: list[str],
) -> None:
    from perceive_adapter.evaluation.report import draw_bars, draw_grid, stamp, table, write_csv
    from perceive_adapter.folders import replace_file, write_json

    made: dict[str, Any] = {**stamp(arguments.protocol, arguments.device)}
    for name in ("backbone", "adapter", "data", "tile", "limit", "broken"):
        value = getattr(arguments, name)
        made[name] = str(value) if isinstance(value, Path) else value
    made["skipped"] = len(skipped)
    shown_values = {name: "none" if value is None else value for name, value in made.items()}
    lines = [*(f"- {name}: {value}" for name, value in shown_values.items()), "", table(measured)]
    lines += ["", *(f"- skipped: {one}" for one in skipped), ""] if skipped else [""]
    replace_file(out / "table.md", "\n".join(lines).encode(errors="backslashreplace"))
    write_json(out / "stamp.json", made)
    write_csv(measured, out / "images.csv")
    draw_bars(measured, out / "psnr.png")
    draw_grid(shown, out / "images.png")
    print(f"\nWritten to {str(out)!r}: table.md, images.csv, stamp.json, psnr.png, images.png.")
