"""``perceive-adapter inspect``: where prompts go into a backbone, and what they cost."""

from __future__ import annotations

import dataclasses
import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceive_adapter.cli.backbones import add_network, load_network
from perceive_adapter.cli.options import integer, needs, read_path
from perceive_adapter.errors import ConfigError

if TYPE_CHECKING:
    from perceive_adapter.evaluation.cost import Cost
    from perceive_adapter.injection.model import PerceiveModel
    from perceive_adapter.injection.plan import Role

NAME = "inspect"
SUMMARY = "Show where prompts go into a backbone, and what they cost"

_DRAWINGS = (".png", ".svg")


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add_network(parser, without_adapter="what wrap() chooses")
    add("--json", action="store_true", help="print a JSON object instead of tables")
    add(
        "--drawing",
        metavar="FILE",
        type=read_path,
        help="draw the sites from input to output, to a .png or .svg",
    )
    add(
        "--size",
        metavar="PX",
        type=integer(16, 4096),
        default=256,
        help="side of the image that the cost is counted on (256)",
    )


def run(arguments: Namespace) -> int:
    """Wrap the backbone, count its cost, and print and draw what was found."""
    drawing: Path | None = arguments.drawing
    if drawing is not None:
        needs("matplotlib", extra="train")
        _check_drawing(drawing)
    from perceive_adapter.evaluation.cost import measure_cost
    from perceive_adapter.injection.wrap import wrap

    backbone = load_network(arguments.backbone).eval()
    model = wrap(backbone, arguments.adapter, is_trainable=True)
    cost = measure_cost(model, arguments.size)
    print(_as_json(model, cost) if arguments.json else _as_tables(model, cost))
    if drawing is not None:
        from perceive_adapter.evaluation.drawing import draw_sites

        draw_sites(model, drawing)
    return 0


def _check_drawing(file: Path) -> None:
    if file.suffix not in _DRAWINGS or file.is_dir():
        raise ConfigError(f"--drawing {file}: expected a file name that ends in .png or .svg.")
    if not file.parent.is_dir():
        raise ConfigError(f"--drawing {file}: there is no folder {str(file.parent)!r}; make it.")


def _kinds(model: PerceiveModel) -> dict[Role, str]:
    """The kind of prompt module of each role that has sites."""
    config = model.injector.config
    kinds: dict[Role, str | None] = {"level": config.level, "layer": config.layer}
    return {role: kind for role, kind in kinds.items() if kind is not None}


def _as_tables(model: PerceiveModel, cost: Cost) -> str:
    steered = ", ".join(f"{name} ({width})" for name, width in _sources(model).items())
    notes = [f"steered by {steered}"]
    if treats := model.status().treats:
        notes.append(f"works where one of these is perceived: {', '.join(treats)}")
    if blocked := model.sites.blocked:
        notes.append(
            f"{len(blocked)} sites are hidden behind zero scales of the backbone, so that their "
            f"prompts do not train: {', '.join(blocked)}"
        )
    return "\n\n".join([model.sites.table(_kinds(model)), "\n".join(notes), str(cost)])


def _as_json(model: PerceiveModel, cost: Cost) -> str:
    plan, status, kinds = model.sites, model.status(), _kinds(model)
    sites: list[dict[str, Any]] = [
        {
            **dataclasses.asdict(site),
            "layout": str(site.layout),
            "prompt": kinds[site.role],
            "blocked": site.name in plan.blocked,
        }
        for site in plan
    ]
    record = {
        "backbone": type(model.backbone).__name__,
        "sites": sites,
        "sources": _sources(model),
        "treats": status.treats,
        "parameters": {
            "backbone": plan.backbone_parameters,
            "adapter": plan.parameters,
            "trainable": status.trainable,
            "share": plan.parameters / max(plan.backbone_parameters, 1),
        },
        "multiply_adds_per_pixel": dataclasses.asdict(cost),
    }
    return json.dumps(record, indent=2)


def _sources(model: PerceiveModel) -> dict[str, int]:
    return dict(model.injector.encoder.sources)
