"""Degradations of generators that training never used, and of the world itself."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from perception_bars.generators import FOREIGN
from perception_bars.photographs import REAL_PAIRS, Subject, to_batch, to_planes
from perception_bars.report import Bar, bars_table, table

STRENGTHS = (0.0, 0.5, 1.0)
BAR = 0.85


@dataclass
class Answers:
    """What the perceiver took the images of one source for.

    Args:
        expected: family that is right.
        told: families that were told, in the order of the images.
        worse: for each pair, whether the input scored below its target.
    """

    expected: str
    told: list[str] = field(default_factory=list)
    worse: list[bool] = field(default_factory=list)

    @property
    def right(self) -> float:
        """Share of the images whose type was told."""
        return _share(self.told, self.expected)

    def mistake(self) -> str:
        """The most frequent wrong answer and its share."""
        wrong = Counter(one for one in self.told if one != self.expected).most_common(1)
        return f"{wrong[0][0]} {wrong[0][1] / len(self.told):.2f}" if wrong else "-"


@torch.no_grad()
def report(subject: Subject) -> str:
    """Tell the type of foreign and real degradations; every figure beside its bar."""
    made = {name: _ask_generator(subject, name) for name in FOREIGN}
    real = {folder: _ask_pairs(subject, folder) for folder in subject.pairs}
    sources = {"foreign generators": made, "real pairs": real, "both": made | real}
    bars = [
        Bar(f"type told, mean over {name} ({len(rows)})", _mean(rows.values()), BAR)
        for name, rows in sources.items()
        if rows
    ]
    images = len(subject.clean) + len(subject.bundled)
    parts = [bars_table(bars), f"Foreign generators, {images} images at three strengths:"]
    parts += [_generators_table(made)]
    if real:
        parts += ["Real pairs:", _pairs_table(real)]
    return "\n\n".join(parts)


def _ask_generator(subject: Subject, name: str) -> Answers:
    expected, generate = FOREIGN[name]
    answers = Answers(expected)
    for index, photo in enumerate([*subject.clean, *subject.bundled]):
        pixels = np.ascontiguousarray(photo.permute(1, 2, 0).numpy())
        degraded = [to_planes(generate(pixels, strength, index)) for strength in STRENGTHS]
        answers.told += _types(subject, torch.stack(degraded).float() / 255)
    return answers


def _ask_pairs(subject: Subject, folder: str) -> Answers:
    answers = Answers(REAL_PAIRS[folder])
    for degraded, target in subject.pairs[folder]:
        image, better = to_batch(degraded), to_batch(target)
        answers.told += _types(subject, image)
        scores = [float(subject.perceiver(one).score) for one in (image, better)]
        answers.worse.append(scores[0] < scores[1])
    return answers


def _types(subject: Subject, images: Tensor) -> list[str]:
    columns = subject.perceiver(images).degradations.argmax(dim=1)
    return [subject.perceiver.degradations[column] for column in columns.tolist()]


def _generators_table(made: dict[str, Answers]) -> str:
    count = len(STRENGTHS)
    rows = []
    for name, answers in made.items():
        each = [_share(answers.told[start::count], answers.expected) for start in range(count)]
        shares = [f"{share:.2f}" for share in (answers.right, *each)]
        rows.append((name, answers.expected, *shares, answers.mistake()))
    columns = ("generator", "type", "told", "mild", "medium", "strong", "taken for")
    return table(columns, rows)


def _pairs_table(real: dict[str, Answers]) -> str:
    rows = [
        (
            folder,
            str(len(answers.told)),
            answers.expected,
            f"{answers.right:.2f}",
            answers.mistake(),
            f"{fmean(answers.worse):.2f}",
        )
        for folder, answers in real.items()
    ]
    return table(("pairs", "images", "type", "told", "taken for", "scored below target"), rows)


def _mean(answers: Iterable[Answers]) -> float:
    return fmean(one.right for one in answers)


def _share(told: Sequence[str], expected: str) -> float:
    return fmean(one == expected for one in told)
