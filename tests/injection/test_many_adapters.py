"""Several adapters on one backbone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from wrapping import injector_like, relative, state, wrapped
from zoo import CASES

from perceive_adapter import (
    AdapterConfig,
    ConfigError,
    PerceiveModel,
    PerceptionError,
    PromptInjector,
    SiteError,
    plan_sites,
    wrap,
)

IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> PerceiveModel:
    model = wrapped("u_shape")
    model.add_adapter("rain", injector_like(model, seed=5))
    return model


def test_an_added_adapter_waits(model: PerceiveModel) -> None:
    assert model.status().adapters == ("default", "rain")
    assert model.status().active == "default"
    assert torch.equal(model(IMAGE), wrapped("u_shape")(IMAGE))
    assert not any(p.requires_grad for p in model.adapters["rain"].parameters())


def test_setting_an_adapter_switches_output_and_training(model: PerceiveModel) -> None:
    first = model(IMAGE)
    model.set_adapter("rain")
    second = model(IMAGE)
    assert relative(second, first) > 1e-3
    assert {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad} == {"rain"}
    model.set_adapter("default")
    assert torch.equal(model(IMAGE), first)
    assert model.status().trainable == sum(p.numel() for p in model.injector.parameters())


def test_a_deleted_adapter_leaves_no_hook(model: PerceiveModel) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) for m in model.backbone.modules())

    injector = model.adapters["rain"]
    model.delete_adapter("rain")
    assert hooks() == len(model.sites)
    assert model.status().adapters == ("default",)
    net = CASES["u_shape"].net()
    injector.attach(net)  # works and trains by itself again
    expected = wrapped("u_shape", trained=False)
    expected.injector.load_state_dict(injector.state_dict())
    seen = expected.perceive(IMAGE)
    with injector.conditioned(seen):
        output = net(IMAGE)
    torch.testing.assert_close(output, expected(IMAGE, perception=seen))
    assert all(parameter.requires_grad for parameter in injector.parameters())


def test_unwrapping_takes_all_off(model: PerceiveModel) -> None:
    net = CASES["u_shape"].net()
    assert [s[1:] for s in state(model.unwrap())[2]] == [s[1:] for s in state(net)[2]]
    assert not any(m._forward_hooks for m in model.backbone.modules())


def test_prompt_modules_that_nothing_here_steers_are_refused(model: PerceiveModel) -> None:
    config = AdapterConfig(sources={"compact": 64, "tiers": 5})
    plan = plan_sites(CASES["u_shape"].net(), config=config)
    model = wrap(CASES["u_shape"].net())
    with pytest.raises(ConfigError, match="tiers has width 5, and what perceives here tells 3"):
        model.add_adapter("oracle", PromptInjector(plan, config))
    assert list(model.adapters) == ["default"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        *[(name, "expected some text without a dot") for name in ("", "a.b", 5)],
        *[(name, "there is an adapter .* already") for name in ("rain", "default")],
        *[(name, "is one that torch needs") for name in ("active", "training", "update")],
    ],
)
def test_names_that_cannot_be_are_refused(model: PerceiveModel, name: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        model.add_adapter(name, injector_like(model))
    model.add_adapter("other", injector_like(model))


def test_unknown_and_active_adapters_are_refused(model: PerceiveModel) -> None:
    for act in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ConfigError, match="no adapter 'snow'; the adapters are default, rain"):
            act("snow")
    with pytest.raises(ConfigError, match="is active"):
        model.delete_adapter("default")


def test_an_adapter_for_another_network_is_refused(model: PerceiveModel) -> None:
    before = state(model.backbone)
    with pytest.raises(SiteError):
        model.add_adapter("other", injector_like(wrapped("isotropic")))
    assert state(model.backbone)[:4] == before[:4]
    assert model.status().adapters == ("default", "rain")


def test_switching_inside_disabled_enables_the_new_adapter_alone(model: PerceiveModel) -> None:
    with model.disabled():
        model.set_adapter("rain")
    switched = model(IMAGE)
    model.set_adapter("default")
    model.set_adapter("rain")
    assert torch.equal(switched, model(IMAGE))


def test_adapters_train_as_they_were_added(tmp_path: Path) -> None:
    wrapped("u_shape").save_pretrained(tmp_path)
    model = wrap(CASES["u_shape"].net(), tmp_path)
    model.add_adapter("new")
    model.add_adapter("read", tmp_path)
    trains = {}
    for name in ("new", "read", "default", "new"):
        model.set_adapter(name)
        trains[name] = model.status().trainable > 0
    assert trains == {"new": True, "read": False, "default": False}
    model.injector.requires_grad_(False)
    model.set_adapter("default")
    model.set_adapter("new")
    assert not model.status().trainable


def test_added_inside_inference_mode_it_trains() -> None:
    model = wrapped("u_shape")
    with torch.inference_mode():
        model.add_adapter("new")
    model.set_adapter("new")
    model(IMAGE).mean().backward()
    assert all(p.grad is not None for p in model.trainable_parameters())


def test_what_was_frozen_of_an_adapter_stays_so() -> None:
    model = wrapped("u_shape")
    model.injector.encoder.requires_grad_(False)
    before = {name for name, p in model.injector.named_parameters() if p.requires_grad}
    assert 0 < len(before) < len(list(model.injector.parameters()))
    model.add_adapter("rain")
    model.set_adapter("rain")
    assert all(parameter.requires_grad for parameter in model.injector.parameters())
    model.set_adapter("default")
    assert {name for name, p in model.injector.named_parameters() if p.requires_grad} == before


def test_weights_are_not_swapped_inside_a_fold(tmp_path: Path) -> None:
    model = wrapped("u_shape")
    model.save_pretrained(tmp_path)
    with (
        model.fold(model.perceive(IMAGE)),
        pytest.raises(PerceptionError, match=r"fold\(\) is under way"),
    ):
        model.hotswap_adapter(tmp_path)


def test_a_new_adapter_works_everywhere_whatever_the_active_one_treats() -> None:
    model = wrapped("u_shape", perceiver="perceive-tiny")
    model.treat("haze")
    model.add_adapter("rain")
    assert model.status().treats == ("haze",)
    model.set_adapter("rain")
    assert model.status().treats is None
    assert "treats" not in str(model.status())
    model.set_adapter("default")
    assert "treats haze" in str(model.status())


def test_what_is_treated_does_not_change_inside_a_fold() -> None:
    model = wrapped("u_shape", perceiver="perceive-tiny")
    with (
        model.fold(model.perceive(IMAGE)),
        pytest.raises(PerceptionError, match=r"fold\(\) is under way"),
    ):
        model.treat("haze")
    assert model.status().treats is None
