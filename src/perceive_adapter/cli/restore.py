"""``perceive-adapter restore``: image files through a backbone with its adapter."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceive_adapter.cli.backbones import add_network, add_restoring, load_wrapped
from perceive_adapter.cli.images import (
    PERCEIVED,
    Found,
    Report,
    add_paths,
    as_rgb,
    check_outputs,
    column,
    find_inputs,
    free_names,
    look,
    row,
    shown,
    tell_of_frames,
)
from perceive_adapter.cli.options import read_path
from perceive_adapter.errors import BackboneError, ConfigError, ImageError

if TYPE_CHECKING:
    from PIL import Image

    from perceive_adapter.injection.model import PerceiveModel

NAME = "restore"
SUMMARY = "Restore images with a backbone and its adapter"


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = (
        "Exit code: 0 all images were restored; 1 some could not be read, restored or written, "
        "the others were restored; 2 nothing could be done."
    )
    add = parser.add_argument
    add_paths(parser)
    add_network(parser, without_adapter="the backbone alone restores")
    add(
        "--out",
        metavar="DIR",
        type=read_path,
        required=True,
        help="where each restored image is written as a PNG, by its name below the folder that "
        "was given; a name that is taken is numbered, as of a.jpg beside a.png",
    )
    there = parser.add_mutually_exclusive_group().add_argument
    there("--overwrite", action="store_true", help="replace files that are there already")
    there(
        "--skip-existing",
        action="store_true",
        help="leave out images whose restored ones are there already, to go on after an "
        "interruption",
    )
    add(
        "--json",
        action="store_true",
        help="print a JSON array instead of a table: for each image the restored one's file, and "
        "what the adapter's perceiver tells of it, as perceive --json has it",
    )
    add_restoring(parser)


def run(arguments: Namespace) -> int:
    """Restore the images, and print where they are and what was perceived."""
    report = Report(as_json=arguments.json)
    check_outputs("--out", arguments.out, arguments.paths)
    found = find_inputs(arguments.paths, arguments.out, report)
    targets = _targets(found, arguments.out)
    there = {target for target in targets if os.path.lexists(target)}
    if arguments.skip_existing:
        left = [pair for pair in zip(found, targets, strict=True) if pair[1] not in there]
        report.note(f"{len(there)} of {len(found)} restored images are there already.")
        found, targets = [one for one, _ in left], [target for _, target in left]
    elif there and not arguments.overwrite:
        raise ConfigError(
            f"--out {arguments.out} holds files already by the names of {len(there)} of the "
            f"{len(targets)} restored images, such as {str(min(there))!r}. Give another folder, "
            "--skip-existing to restore the others alone, or --overwrite to replace them."
        )
    model = load_wrapped(arguments)
    if (channels := model.sites.image_channels) not in (1, 3):
        raise BackboneError(
            f"--backbone {arguments.backbone} takes images of {channels} channels: expected gray "
            "or RGB, as image files are. Call the wrapped model itself in Python, with a tensor."
        )
    head, *names = column("file", [one.file for one in found])
    head_out, *names_out = column("restored", targets)
    with report, nullcontext() if arguments.adapter is not None else model.disabled():
        report.head(f"{head}  {head_out}{f'  {PERCEIVED}' if model.perceiver is not None else ''}")
        for (file, _), target, *cells in zip(found, targets, names, names_out, strict=True):
            with report.skipping(file):
                record = _restore(model, file, target, arguments.tile, report)
                if record is not None:
                    cells += [row(record)] if model.perceiver is not None else []
                    report.add(record, "  ".join(cells))
    return report.code(len(there) if arguments.skip_existing else 0)


def _targets(found: Sequence[Found], out: Path) -> list[Path]:
    """Name a PNG for each image: no two alike, and none an input."""
    wanted = [out / below.with_name(f"{below.stem}.png") for _, below in found]
    return free_names(wanted, [file for file, _ in found])


def _restore(
    model: PerceiveModel, file: Path, target: Path, tile: int | None, report: Report
) -> dict[str, Any] | None:
    """Restore one file and return what is told of it, or complain where that cannot be done."""
    from perceive_adapter.data.images import open_image
    from perceive_adapter.injection.restore import is_out_of_memory

    image = open_image(file, str(file))
    tell_of_frames(file, report)
    try:
        restored = model.restore(image, tile=tile)
        seen = {} if model.perceiver is None else look(model.perceiver, as_rgb(image))
    except ImageError:
        raise
    except Exception as error:  # whatever a network raises for an image that it was not made for
        reason = (
            "do not fit into memory at once. Give --tile, such as --tile 512, or a smaller one."
            if is_out_of_memory(error)
            else f"made the network raise {type(error).__name__}: {error}"
        )
        report.complain(f"skipped {shown(file)}: {image.width} x {image.height} pixels {reason}")
        return None
    try:
        _write(restored, target, image.info.get("icc_profile"))
    except OSError as error:
        report.complain(f"the restored {shown(file)} cannot be written: {error}")
        return None
    return {"file": str(file), "restored": str(target), **seen}


def _write(restored: Image.Image, target: Path, profile: bytes | None) -> None:
    """Write a PNG, in the colour space of the image that was restored; it is whole or not there."""
    from perceive_adapter.folders import replace_file

    data = BytesIO()
    restored.save(data, "PNG", icc_profile=profile)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, data.getvalue())
