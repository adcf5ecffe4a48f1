"""Image files that a command is given: finding them, naming what is made of them, telling of it."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from perceive_adapter.cli.options import check_folder, read_path
from perceive_adapter.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from torch import Tensor

    from perceive_adapter.data.images import Image
    from perceive_adapter.perceiver import QualityPerceiver

__all__ = [
    "PERCEIVED",
    "Found",
    "Report",
    "add_paths",
    "as_rgb",
    "as_seen",
    "check_outputs",
    "column",
    "find_inputs",
    "free_names",
    "look",
    "row",
    "shown",
    "tell_of_frames",
]

PERCEIVED = f"score  {'tier':8}  degradations and their severity"  # the head of :func:`row`
_PRESENT = 0.5  # probability from which a degradation is listed
_REMEDY = (
    "Give an 8-bit gray or RGB image, with or without alpha (JPEG, PNG, WebP, BMP, TIFF), or "
    "leave this one out."
)


class Found(NamedTuple):
    """An image file, and its name below the folder in which it was found."""

    file: Path
    below: Path


class Report:
    """What is told of images, as rows or as a JSON array, and of those that cannot be done.

    Inside it as a context rows and records are printed as they come.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._count = 0
        self._failed = False

    def __enter__(self) -> Report:
        if self._as_json:
            print("[", end="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._as_json:  # also of a run that is interrupted
            print("\n]" if self._count else "]", flush=True)

    def head(self, line: str) -> None:
        """Tell the names of the columns."""
        if not self._as_json:
            print(line)

    def add(self, record: dict[str, Any], line: str) -> None:
        """Tell of an image: by its record in JSON, or else by its row."""
        self._count += 1
        if self._as_json:
            text = textwrap.indent(json.dumps(record, indent=2, allow_nan=False), "  ")
            line = f"{',' if self._count > 1 else ''}\n{text}"
        print(line, end="" if self._as_json else "\n", flush=True)

    def note(self, message: str) -> None:
        """Tell what is worth knowing and nothing has failed by, on stderr."""
        print(f"perceive-adapter: {message}", file=sys.stderr)

    def complain(self, message: str) -> None:
        """Tell what cannot be done, on stderr."""
        self._failed = True
        self.note(message)

    @contextmanager
    def skipping(self, file: Path) -> Iterator[None]:
        """Go on after an image that is none, or none that can be worked on."""
        from perceive_adapter.data.file_headers import TooLargeError

        try:
            yield
        except TooLargeError as error:
            self.complain(f"skipped {shown(file)}: {error}.")
        except ImageError as error:
            self.complain(f"skipped {shown(file)}: {error}. {_REMEDY}")

    def code(self, done_before: int = 0) -> int:
        """Return the exit code: 0 all done, 1 some, 2 none."""
        return int(self._failed) if self._count + done_before else 2


def add_paths(parser: ArgumentParser) -> None:
    """Declare the images and folders that a command takes."""
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        type=read_path,
        help="image, or folder to search for images",
    )


def check_outputs(option: str, folder: Path, paths: Sequence[Path]) -> None:
    """Raise ConfigError if outputs cannot lie in a folder, or would lie among the inputs."""
    check_folder(folder)
    for path in paths:
        if path.is_dir() and folder.exists() and path.samefile(folder):
            raise ConfigError(
                f"{option} {folder} is a folder that is searched for images, and those that are "
                "written would be taken for such the next time. Give a folder elsewhere, or one "
                "inside it."
            )


def find_inputs(paths: Sequence[Path], outputs: Path | None, report: Report) -> list[Found]:
    """Search the folders among the paths, but for one of outputs that lies in them."""
    from perceive_adapter.data.photos import IMAGE_SUFFIXES, images_below
    from perceive_adapter.data.walking import unlisted

    files = []
    for path in paths:
        if not path.is_dir():
            files.append(Found(path, Path(path.name)))
            continue
        for problem in unlisted(path):
            report.complain(f"{problem}, and is skipped. Change who may read it.")
        found = [Found(file, file.relative_to(path)) for file in images_below(path)]
        found = [one for one in found if not one.file.is_dir()]
        if outputs is not None and not _lies_in(path, outputs):
            found = [one for one in found if not _lies_in(one.file, outputs)]
        if others := [
            file for file in _not_searched(path) if outputs is None or not _lies_in(file, outputs)
        ]:
            report.note(
                f"in the folder {shown(path)} {len(others)} images of kinds that are not searched "
                f"for are passed over, such as {shown(others[0])}. Give them one by one."
            )
        if not found:
            report.complain(
                f"skipped the folder {shown(path)}: it holds no image, at any depth. Give a "
                f"folder of files that end in {', '.join(IMAGE_SUFFIXES)}."
            )
        files += found
    return files


def _not_searched(folder: Path) -> list[Path]:
    """Image files that PIL knows, and that are not searched for."""
    from PIL import Image

    from perceive_adapter.data.photos import IMAGE_SUFFIXES
    from perceive_adapter.data.walking import walk

    kinds = Image.registered_extensions()
    others = {end for end, kind in kinds.items() if kind in Image.OPEN} - set(IMAGE_SUFFIXES)
    return [
        parent / name
        for parent, _, names in walk(folder)
        for name in names
        if Path(name).suffix.lower() in others
    ]


def tell_of_frames(file: Path, report: Report) -> None:
    """Note that of an animation or of several pages the first is taken."""
    from PIL import Image

    from perceive_adapter.data.file_headers import UNREADABLE

    with suppress(*UNREADABLE), Image.open(file) as image:
        if (count := getattr(image, "n_frames", 1)) > 1:
            report.note(f"of the {count} frames or pages of {shown(file)} the first is taken.")


def free_names(wanted: Iterable[Path], taken: Iterable[Path]) -> list[Path]:
    """Number the files that are taken or wanted twice: ``a.png``, ``a-2.png``, ``a-3.png``."""
    places = {_place(file) for file in taken}
    counts: Counter[str] = Counter()
    free = []
    for file in wanted:
        while True:
            counts[str(file).lower()] += 1
            count = counts[str(file).lower()]
            named = file.with_name(f"{file.stem}-{count}{file.suffix}") if count > 1 else file
            if _place(named) not in places:
                break
        places.add(_place(named))
        free.append(named)
    return free


def _place(file: Path) -> str:
    """Where a file lies, alike for names that some file systems take for the same."""
    return os.path.realpath(file).lower()


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether it is the folder, or lies in it at any depth."""
    real = path.resolve()
    return folder.exists() and any(
        above.exists() and above.samefile(folder) for above in (real, *real.parents)
    )


def as_rgb(image: Image) -> Tensor:
    """Read an image as RGB (1, 3, H, W) of 8 bits; gray is repeated, alpha is dropped."""
    from perceive_adapter.data.images import read_image

    return read_image(image).color.expand(-1, 3, -1, -1)


def as_seen(pixels: Tensor, perceiver: QualityPerceiver) -> Tensor:
    """Put RGB of 8 bits into the range and onto the device of a perceiver."""
    import torch

    return pixels.to(perceiver.prompts.context.device, torch.float32) / 255


def look(perceiver: QualityPerceiver, pixels: Tensor) -> dict[str, Any]:
    """Return all that is perceived of one image, RGB (1, 3, H, W) of 8 bits, as JSON has it."""
    import torch

    with torch.no_grad():
        perceived = perceiver(as_seen(pixels, perceiver))
    tiers = dict(zip(perceiver.tiers, perceived.tiers[0].tolist(), strict=True))
    names = perceiver.degradations
    return {
        "score": perceived.score[0].item(),
        "tier": max(tiers, key=tiers.__getitem__),
        "tiers": tiers,
        "degradations": dict(zip(names, perceived.degradations[0].tolist(), strict=True)),
        "severity": dict(zip(names, perceived.severity[0].tolist(), strict=True)),
        "embedding": perceived.embedding[0].tolist(),
    }


def row(record: dict[str, Any]) -> str:
    """What :func:`look` has told of an image, as columns of a table."""
    severity = record["severity"]
    present = [name for name, value in record["degradations"].items() if value >= _PRESENT]
    present.sort(key=severity.__getitem__, reverse=True)
    listed = ", ".join(f"{name.replace('_', ' ')} {severity[name]:.2f}" for name in present)
    none = "none" if severity else "not told by this perceiver"
    return f"{record['score']:5.3f}  {record['tier']:8}  {listed or none}"


def column(title: str, paths: Iterable[Path]) -> list[str]:
    """The title and the paths as they will be printed, of one width."""
    cells = [title, *map(shown, paths)]
    width = max(map(len, cells))
    return [cell.ljust(width) for cell in cells]


def shown(path: Path) -> str:
    """The path as it will be printed: on one line, in characters of stdout's encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    text = str(path).encode(encoding, "backslashreplace").decode(encoding)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
