import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perceive_adapter.errors import ConfigError, LossInputError
from perceive_adapter.losses import (
    ClipAwareLoss,
    DegradationContrastiveLoss,
    DifficultyAdaptiveLoss,
    ObjectiveWeights,
    RestorationObjective,
)


class Perceiver(nn.Module):
    def forward(self, images):
        high = images.mean((1, 2, 3))
        return SimpleNamespace(tiers=torch.stack([1 - high, high], 1))


class Forbidden(nn.Module):
    def forward(self, *inputs):
        raise AssertionError("this term must not be computed")


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)
    restored, target, degraded, medium = torch.rand(4, 2, 3, 8, 8, generator=generator)
    anchor, positive = torch.randn(2, 2, 4, generator=generator)
    return {
        "restored": restored.requires_grad_(),
        "target": target,
        "degraded": degraded,
        "medium": [medium],
        "valid": torch.tensor([[True], [False]]),
        "anchor": anchor.requires_grad_(),
        "positive": positive,
        "labels": torch.tensor([0, 1]),
    }


def test_total_is_the_weighted_sum_of_the_papers_four_terms(given):
    clip_aware = ClipAwareLoss(Perceiver())
    terms = RestorationObjective(clip_aware=clip_aware)(**given)
    images = (given["restored"], given["target"], given["degraded"])
    expected = {
        "l1": F.l1_loss(*images[:2]),
        "contrastive": DegradationContrastiveLoss()(
            given["anchor"], given["positive"], given["labels"]
        ),
        "clip_aware": clip_aware(given["restored"]),
        "difficulty_adaptive": DifficultyAdaptiveLoss()(*images, given["medium"], given["valid"]),
    }
    weights = (1.0, 0.1, 0.05, 0.1)
    total = sum(w * value for w, value in zip(weights, expected.values(), strict=True))
    torch.testing.assert_close(terms.total, total)
    logged = terms.as_dict()
    assert list(logged) == ["total", *expected]
    for name, value in expected.items():
        torch.testing.assert_close(logged[name], value.detach())
        assert not getattr(terms, name).requires_grad
    assert not logged["total"].requires_grad
    leaves = [given["restored"], given["anchor"]]
    gradients = [torch.autograd.grad(value, leaves) for value in (terms.total, total)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kept", ["l1", "contrastive", "clip_aware", "difficulty_adaptive"])
def test_terms_of_weight_zero_are_not_computed(given, kept):
    names = [field.name for field in dataclasses.fields(ObjectiveWeights)]
    weights = ObjectiveWeights(**{name: 2.0 * (name == kept) for name in names})
    real = {
        "contrastive": DegradationContrastiveLoss(),
        "clip_aware": ClipAwareLoss(Perceiver()),
        "difficulty_adaptive": DifficultyAdaptiveLoss(),
    }
    objective = RestorationObjective(
        weights, **{name: loss if name == kept else Forbidden() for name, loss in real.items()}
    )
    terms = objective(**given)
    assert list(terms.as_dict()) == ["total", kept]
    torch.testing.assert_close(terms.total.detach(), 2 * getattr(terms, kept))
    assert all(getattr(objective, name) is None for name in real if name != kept)


def test_terms_without_inputs_are_not_computed(given):
    objective = RestorationObjective(contrastive=Forbidden(), difficulty_adaptive=Forbidden())
    terms = objective(given["restored"], given["target"])
    assert list(terms.as_dict()) == ["total", "l1"]
    assert terms.contrastive is terms.clip_aware is terms.difficulty_adaptive is None
    assert torch.equal(terms.total, F.l1_loss(given["restored"], given["target"]))


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        (["labels"], "anchor, positive given without labels"),
        (["anchor", "positive"], "labels given without anchor, positive"),
        (["degraded"], "medium images were given without the degraded image"),
    ],
)
def test_half_of_the_inputs(given, absent, message):
    for name in absent:
        given[name] = None
    with pytest.raises(LossInputError, match=message):
        RestorationObjective()(**given)


def test_l1_checks_its_images(given):
    given["target"] = given["target"][..., :4]
    with pytest.raises(LossInputError, match=r"target has shape \(2, 3, 8, 4\)"):
        RestorationObjective()(**given)


def test_nothing_left_to_compute(given):
    objective = RestorationObjective(ObjectiveWeights(l1=0.0))
    with pytest.raises(LossInputError, match="no term"):
        objective(given["restored"], given["target"])


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_weights_that_cannot_work(value):
    with pytest.raises(ConfigError, match="clip_aware"):
        ObjectiveWeights(clip_aware=value)


def test_all_weights_zero():
    with pytest.raises(ConfigError, match="at least one"):
        ObjectiveWeights(l1=0, contrastive=0, clip_aware=0, difficulty_adaptive=0)


def test_weights_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ObjectiveWeights().l1 = 2.0


def test_state_is_the_reference_psnr_alone(given):
    objective = RestorationObjective(clip_aware=ClipAwareLoss(nn.Conv2d(3, 2, 1)))
    objective.difficulty_adaptive.update_difficulty(27.0)
    assert list(objective.parameters()) == []
    state = objective.state_dict()
    assert {name: value.item() for name, value in state.items()} == {
        "difficulty_adaptive.reference_psnr": 27.0
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images(given, dtype):
    for name in ("restored", "target", "degraded"):
        given[name] = given[name].detach().to(dtype)
    given["restored"].requires_grad_()
    given["medium"] = [image.to(dtype) for image in given["medium"]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = RestorationObjective(clip_aware=ClipAwareLoss(Perceiver()))(**given)
    terms.total.backward()
    assert terms.total.dtype == torch.float32
    assert given["restored"].grad.isfinite().all()
