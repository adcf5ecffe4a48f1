"""Reports of an evaluation: tables as Markdown and CSV, a stamp, and pictures."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from io import BytesIO, StringIO
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from perceive_adapter._version import __version__
from perceive_adapter.data import DEGRADATIONS
from perceive_adapter.evaluation.measure import Measured
from perceive_adapter.folders import replace_file, table_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "GRID_ROWS",
    "draw_bars",
    "draw_grid",
    "group_means",
    "new_figure",
    "save_figure",
    "stamp",
    "table",
    "thumbnail",
    "write_csv",
]

GRID_ROWS: Final = 20  # of the picture before and after
_THUMBNAIL = 640  # pixels, more than a cell of it has


def table(measured: Sequence[Measured]) -> str:
    """Return a Markdown table: a row for each group and one for their mean, PSNR / SSIM.

    Example:
        >>> rows = [Measured("rain", "1.png", name, psnr, 0.9) for name, psnr in
        ...         [("degraded", 20.0), ("backbone", 22.0), ("wrapped", 25.0)]]
        >>> print(table(rows))
        | PSNR in dB / SSIM | images | degraded | backbone | wrapped |
        |---|---|---|---|---|
        | rain | 1 | 20.00 / 0.900 | 22.00 / 0.900 | 25.00 / 0.900 |
        | mean of the groups | 1 | 20.00 / 0.900 | 22.00 / 0.900 | 25.00 / 0.900 |
    """
    means = group_means(measured)
    networks = list(dict.fromkeys(row.network for row in measured))
    lines = ["| PSNR in dB / SSIM | images | " + " | ".join(networks) + " |"]
    lines.append("|---" * (2 + len(networks)) + "|")
    counts = Counter(row.group for row in measured if row.network == networks[0])
    for group, found in means.items():
        cells = [f"{found[name][0]:.2f} / {found[name][1]:.3f}" for name in networks]
        lines.append(
            f"| {table_cell(_readable(group))} | {counts[group]} | " + " | ".join(cells) + " |"
        )
    cells = []
    for name in networks:
        psnr, ssim = (mean(found[name][column] for found in means.values()) for column in (0, 1))
        cells.append(f"{psnr:.2f} / {ssim:.3f}")
    lines.append(f"| mean of the groups | {counts.total()} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_csv(measured: Sequence[Measured], file: Path) -> None:
    """Write a row for every image and network."""
    stream = StringIO(newline="")
    writer = csv.DictWriter(stream, [field.name for field in fields(Measured)])
    writer.writeheader()
    writer.writerows(asdict(row) for row in measured)
    replace_file(file, stream.getvalue().encode(errors="backslashreplace"))


def stamp(protocol: str, device: torch.device | str) -> dict[str, str]:
    """Say what an evaluation was made with, for its reports."""
    where = torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else platform.processor()
    return {
        "protocol": protocol,
        "date": datetime.date.today().isoformat(),
        "device": f"{where.type} {name}".strip(),
        "versions": f"perceive_adapter {__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "commit": _commit(),
    }


def draw_bars(measured: Sequence[Measured], file: Path) -> None:
    """Draw the mean PSNR of every group and network as a PNG."""
    figure = new_figure(8, 4)
    axes = figure.subplots()
    means = group_means(measured)
    networks = list(dict.fromkeys(row.network for row in measured))
    width = 0.8 / len(networks)
    for index, name in enumerate(networks):
        places = [place + index * width for place in range(len(means))]
        axes.bar(places, [found[name][0] for found in means.values()], width, label=name)
    middle = 0.4 - width / 2
    labels = [_label(group) for group in means]
    axes.set_xticks(
        [place + middle for place in range(len(means))], labels, rotation=30, ha="right"
    )
    axes.set_ylabel("PSNR in dB")
    axes.legend()
    save_figure(figure, file)


def draw_grid(images: Mapping[str, Mapping[str, Tensor]], file: Path) -> None:
    """Draw before and after as a PNG: a row of images (3, H, W) for each name, 20 at most."""
    images = dict(islice(images.items(), GRID_ROWS))
    columns = list(next(iter(images.values())))
    figure = new_figure(3 * len(columns), 2.4 * len(images))
    grid = figure.subplots(len(images), len(columns), squeeze=False)
    for axes, (row, shown) in zip(grid, images.items(), strict=True):
        for cell, name in zip(axes, columns, strict=True):
            cell.imshow(shown[name].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            cell.set_title(name, fontsize=8)
        axes[0].set_ylabel(_label(row), fontsize=8)
    save_figure(figure, file, dpi=150)


def thumbnail(image: Tensor) -> Tensor:
    """Shrink an image (3, H, W) in [0, 1] to a cell of :func:`draw_grid`, on the CPU."""
    scale = _THUMBNAIL / max(image.shape[-2:])
    if scale >= 1:
        return image.cpu()
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    return F.interpolate(image[None], size, mode="area")[0].cpu()


def save_figure(figure: Figure, file: Path, **options: Any) -> None:
    """Write a figure in the format that the file's suffix names; it is whole or as it was."""
    data = BytesIO()
    figure.savefig(data, format=file.suffix[1:].lower() or "png", **options)
    replace_file(file, data.getvalue())


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, of a size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws to files, whatever backend the user has chosen
    return figure


def group_means(measured: Sequence[Measured]) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean PSNR and SSIM of each group and network."""
    found: dict[str, dict[str, list[Measured]]] = {}
    for row in measured:
        found.setdefault(row.group, {}).setdefault(row.network, []).append(row)
    return {
        group: {
            name: (mean(row.psnr for row in rows), mean(row.ssim for row in rows))
            for name, rows in networks.items()
        }
        for group, networks in found.items()
    }


def _readable(group: str) -> str:
    """A group's name as it is read: degradations in words, a user's folder as it is called."""
    if set(group.split("+")) <= set(DEGRADATIONS):
        return group.replace("_", " ").replace("+", " + ")
    return group.encode(errors="backslashreplace").decode()  # fonts know no other names


def _label(group: str) -> str:
    return _readable(group).replace("$", r"\$")  # or matplotlib takes it for mathematics


def _commit() -> str:
    """The commit of the folder that the command runs in, for whoever keeps results in git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"
