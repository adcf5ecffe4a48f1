"""Captions say what is wrong, in words that the text tower knows."""

import re

import pytest
import torch
from torch import Tensor

from perceive_adapter.data import KINDS
from perceive_adapter.data.samples import degrade_each, draw_severities
from perceive_adapter.perceiver.prompts import DEFAULT_WORDS
from perceive_adapter.perceiver.vocabulary import WordTokenizer
from perceive_adapter.training.captions import (
    WORDS,
    grades,
    qualities,
    write_captions,
    write_quality_captions,
)

GRADES = ("", "slight", "moderate", "severe")
WAYS = {
    "haze": ("haze", "fog"),
    "rain": ("rain",),
    "low_light": ("darkness", "low light", "underexposure"),
    "blur": ("blur",),
    "motion_blur": ("motion blur",),
    "downsampling": ("pixelation", "low resolution"),
    "noise": ("noise", "grain"),
    "jpeg": ("jpeg artifacts", "compression"),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def severity() -> Tensor:
    """(400, D), as training draws it."""
    clean = torch.full((400, 3, 8, 8), 0.5)
    return degrade_each(clean, draw_severities(400, seeded()), seeded()).severity


def test_every_caption_is_tokenized_within_a_perceivers_prompt(severity: Tensor) -> None:
    tokenize = WordTokenizer(WORDS, 18)  # start, 16 vectors, end
    for seed in range(5):
        captions = write_captions(severity, seeded(seed))
        assert len(captions) == len(severity)
        tokens = tokenize(captions + write_quality_captions(seeded(seed)))
        assert tokens.max() == tokenize.end < tokenize.size
    assert (tokenize(captions) > 0).sum(1).max() >= 14  # some are long


def test_vocabulary_has_the_words_of_the_tiers_and_no_more_than_once() -> None:
    assert len(set(WORDS)) == len(WORDS)
    assert set(DEFAULT_WORDS.values()) <= set(WORDS)
    assert {"high", "low", "medium", "quality"} <= set(WORDS)
    assert all(re.fullmatch("[a-z]+", word) for word in WORDS)


def test_captions_name_what_is_there_and_nothing_else(severity: Tensor) -> None:
    for caption, row in zip(write_captions(severity, seeded()), grades(severity), strict=True):
        named = {
            family: grade
            for family, ways in WAYS.items()
            for grade in GRADES[1:]
            if any(f"{grade} {way}" in caption for way in ways)
        }
        present = {KINDS[i]: GRADES[grade] for i, grade in enumerate(row.tolist()) if grade}
        assert named == present
        assert len(re.findall("slight|moderate|severe", caption)) == len(present)


def test_same_generator_same_captions_and_many_different_ones(severity: Tensor) -> None:
    first = write_captions(severity, seeded(1))
    assert first == write_captions(severity, seeded(1))
    assert first != write_captions(severity, seeded(2))
    assert len(set(first)) > 200


def test_grades() -> None:
    values = torch.tensor([[0.0, 0.01, 0.29, 0.3, 0.5, 0.64, 0.65, 1.0]])
    assert grades(values).tolist() == [[0, 1, 1, 2, 2, 2, 3, 3]]


def test_qualities_are_told_by_the_worst() -> None:
    values = torch.tensor([[0.0, 0.0], [0.0, 0.01], [0.3, 0.41], [0.42, 0.0], [0.1, 1.0]])
    assert qualities(values).tolist() == [2, 1, 1, 0, 0]


def test_captions_of_quality_rise_from_bad_to_good() -> None:
    bad, mediocre, good = ("terrible", "bad"), ("mediocre",), ("clean", "good", "excellent")
    for seed in range(40):
        low, medium, high = write_quality_captions(seeded(seed))
        assert low.split()[1] in bad
        assert medium.split()[1] in mediocre
        assert high.split()[1] in (*good, "perfect", "sharp", "pristine")
    clean = write_captions(torch.zeros(30, len(KINDS)), seeded())
    assert all(caption.split()[1] not in bad + mediocre for caption in clean)
    assert all(len(caption.split()) == 3 for caption in clean)
