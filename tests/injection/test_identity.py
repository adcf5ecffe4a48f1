"""Step 0: a wrapped network gives what the bare one gives, bit for bit."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from wrapping import KINDS, PAIRS, relative, wrapped
from zoo import CASES, Case

from perceive_adapter import AdapterConfig, wrap

# torch takes other code for attention, and for matrix products of strided tensors, where nothing
# requires a gradient: freezing alone changes the rounding of these networks.
ROUNDED_BY_FREEZING = {"sequence_first", "attention", "transformer"}


def bare(case: str) -> nn.Module:
    net = CASES[case].net()
    return net.requires_grad_(False) if case in ROUNDED_BY_FREEZING else net


@pytest.mark.parametrize(("case", "kind"), PAIRS)
def test_wrapping_changes_no_bit(case: str, kind: str) -> None:
    zoo = CASES[case]
    net, image = bare(case), zoo.images(2)
    with torch.no_grad():
        expected = zoo.run(net, image)
        first = zoo.run(net, image[:1])
    with_grad = zoo.run(net, image).detach()
    model = wrapped(zoo, trained=False, config=KINDS[kind])
    with torch.no_grad():
        assert torch.equal(zoo.run(model, image), expected)
        assert torch.equal(zoo.run(model, image[:1]), first)
        with model.fold(model.perceive(image[:1])):
            assert torch.equal(zoo.run(model, image[:1]), first)
    exact = case not in ("attention", "transformer")
    assert relative(zoo.run(model, image).detach(), with_grad) <= (0 if exact else 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["u_shape", "isotropic", "mixed", "nafnet"])
def test_the_same_in_channels_last(case: str, kind: str) -> None:
    net = CASES[case].net().to(memory_format=torch.channels_last)
    image = CASES[case].images(2).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = net(image)
        actual = wrap(net, config=KINDS[kind])(image)
    assert torch.equal(actual, expected)
    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_same_in_other_precisions(dtype: torch.dtype, kind: str) -> None:
    net, image = CASES["u_shape"].net().to(dtype), CASES["u_shape"].images(2).to(dtype)
    expected = net(image)
    model = wrap(net, config=KINDS[kind])
    assert torch.equal(model(image), expected)
    with torch.no_grad(), model.fold(model.perceive(image[:1])):
        assert torch.equal(model(image), net(image))


@pytest.mark.parametrize("case", ["u_shape", "mixed"])
def test_the_same_in_training_mode(case: str) -> None:
    """Dropout drops the same; batch norms stay in eval mode, which frozen statistics are."""
    net = CASES[case].net().train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model = wrap(copy.deepcopy(net))
    image = CASES[case].images(2)

    def drawn(network: nn.Module) -> Tensor:
        torch.manual_seed(1)
        return network(image)

    assert model.training
    assert torch.equal(drawn(model), drawn(net))


def test_an_image_that_fits_folding_by_itself() -> None:
    """128 px and no gradient: the forward pass folds, and is the same still."""
    net, image = CASES["u_shape"].net(), CASES["u_shape"].images(1, size=128)
    with torch.no_grad():
        assert torch.equal(wrap(copy.deepcopy(net))(image), net(image))


@pytest.mark.parametrize(
    ("value_range", "low", "high"),
    [((-1, 1), -1.0, 1.0), ((0, 255), 0.0, 255.0), (([0.5, 0.4, 0.3], [0.2, 0.2, 0.2]), -2, 3)],
)
def test_the_backbone_sees_its_own_range(value_range: Any, low: float, high: float) -> None:
    net = CASES["isotropic"].net()
    image = CASES["isotropic"].images() * (high - low) + low
    assert torch.equal(wrap(copy.deepcopy(net), value_range=value_range)(image), net(image))


class Modes(nn.Module):
    """A network of which its owner put one part into eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.drop, self.tail = nn.Dropout(0.5), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.tail(self.drop(self.head(image)))


def test_parts_in_eval_mode_stay_in_eval_mode() -> None:
    net = Modes().train()
    net.drop.eval()
    image = torch.rand(1, 3, 16, 16)
    expected = net(image)
    assert torch.equal(wrap(net)(image), expected)


def test_arguments_and_outputs_keep_their_form() -> None:
    keyword = wrapped("keyword", trained=False)
    with pytest.raises(TypeError):
        keyword.backbone(torch.rand(1, 3, 32, 32))
    for case, kind in (("tuple", tuple), ("list", list), ("dict", dict)):
        assert type(wrapped(case)(CASES[case].images())) is kind
    noise: Case = CASES["noise_level"]
    image, level = noise.images(2), torch.zeros(2, 1, 32, 32)
    step = torch.zeros(2)
    model = wrapped(noise, config=AdapterConfig(rank=2))
    assert torch.equal(model(step, image, sigma=level), model(step, image=image, sigma=level))
