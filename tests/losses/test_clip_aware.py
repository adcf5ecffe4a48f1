from types import SimpleNamespace

import pytest
import torch
from torch import nn

from perceive_adapter.errors import ConfigError, LossInputError
from perceive_adapter.losses import ClipAwareLoss


class Perceiver(nn.Module):
    """Three tiers from a linear map of the mean colour; dropout shows train mode."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.map = nn.Linear(3, 3)
        self.dropout = nn.Dropout(0.5)
        self.scale = scale

    def forward(self, images):
        logits = self.scale * self.map(self.dropout(images.mean((2, 3))))
        return SimpleNamespace(tiers=logits.softmax(1))


class Fixed(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, images):
        return self.make(images)


def test_value_is_one_minus_the_last_column():
    tiers = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.4, 0.5]])
    loss = ClipAwareLoss(Fixed(lambda x: SimpleNamespace(tiers=tiers)))
    assert loss(torch.rand(2, 3, 4, 4)).item() == pytest.approx(((1 - 0.1) + (1 - 0.5)) / 2)


def test_gradient_reaches_the_image_only():
    perceiver = Perceiver()
    loss = ClipAwareLoss(perceiver)
    image = torch.rand(2, 3, 4, 4, requires_grad=True)
    loss(image).backward()
    assert image.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in perceiver.parameters())


def test_gradcheck():
    loss = ClipAwareLoss(Perceiver()).double()
    image = torch.rand(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, image)


def test_descent_makes_the_image_good():
    """A sharp perceiver spans the whole range: bad images near 1, good ones near 0."""
    torch.manual_seed(0)
    loss = ClipAwareLoss(Perceiver(scale=100.0))
    image = torch.rand(1, 3, 2, 2)
    if loss(image) < 0.5:  # start where the perceiver says bad
        loss.perceiver.module.map.weight.neg_()
        loss.perceiver.module.map.bias.neg_()
    image.requires_grad_()
    start = loss(image).item()
    for _ in range(200):
        (gradient,) = torch.autograd.grad(loss(image), image)
        image = (image - 0.02 * gradient.sign()).detach().requires_grad_()
    end = loss(image).item()
    assert 0 <= end < 0.05
    assert 0.5 <= start <= 1


def test_perceiver_is_frozen_unregistered_and_in_eval_mode():
    perceiver = Perceiver()
    loss = ClipAwareLoss(perceiver).train().requires_grad_(True)
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}
    assert not any(weight.requires_grad for weight in perceiver.parameters())
    perceiver.train()
    image = torch.rand(4, 3, 4, 4)
    assert torch.equal(loss(image), loss(image))  # dropout is off
    assert not perceiver.dropout.training


def test_perceiver_follows_the_loss():
    perceiver = Perceiver()
    nn.ModuleList([ClipAwareLoss(perceiver)]).double()
    assert perceiver.map.weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images(dtype):
    image = torch.rand(2, 3, 4, 4).to(dtype).requires_grad_()
    loss = ClipAwareLoss(Perceiver())
    value = loss(image)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(image.float()))
    assert image.grad.isfinite().all()


def test_autocast_leaves_the_perceiver_in_its_precision():
    image, loss = torch.rand(2, 3, 4, 4), ClipAwareLoss(Perceiver())
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(image)
    assert torch.equal(value, loss(image))


def test_half_precision_perceiver_and_gray_images():
    image = torch.rand(2, 1, 4, 4)
    full = ClipAwareLoss(perceiver := Perceiver())(image)
    half = ClipAwareLoss(perceiver.to(torch.bfloat16))(image)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), abs=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x, "Fixed returned no tensor named tiers"),
        (lambda x: SimpleNamespace(tiers=[0.5]), "no tensor named tiers"),
        (lambda x: SimpleNamespace(tiers=x.mean((1, 2, 3))), r"shape \(2, K\).*got \(2,\)"),
        (lambda x: SimpleNamespace(tiers=x[:, :1, 0, 0]), r"shape \(2, K\).*got \(2, 1\)"),
        (lambda x: SimpleNamespace(tiers=x[:1, :, 0, 0]), r"shape \(2, K\).*got \(1, 3\)"),
        (lambda x: SimpleNamespace(tiers=x[:, :, 0, 0].detach()), "stops the gradient"),
    ],
)
def test_perceivers_that_do_not_fit(make, message):
    image = torch.rand(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(LossInputError, match=message):
        ClipAwareLoss(Fixed(make))(image)


def test_evaluation_needs_no_gradient():
    loss = ClipAwareLoss(Perceiver())
    with torch.no_grad():
        assert 0 <= loss(torch.rand(2, 3, 4, 4, requires_grad=True)).item() <= 1


def test_bad_arguments():
    with pytest.raises(ConfigError, match=r"nn\.Module such as QualityPerceiver"):
        ClipAwareLoss("perceive-tiny")
    with pytest.raises(LossInputError, match=r"restored must have shape.*\(2, 2, 4, 4\)"):
        ClipAwareLoss(Perceiver())(torch.rand(2, 2, 4, 4))
