"""A perception belongs to one forward pass: none is ever stale."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from wrapping import injector_like, oracle, relative, wrapped
from zoo import CASES

from perceive_adapter import (
    AdapterConfig,
    AlreadyWrappedError,
    ConfigError,
    Perception,
    PerceptionError,
    PromptInjector,
    SiteError,
    ValueRange,
    plan_sites,
)
from perceive_adapter.injection.condition import strength

IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _called(model: Any) -> None:
    model(IMAGE)


def _trained(model: Any) -> None:
    model(IMAGE).mean().backward()


def _failed(model: Any) -> None:
    with pytest.raises(RuntimeError):
        model(torch.rand(1, 3, 2, 2, requires_grad=True)[..., :0].sum() + IMAGE[..., :1, :1])


def _folded(model: Any) -> None:
    with model.fold(model.perceive(IMAGE)):
        model(IMAGE)


@pytest.mark.parametrize("before", [lambda model: None, _called, _trained, _failed, _folded])
def test_the_backbone_by_itself_is_an_error(before: Any) -> None:
    model = wrapped("u_shape")
    before(model)
    with pytest.raises(PerceptionError, match=r"disabled\(\)"):
        model.backbone(IMAGE)


def test_disabled_runs_the_bare_backbone() -> None:
    model, net = wrapped("u_shape"), CASES["u_shape"].net()
    expected = net(IMAGE)
    with model.disabled():
        assert torch.equal(model(IMAGE), expected)
        assert torch.equal(model.backbone(IMAGE), expected)
        with model.disabled():
            pass
        assert torch.equal(model(IMAGE), expected)
    assert relative(model(IMAGE), expected) > 1e-3


def test_disabled_restores_images_with_the_bare_backbone() -> None:
    model, net = wrapped("isotropic"), CASES["isotropic"].net().eval()
    with model.disabled():
        bare = model.restore(IMAGE)
        tiled = model.restore(torch.rand(1, 3, 200, 150), tile=96)
    assert torch.equal(bare, net(IMAGE))
    assert tiled.shape == (1, 3, 200, 150)
    assert relative(model.restore(IMAGE), bare) > 1e-3


def test_an_exception_ends_disabled() -> None:
    model, error = wrapped("isotropic"), RuntimeError("inside")
    with pytest.raises(RuntimeError, match="inside"), model.disabled():
        raise error
    assert model.status().enabled


# The injector by itself


def test_an_injector_serves_users_own_models() -> None:
    net = CASES["isotropic"].net()
    injector = PromptInjector(plan_sites(net), AdapterConfig())
    nn.init.ones_(injector.prompt_sites[0].prompt.to_scale_shift.weight)
    expected = net(IMAGE)
    injector.attach(net)
    with pytest.raises(AlreadyWrappedError, match="detach"):
        injector.attach(net)
    with injector.conditioned(injector.perceive(IMAGE)):
        assert relative(net(IMAGE), expected) > 1e-3
    injector.enabled = False
    assert torch.equal(net(IMAGE), expected)
    injector.detach()
    injector.enabled = True
    assert torch.equal(net(IMAGE), expected)


def test_an_injector_for_another_network_is_refused_before_any_hook() -> None:
    injector = injector_like(wrapped("isotropic"))
    for other in ("u_shape", "gray"):
        net = CASES[other].net()
        with pytest.raises(SiteError, match=r"is no module of this|the plan expects"):
            injector.attach(net)
        assert not any(module._forward_hooks for module in net.modules())


def test_other_sources_replace_the_compact_features() -> None:
    config = AdapterConfig(sources={"degradations": 3, "severity": 3, "semantic": 5})
    model = wrapped("isotropic", config=config)
    assert model.injector.encoder.compact is None
    with pytest.raises(PerceptionError):
        model(IMAGE)
    one = Perception(torch.rand(1, 0)[:, :0], None, *torch.rand(2, 1, 3), None, torch.rand(1, 4, 5))
    expected = model(IMAGE, perception=one)
    deep = Perception(None, None, one.degradations, one.severity, None, one.semantic.flip(1))
    assert relative(model(IMAGE, perception=deep), expected) > 1e-5
    assert torch.equal(model(IMAGE, perception=one), expected)


def test_the_compact_features_are_the_image_in_unit_range() -> None:
    unit = wrapped("isotropic").perceive(IMAGE).compact
    scaled = wrapped("isotropic", value_range=(0, 255)).perceive(255 * IMAGE).compact
    torch.testing.assert_close(scaled, unit, rtol=1e-4, atol=1e-5)
    assert unit.requires_grad
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(1))
    assert oracle(1).compact.shape == unit.shape


# Value ranges


@pytest.mark.parametrize(
    ("given", "low", "high"),
    [
        ((0, 1), 0, 1),
        ((-1, 1), -1, 1),
        ((0, 255), 0, 255),
        (([0.5] * 3, [0.25] * 3), -2, 2),
        ((np.float32(-1), np.float32(1)), -1, 1),
        ((np.full(3, 0.5), torch.full((3,), 0.25)), -2, 2),
        (torch.tensor([-1.0, 1.0]), -1, 1),
    ],
)
def test_value_ranges_map_to_unit_and_back(given: Any, low: float, high: float) -> None:
    values = ValueRange.of(given)
    ends = torch.tensor([low, high]).view(1, 1, 1, 2).expand(1, 3, 1, 2).float()
    unit = values.to_unit(ends)
    torch.testing.assert_close(unit, torch.tensor([0.0, 1.0]).expand(1, 3, 1, 2))
    torch.testing.assert_close(values.from_unit(unit), ends)
    assert ValueRange.of(values) is values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_value_ranges_are_not_rounded_to_half_a_precision(dtype: torch.dtype) -> None:
    values = ValueRange.of((0, 255))
    white = torch.full((1, 3, 1, 1), 255.0, dtype=dtype)
    assert values.to_unit(white).eq(1).all()
    assert values.from_unit(torch.ones_like(white)).eq(255).all()
    assert values.to_unit(white).dtype == values.from_unit(white).dtype == dtype


@pytest.mark.parametrize(
    "given", [(1, 0), (0, 0), 3, "ab", (0,), ([0.5], []), ([], []), ([0.5], [0.0]), (0, "1"), None]
)
def test_value_ranges_that_are_none(given: object) -> None:
    with pytest.raises(ConfigError, match="value_range="):
        ValueRange.of(given)


# What an adapter is for


def _steered(**options: Any) -> Any:
    return wrapped("u_shape", config=AdapterConfig(sources={"severity": 3}, **options))


def _severe(*rows: list[float]) -> Perception:
    return Perception(severity=torch.tensor(rows))


@pytest.mark.parametrize("level", ["modulation", "cross_attention"])
def test_the_backbone_is_left_alone_where_nothing_is_perceived_that_the_adapter_treats(
    level: str,
) -> None:
    model, bare = _steered(level=level, treats=(0, 2)), CASES["u_shape"].net()(IMAGE)
    assert torch.equal(model(IMAGE, perception=_severe([0, 1, 0])), bare)
    with torch.no_grad():  # folded
        assert torch.equal(model(IMAGE, perception=_severe([0, 1, 0])), bare)
    full = model(IMAGE, perception=_severe([1, 0, 0]))
    assert relative(full, bare) > 1e-3
    hardly = model(IMAGE, perception=_severe([0.02, 1, 0]))
    assert 0 < relative(hardly, bare) < 0.1 * relative(full, bare)


def test_the_strength_follows_the_severity_up_to_a_fifth() -> None:
    severity = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.2, 0.0], [0.9, 0.3], [0.06, 0.04]])
    together = [0, 0.5, 1, 1, 0.4728]  # of 0.06 and 0.04: 0.0976, 0.488 of a fifth
    assert strength(severity).tolist() == pytest.approx(together, abs=0.01)


def test_what_is_in_doubt_adds_no_strength() -> None:
    severity = torch.tensor([[0.2, 0.0]]).expand(5, -1)
    presence = torch.tensor([[0.9, 0.0], [1.0, 0.0], [0.75, 0.0], [0.6, 0.9], [0.0, 1.0]])
    assert strength(severity, presence).tolist() == pytest.approx([1, 1, 0.5, 0, 0], abs=1e-6)


def test_a_severity_that_is_not_believed_leaves_the_backbone_alone() -> None:
    sources = {"degradations": 2, "severity": 2}
    model = wrapped("u_shape", config=AdapterConfig(sources=sources, treats=(1,)))
    severe, bare = torch.ones(1, 2), CASES["u_shape"].net()(IMAGE)

    def told(*presence: float) -> torch.Tensor:
        perception = Perception(degradations=torch.tensor([presence]), severity=severe)
        return model(IMAGE, perception=perception)

    assert torch.equal(told(1, 0.4), bare)
    assert relative(told(1, 1), bare) > 1e-3


def test_the_strength_is_each_image_s_own() -> None:
    model, batch = _steered(treats=(1,)), IMAGE.expand(2, -1, -1, -1)
    both = model(batch, perception=_severe([1, 0, 0], [1, 1, 0]))
    torch.testing.assert_close(both[:1], CASES["u_shape"].net()(IMAGE))
    torch.testing.assert_close(both[1:], model(IMAGE, perception=_severe([1, 1, 0])))


def test_treats_needs_columns_that_are_there() -> None:
    for columns in [(), (-1,), (True,), ("rain",)]:
        with pytest.raises(ConfigError, match="treats="):
            AdapterConfig(treats=columns)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"have 3"):
        _steered(treats=(3,))
    with pytest.raises(ConfigError, match=r"have 2"):
        wrapped(
            "u_shape", config=AdapterConfig(sources={"degradations": 2, "severity": 3}, treats=(2,))
        )
    with pytest.raises(ConfigError, match=r"have 0"):
        wrapped("u_shape", config=AdapterConfig(treats=(0,)))


def test_a_perception_is_a_sequence_of_perceptions() -> None:
    seen = oracle(3)
    assert len(seen) == 3
    assert torch.equal(Perception.cat(list(seen)).compact, seen.compact)
    assert torch.equal(seen[-1].compact, seen.compact[2:])
    assert torch.equal(seen[np.int64(1)].compact, seen.compact[1:2])
    for index in (3, -4):
        with pytest.raises(IndexError, match="of a perception of 3"):
            seen[index]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdapterConfig(layer=None), "the plan has layer sites, and the config layer=None"),
        (AdapterConfig(condition_dim=64), "and with this config there are"),
    ],
)
def test_a_plan_for_another_config_is_refused(config: AdapterConfig, message: str) -> None:
    plan = plan_sites(CASES["u_shape"].net())
    with pytest.raises(ConfigError, match=message):
        PromptInjector(plan, config)
