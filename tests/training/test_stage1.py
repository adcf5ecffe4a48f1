"""Stage 1 on a tiny CLIP and real photographs."""

import copy
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import folds, perceiver, photos
from torch import Tensor

from perceive_adapter.data import FAMILIES, KIND_OF, KINDS
from perceive_adapter.data.samples import CropSampler, degrade_each, draw_severities
from perceive_adapter.data.triplets import Blend, Milder, Mixed, Restored
from perceive_adapter.errors import CheckpointError, ConfigError
from perceive_adapter.perceiver import QualityPerceiver
from perceive_adapter.training.loop import Schedule, seeded
from perceive_adapter.training.stage1 import (
    PAPER,
    Stage1,
    draw_damaged,
    draw_scenes,
    train_perceiver,
)
from perceive_adapter.training.tiers import tier_shares


def recipe(steps: int, rate: float = 1e-2, side: int = 32) -> Stage1:
    return Stage1(Schedule(steps, rate, warmup=3), scenes=8, sides=(side, 48))


def triplets(tiers: int, count: int = 16) -> tuple[Tensor, Tensor]:
    """Crops that training does not draw, in all tiers: (count * tiers, 3, 64, 64) and (N,)."""
    images, labels = [], []
    for scene in draw_scenes(folds(), 64, Stage1(scenes=count), seeded(99, 0)):
        degraded = scene.degraded()
        for tier in range(tiers):
            remains = 1 - tier / (tiers - 1)
            images.append(scene.clean + remains * (degraded - scene.clean))
            labels.append(tier)
    return torch.cat(images), torch.tensor(labels)


@pytest.mark.parametrize(
    "words",
    [
        ("terrible", "excellent"),
        ("terrible", "mediocre", "excellent"),
        ("terrible", "bad", "good", "excellent"),
    ],
)
def test_learns_to_tell_tiers_on_new_crops(words: tuple[str, ...]) -> None:
    learner = perceiver(tiers=words, words=words)
    images, labels = triplets(len(words))
    before = learner.tier_loss(images, labels).item()
    train_perceiver(learner, folds(), recipe=recipe(80, 3e-2, side=64))
    after = learner.tier_loss(images, labels).item()
    score = learner(images).score
    # The towers are random, and yet better than guessing.
    assert after < 0.99 * math.log(len(words)) < before
    assert score[labels == len(words) - 1].mean() > score[labels == 0].mean() + 0.02
    assert learner.trained


def test_trains_prompts_and_heads_and_nothing_else() -> None:
    learner = perceiver(degradations=FAMILIES)
    before = copy.deepcopy(learner.state_dict())
    state = torch.get_rng_state()
    train_perceiver(learner, folds(), recipe=recipe(3))
    after = learner.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    heads = {name for name in after if name.startswith("heads.")}
    assert changed == {"prompts.context"} | heads
    assert len(heads) == 6
    assert not any(parameter.requires_grad for parameter in learner.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_heads_learn_on_new_crops() -> None:
    learner = perceiver(degradations=FAMILIES)
    generator = seeded(99, 0)
    clean = folds()[0].draw(64, 48, generator)
    samples = degrade_each(clean, draw_severities(64, generator), generator)

    def loss() -> float:
        with torch.no_grad():
            return learner.heads.loss(
                learner.embed(samples.degraded), samples.family_severity
            ).item()

    before = loss()
    train_perceiver(learner, folds(), recipe=recipe(20))
    assert loss() < 0.75 * before


def test_a_frozen_perceiver_is_trained_on_and_the_seed_decides() -> None:
    contexts = []
    for seed in (0, 0, 1):
        learner = perceiver().requires_grad_(False)
        chosen = Stage1(Schedule(2, 1e-2), scenes=8, sides=(32,), seed=seed)
        train_perceiver(learner, folds(), recipe=chosen)
        contexts.append(learner.prompts.context)
    assert torch.equal(contexts[0], contexts[1])
    assert not torch.equal(contexts[0], contexts[2])


def test_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    learner, again = perceiver(), perceiver()
    train_perceiver(learner, folds(), recipe=recipe(2), checkpoint=tmp_path / "stage1.pt")
    train_perceiver(again, folds(), recipe=recipe(2), checkpoint=tmp_path / "stage1.pt")
    assert torch.equal(learner.prompts.context, again.prompts.context)
    assert again.trained


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scenes": 4}, "scenes=8: expected scenes=4"),
        ({"sides": (32,)}, r"sides=\[32, 48\]: expected sides=\[32\]"),
        ({"seed": 1}, "seed=0: expected seed=1"),
        ({"low": 0.7}, "low=0.5: expected low=0.7"),
        ({"graded": 0.1}, "graded=0.0: expected graded=0.1"),
        ({"folds": folds()[::-1]}, "photographs="),
        ({"mediums": [Blend(0.4)]}, r"\['Blend\(remains=0.5\)'\]: .*\['Blend\(remains=0.4\)'\]"),
        ({"mediums": [Mixed([Milder(), Restored([torch.nn.Identity()] * 2)])]}, "Milder.*Restored"),
        ({"learner": perceiver(seed=1)}, "towers=.*prompts=.*: expected towers="),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file, options = tmp_path / "stage1.pt", {"folds": folds(), "mediums": None, "learner": None}
    train_perceiver(perceiver(), folds(), recipe=recipe(1), checkpoint=file)
    options |= {name: changed.pop(name) for name in options.keys() & changed.keys()}
    learner = options.pop("learner") or perceiver()
    with pytest.raises(CheckpointError, match=message):
        train_perceiver(learner, recipe=replace(recipe(1), **changed), checkpoint=file, **options)


def test_scenes_have_equal_quotas_of_both_folds_and_of_every_family() -> None:
    # One fold is dark, the other bright, so that the crops tell where they come from.
    dark, bright = (
        CropSampler([photo.float().mul(0.2).add(offset).byte()])
        for photo, offset in zip(photos()[:2], (0, 200), strict=True)
    )
    for step in range(10):
        chosen = Stage1(scenes=16, low=0.6)
        scenes = draw_scenes((dark, bright), 32, chosen, seeded(0, step))
        assert [scene.fold for scene in scenes] == [0, 1] * 8
        assert all((scene.clean.mean() > 0.4) == bool(scene.fold) for scene in scenes)
        firsts = Counter(KIND_OF[next(iter(scene.severities))] for scene in scenes)
        assert firsts == dict.fromkeys(KINDS, 2)
        assert all(0.6 <= value <= 1 for s in scenes for value in s.severities.values())
        assert len({scene.seed for scene in scenes}) == 16
    assert len(draw_scenes((dark, bright), 32, Stage1(scenes=1), seeded(0, 0))) == 1


def test_mediums_belong_to_the_tiers_between() -> None:
    learner = perceiver()
    for mediums in ([], [Blend(), Milder()]):
        with pytest.raises(ConfigError, match=rf"got {len(mediums)} mediums.*expected 1, one"):
            train_perceiver(learner, folds(), recipe=recipe(1), mediums=mediums)
    two = perceiver(tiers=("low", "high"))
    with pytest.raises(ConfigError, match=r"got 1 mediums.*expected 0"):
        train_perceiver(two, folds(), recipe=recipe(1), mediums=[Blend()])
    assert not learner.trained


def test_other_heads_and_folds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"heads tell \('fog',\), and training makes \('haze'"):
        train_perceiver(perceiver(degradations=("fog",)), folds(), recipe=recipe(1))
    with pytest.raises(ConfigError, match="got 1 folds"):
        train_perceiver(perceiver(), folds()[:1], recipe=recipe(1))


def test_defaults_are_the_papers() -> None:
    assert Stage1() == PAPER
    assert PAPER.schedule == Schedule(100_000, 4e-5, 1e-6)
    assert PAPER.sides == (224,)


def test_graded_images_teach_what_lies_between_the_tiers() -> None:
    tiny = QualityPerceiver.from_pretrained("perceive-tiny")
    images, severity = draw_damaged(folds(), 48, 64, seeded(99, 0))
    shares = tier_shares(severity.amax(dim=1), 3)
    wrong = []
    for graded in (0.0, 1.0):
        prompts = copy.deepcopy(tiny.prompts)
        prompts.context.data.copy_(prompts.initial)
        learner = QualityPerceiver(tiny.towers, prompts, replace(tiny.config, degradations=()))
        train_perceiver(learner, folds(), recipe=replace(recipe(60, side=64), graded=graded))
        logits = learner.tier_logits(learner.embed(images))
        wrong.append(float(torch.nn.functional.cross_entropy(logits, shares)))
    assert wrong[1] < 0.95 * wrong[0]


@pytest.mark.parametrize("tiers", [2, 3, 5])
def test_tier_shares_fall_evenly_from_the_highest_to_the_lowest(tiers: int) -> None:
    severity = torch.linspace(0, 1, 101)
    shares = tier_shares(severity, tiers)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(101))
    assert shares.min() >= 0
    assert shares[0].tolist() == [0.0] * (tiers - 1) + [1.0]
    assert torch.equal(shares[61:], torch.eye(tiers)[0].expand(40, -1))
    score = shares @ torch.linspace(0, 1, tiers)
    torch.testing.assert_close(score, (1 - severity / 0.6).clamp(min=0))


@pytest.mark.parametrize(
    "numbers", [{"graded": -1}, {"scenes": 0}, {"sides": ()}, {"sides": (0,)}, {"low": 0.0}]
)
def test_recipes_that_cannot_work(numbers: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(numbers))}="):
        Stage1(**numbers)
