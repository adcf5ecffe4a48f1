"""The demo's table and its grid of images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from finetune import NAMES
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from perceive_adapter import QualityPerceiver
from perceive_adapter.data import FAMILY_OF, degrade

SEVERITIES = (0.3, 0.6)


@dataclass(frozen=True)
class Case:
    """One damaged photograph, (1, 3, H, W) in [0, 1]."""

    degradation: str
    degraded: Tensor
    target: Tensor


def damage(photos: Sequence[Tensor]) -> list[Case]:
    """Every photograph with every degradation at every severity, the same at every call."""
    cases = []
    for name in NAMES:
        for seed, photo in enumerate(photos):
            for severity in SEVERITIES:
                generator = torch.Generator().manual_seed(seed)
                degraded = degrade(photo[None], name, severity, generator)
                cases.append(Case(name, degraded, photo[None]))
    return cases


@torch.no_grad()
def count_told(perceiver: QualityPerceiver, cases: Sequence[Case]) -> str:
    """How often the perceiver puts the right degradation first."""
    told = []
    for name in NAMES:
        column = perceiver.degradations.index(FAMILY_OF[name])
        seen = [perceiver(c.degraded).degradations[0] for c in cases if c.degradation == name]
        right = sum(int(presence.argmax()) == column for presence in seen)
        told.append(f"{right} of {len(seen)} with {name.replace('_', ' ')}")
    return ", ".join(told)


@torch.no_grad()
def restore_all(network: Callable[[Tensor], Tensor], cases: Sequence[Case]) -> list[Tensor]:
    return [network(case.degraded).clamp(0, 1) for case in cases]


def psnr(image: Tensor, target: Tensor) -> float:
    return peak_signal_noise_ratio(image, target, data_range=1.0).item()


def ssim(image: Tensor, target: Tensor) -> float:
    return structural_similarity_index_measure(image, target, data_range=1.0).item()


def print_table(cases: Sequence[Case], before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    """PSNR and SSIM of every degradation: the input, the bare backbone, the wrapped one."""
    scores = torch.tensor(
        [
            [
                metric(image, case.target)
                for metric in (psnr, ssim)
                for image in (case.degraded, denoised, restored)
            ]
            for case, denoised, restored in zip(cases, before, after, strict=True)
        ]
    )
    columns = f"{'input':>8}{'backbone':>10}{'wrapped':>9}{'gain':>8}"
    print(f"{'':16}{'PSNR (dB)':^{len(columns)}}   {'SSIM':^{len(columns)}}")
    print(f"{'':16}{columns}   {columns}")
    for name in (*NAMES, "mean"):
        chosen = torch.tensor([name in (case.degradation, "mean") for case in cases])
        cells = scores[chosen].mean(0).tolist()
        print(f"{name.replace('_', ' '):16}{_cells(cells[:3], 2)}   {_cells(cells[3:], 3)}")


def _cells(scores: Sequence[float], digits: int) -> str:
    given, backbone, wrapped = scores
    gain = wrapped - backbone
    return f"{given:8.{digits}f}{backbone:10.{digits}f}{wrapped:9.{digits}f}{gain:+8.{digits}f}"


def draw_grid(
    cases: Sequence[Case], before: Sequence[Tensor], after: Sequence[Tensor], path: Path
) -> Path:
    """One row for each degradation, each of another photograph, at the higher severity."""
    titles = ("degraded", "backbone alone", "wrapped", "target")
    figure = Figure(figsize=(12, 2.6 * len(NAMES)), layout="constrained")
    grid = figure.subplots(len(NAMES), len(titles))
    for row, (name, axes) in enumerate(zip(NAMES, grid, strict=True)):
        of_this = [index for index, case in enumerate(cases) if case.degradation == name]
        photo = len(SEVERITIES) * row % len(of_this)
        index = of_this[photo + len(SEVERITIES) - 1]
        case = cases[index]
        images = (case.degraded, before[index], after[index], case.target)
        for axis, title, image in zip(axes, titles, images, strict=True):
            axis.imshow(image[0].permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
            axis.set_title(title if row == 0 else "")
            if image is not case.target:
                axis.set_xlabel(f"{psnr(image, case.target):.1f} dB")
        axes[0].set_ylabel(name.replace("_", " "))
    figure.savefig(path, dpi=100)
    return path
