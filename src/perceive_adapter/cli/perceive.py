"""``perceive-adapter perceive``: what is wrong with image files, and how badly."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceive_adapter.cli.images import (
    PERCEIVED,
    Report,
    add_paths,
    as_rgb,
    as_seen,
    check_outputs,
    column,
    find_inputs,
    free_names,
    look,
    row,
    shown,
    tell_of_frames,
)
from perceive_adapter.cli.options import device, name_or_path, read_path
from perceive_adapter.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from perceive_adapter.perceiver import QualityPerceiver

NAME = "perceive"
SUMMARY = "Tell the quality, the degradations and their severity of images"

_RAMP = ("#b2182b", "#f7f7f7", "#2166ac")  # red to blue, which the colour-blind tell apart too
_OPACITY = 0.45


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = (
        "Exit code: 0 all images were perceived; 1 some could not be read, or their maps not be "
        "written, the others were perceived; 2 nothing could be done."
    )
    add = parser.add_argument
    add_paths(parser)
    add(
        "--perceiver",
        metavar="NAME_OR_FOLDER",
        type=name_or_path,
        default="perceive-tiny",
        help="perceive-tiny (default), a saved perceiver's folder, or user/repo of the Hub",
    )
    add("--revision", metavar="R", help="branch, tag or commit of a Hub repository")
    add(
        "--json",
        action="store_true",
        help="print a JSON array instead of a table: for each image its score (0 to 1, higher is "
        "better), tier probabilities, probability and severity (0 to 1) of each degradation, and "
        "its embedding",
    )
    add(
        "--map",
        metavar="DIR",
        type=read_path,
        help="write each image with its quality drawn over it, from red (low) to blue (high), to "
        "a PNG in this folder",
    )
    add("--device", type=device, default="cpu", help="cpu (default), cuda, cuda:1 or auto")


def run(arguments: Namespace) -> int:
    """Perceive the images and print what was found."""
    from perceive_adapter.perceiver import QualityPerceiver

    _check_revision(arguments)
    if arguments.map is not None:
        check_outputs("--map", arguments.map, arguments.paths)
    perceiver = QualityPerceiver.from_pretrained(
        arguments.perceiver, revision=arguments.revision
    ).to(arguments.device)
    report = Report(as_json=arguments.json)
    files = [found.file for found in find_inputs(arguments.paths, arguments.map, report)]
    maps = [None] * len(files) if arguments.map is None else _map_files(files, arguments.map)
    head, *names = column("file", files)
    with report:
        report.head(f"{head}  {PERCEIVED}")
        for file, name, drawn in zip(files, names, maps, strict=True):
            with report.skipping(file):
                record = _perceive(perceiver, file, drawn, report)
                report.add(record, f"{name}  {row(record)}")
    return report.code()


def _check_revision(arguments: Namespace) -> None:
    from perceive_adapter.perceiver.bundled import locate

    if arguments.revision is not None and Path(locate(arguments.perceiver)).is_dir():
        raise ConfigError(
            f"--revision {arguments.revision} is of a Hub repository, and {arguments.perceiver!r} "
            "is here already. Leave it out, or name a repository with --perceiver user/repo."
        )


def _map_files(files: Sequence[Path], folder: Path) -> list[Path]:
    """Name a PNG for each file: no two alike, and none of them an image that is perceived."""
    folder.mkdir(parents=True, exist_ok=True)
    return free_names([folder / f"{file.stem}-quality.png" for file in files], files)


def _perceive(
    perceiver: QualityPerceiver, file: Path, drawn: Path | None, report: Report
) -> dict[str, Any]:
    """Perceive one file, draw its map where that can be written, and return all that was found."""
    pixels = as_rgb(file)
    tell_of_frames(file, report)
    record = {"file": str(file), **look(perceiver, pixels)}
    if drawn is not None:
        try:
            _draw(pixels[0], perceiver.quality_map(as_seen(pixels, perceiver))[0], drawn)
            record["map"] = str(drawn)
        except OSError as error:
            report.complain(f"the map of {shown(file)} cannot be written: {error}")
    return record


def _draw(pixels: Tensor, quality: Tensor, target: Path) -> None:
    """Draw the quality map (h, w) over the pixels (3, H, W), and write a PNG."""
    from PIL import Image, ImageOps

    from perceive_adapter.folders import replace_file

    photo = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    levels = Image.fromarray(quality.mul(255).round().byte().cpu().numpy())
    smooth = levels.resize(photo.size, Image.Resampling.BILINEAR)
    low, middle, high = _RAMP
    data = BytesIO()
    Image.blend(photo, ImageOps.colorize(smooth, low, high, middle), _OPACITY).save(data, "PNG")
    replace_file(target, data.getvalue())
