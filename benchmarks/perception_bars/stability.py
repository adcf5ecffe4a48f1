"""How far a score moves where the quality did not: flips, crops, lossless files, noise."""

import io
from statistics import fmean

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from perceive_adapter.data import DEGRADATIONS, degrade
from perceive_adapter.data.samples import as_file
from perception_bars.photographs import Subject, spread, to_batch, to_planes
from perception_bars.report import Bar, bars_table, table

PHOTOS = 22  # twice over all degradations
SEVERITIES = (0.15, 0.3, 0.45, 0.8)  # the first and third lie between two tiers
CROPS = 4
BAR = 0.05
NOISE_BAR = 0.2
NOISE_SIZES = ((32, 32), (64, 64), (100, 333), (224, 224), (256, 256), (512, 512), (1024, 768))
NOISE_SEEDS = 4


@torch.no_grad()
def noise_report(subject: Subject) -> str:
    """Score images whose values are all drawn evenly from [0, 1]."""
    scores = {
        size: [_noise_score(subject, size, seed) for seed in range(NOISE_SEEDS)]
        for size in NOISE_SIZES
    }
    highest = max(max(values) for values in scores.values())
    rows = [
        (f"{height} x {width}", f"{fmean(values):.3f}", f"{max(values):.3f}")
        for (height, width), values in scores.items()
    ]
    return "\n\n".join(
        [
            bars_table([Bar("highest score of uniform noise", highest, NOISE_BAR, below=True)]),
            table(("size", "mean score", "highest score"), rows),
        ]
    )


@torch.no_grad()
def report(subject: Subject) -> str:
    """Largest and mean change of the score, and whether equal pixels give equal bits."""
    groups = _images(subject)
    changes: dict[str, dict[str, list[float]]] = {}
    same: list[bool] = []
    files: list[bool] = []
    for group, images in groups.items():
        for index, image in enumerate(images):
            score = subject.perceiver(image).score
            same.append(_same_bits(subject, image, image))
            files.append(_same_bits(subject, image, _through_png(image)))
            for change, others in _variants(image, index).items():
                moved = [float((subject.perceiver(one).score - score).abs()) for one in others]
                changes.setdefault(change, {}).setdefault(group, []).extend(moved)
    bars = [
        Bar(f"largest change by {change}", max(map(max, by_group.values())), BAR, below=True)
        for change, by_group in changes.items()
    ]
    bars.append(Bar("share of images with equal bits when perceived twice", fmean(same), 1))
    bars.append(Bar("share of images with equal bits out of a PNG file", fmean(files), 1))
    rows = [
        (
            change,
            f"{group} ({len(groups[group])})",
            f"{max(moved):.3f}",
            f"{fmean(moved):.3f}",
            f"{fmean(one < BAR for one in moved):.0%}",
        )
        for change, by_group in changes.items()
        for group, moved in by_group.items()
    ]
    columns = ("change", "images", "largest", "mean", f"below {BAR}")
    return f"{bars_table(bars)}\n\n{table(columns, rows)}"


def _noise_score(subject: Subject, size: tuple[int, int], seed: int) -> float:
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed))
    return float(subject.perceiver(image).score)


def _images(subject: Subject) -> dict[str, list[Tensor]]:
    """Clean photographs, each also degraded in one way, in each of the severities."""
    clean = [to_batch(p) for p in spread([*subject.clean, *subject.bundled], PHOTOS)]
    groups = {"clean": clean}
    names = list(DEGRADATIONS)
    for severity in SEVERITIES:
        groups[f"severity {severity}"] = [
            as_file(
                degrade(image, names[i % len(names)], severity, torch.Generator().manual_seed(i))
            )
            for i, image in enumerate(clean)
        ]
    return groups


def _variants(image: Tensor, seed: int) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a flip left to right": [image.flip(3)],
        "a flip upside down": [image.flip(2)],
        "a crop of half the area": [_half(image, generator) for _ in range(CROPS)],
    }


def _half(image: Tensor, generator: torch.Generator) -> Tensor:
    """Cut out half the area, of the same aspect ratio, at a random place."""
    height, width = (round(side * 0.5**0.5) for side in image.shape[-2:])
    top = int(torch.randint(image.shape[-2] - height + 1, (), generator=generator))
    left = int(torch.randint(image.shape[-1] - width + 1, (), generator=generator))
    return image[..., top : top + height, left : left + width]


def _through_png(image: Tensor) -> Tensor:
    pixels = image[0].mul(255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return to_batch(to_planes(np.array(Image.open(file))))


def _same_bits(subject: Subject, image: Tensor, other: Tensor) -> bool:
    first, second = vars(subject.perceiver(image)), vars(subject.perceiver(other))
    return all(torch.equal(first[name], second[name]) for name in first)
