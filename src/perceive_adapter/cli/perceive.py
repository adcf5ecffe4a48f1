"""``perceive-adapter perceive``: what is wrong with image files, and how badly."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceive_adapter.cli.options import device
from perceive_adapter.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from torch import Tensor

    from perceive_adapter.perceiver import QualityPerceiver

NAME = "perceive"
SUMMARY = "Tell the quality, the degradations and their severity of images"

_PRESENT = 0.5  # probability from which a degradation is listed
_RAMP = ("#b2182b", "#f7f7f7", "#2166ac")  # red to blue, which the colour-blind tell apart too
_OPACITY = 0.45
_REMEDY = (
    "Give an 8-bit gray or RGB image, with or without alpha (JPEG, PNG, WebP, BMP, TIFF), or "
    "leave this one out."
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = (
        "Exit code: 0 all images were perceived; 1 some could not be read, or their maps not be "
        "written, the others were perceived; 2 nothing could be done."
    )
    add = parser.add_argument
    add("paths", metavar="PATH", nargs="+", type=Path, help="image, or folder to search for images")
    add(
        "--perceiver",
        metavar="NAME_OR_FOLDER",
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
        type=Path,
        help="write each image with its quality drawn over it, from red (low) to blue (high), to "
        "a PNG in this folder",
    )
    add("--device", type=device, default="cpu", help="cpu (default), cuda, cuda:1 or auto")


def run(arguments: Namespace) -> int:
    """Perceive the images and print what was found."""
    from perceive_adapter.perceiver import QualityPerceiver

    _check_revision(arguments)
    perceiver = QualityPerceiver.from_pretrained(
        arguments.perceiver, revision=arguments.revision
    ).to(arguments.device)
    files, failed = _find(arguments.paths, arguments.map)
    maps = [None] * len(files) if arguments.map is None else _map_files(files, arguments.map)
    width = max((len(_shown(file)) for file in files), default=4)
    if not arguments.json:
        print(f"{'file':{width}}  score  {'tier':8}  degradations and their severity")
    records, count = [], 0
    for file, drawn in zip(files, maps, strict=True):
        try:
            record = _perceive(perceiver, file, drawn)
        except ImageError as error:
            failed = True
            _complain(f"skipped {_shown(file)}: {error}. {_REMEDY}")
            continue
        count += 1
        failed |= drawn is not None and "map" not in record
        if arguments.json:
            records.append(record)
        else:
            print(f"{_shown(file):{width}}  {_row(record)}", flush=True)
    if arguments.json:
        print(json.dumps(records, indent=2, allow_nan=False))
    return int(failed) if count else 2


def _check_revision(arguments: Namespace) -> None:
    from perceive_adapter.perceiver.bundled import locate

    if arguments.revision is not None and Path(locate(arguments.perceiver)).is_dir():
        raise ConfigError(
            f"--revision {arguments.revision} is of a Hub repository, and {arguments.perceiver!r} "
            "is here already. Leave it out, or name a repository with --perceiver user/repo."
        )


def _find(paths: Sequence[Path], maps: Path | None) -> tuple[list[Path], bool]:
    """Search the folders among the paths, but for one of maps, and tell whether one is empty."""
    from perceive_adapter.data.samples import IMAGE_SUFFIXES, find_images

    files, failed = [], False
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        try:
            found = find_images(path)
        except ConfigError:
            failed = True
            _complain(
                f"skipped the folder {_shown(path)}: it holds no image, at any depth. Give a "
                f"folder of files that end in {', '.join(IMAGE_SUFFIXES)}."
            )
            continue
        if maps is not None and (folder := _place(maps)) != _place(path):
            found = [file for file in found if not _place(file).startswith(f"{folder}{os.sep}")]
        files += found
    return files, failed


def _map_files(files: Sequence[Path], folder: Path) -> list[Path]:
    """Name a PNG for each file: no two alike, and none of them an image that is perceived."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = {_place(file) for file in files}
    counts: Counter[str] = Counter()
    named = []
    for file in files:
        while True:
            counts[file.stem.lower()] += 1
            count = counts[file.stem.lower()]
            target = folder / f"{file.stem}-quality{f'-{count}' if count > 1 else ''}.png"
            if _place(target) not in taken:
                break
        taken.add(_place(target))
        named.append(target)
    return named


def _place(file: Path) -> str:
    """Where a file lies, alike for names that some file systems take for the same."""
    return os.path.realpath(file).lower()


def _perceive(perceiver: QualityPerceiver, file: Path, drawn: Path | None) -> dict[str, Any]:
    """Perceive one file, draw its map where that can be written, and return all that was found."""
    import torch

    from perceive_adapter.data.images import read_image

    pixels = read_image(file).color.expand(-1, 3, -1, -1)
    image = pixels.to(perceiver.prompts.context.device, torch.float32) / 255
    with torch.no_grad():
        perceived = perceiver(image)
    tiers = dict(zip(perceiver.tiers, perceived.tiers[0].tolist(), strict=True))
    names = perceiver.degradations
    record = {
        "file": str(file),
        "score": perceived.score[0].item(),
        "tier": max(tiers, key=tiers.__getitem__),
        "tiers": tiers,
        "degradations": dict(zip(names, perceived.degradations[0].tolist(), strict=True)),
        "severity": dict(zip(names, perceived.severity[0].tolist(), strict=True)),
        "embedding": perceived.embedding[0].tolist(),
    }
    if drawn is not None:
        try:
            _draw(pixels[0], perceiver.quality_map(image)[0], drawn)
            record["map"] = str(drawn)
        except OSError as error:
            _complain(f"the map of {_shown(file)} cannot be written: {error}")
    return record


def _draw(pixels: Tensor, quality: Tensor, target: Path) -> None:
    """Draw the quality map (h, w) over the pixels (3, H, W), and write a PNG."""
    from PIL import Image, ImageOps

    photo = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    levels = Image.fromarray(quality.mul(255).round().byte().cpu().numpy())
    smooth = levels.resize(photo.size, Image.Resampling.BILINEAR)
    low, middle, high = _RAMP
    Image.blend(photo, ImageOps.colorize(smooth, low, high, middle), _OPACITY).save(target)


def _row(record: dict[str, Any]) -> str:
    """The row of the table after the file's name."""
    severity = record["severity"]
    present = [name for name, value in record["degradations"].items() if value >= _PRESENT]
    present.sort(key=severity.__getitem__, reverse=True)
    listed = ", ".join(f"{name.replace('_', ' ')} {severity[name]:.2f}" for name in present)
    none = "none" if severity else "not told by this perceiver"
    return f"{record['score']:5.3f}  {record['tier']:8}  {listed or none}"


def _shown(path: Path) -> str:
    """The path as it will be printed, where its characters are not all in stdout's encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    return str(path).encode(encoding, "backslashreplace").decode(encoding)


def _complain(message: str) -> None:
    print(f"perceive-adapter: {message}", file=sys.stderr)
