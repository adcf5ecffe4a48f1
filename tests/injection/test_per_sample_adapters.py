"""A batch whose images have adapters of their own, and adapters that come while others work."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from wrapping import KINDS, injector_like, moved, oracle, relative, wrapped
from zoo import CASES

from perceive_adapter import (
    AdapterConfig,
    AdapterMismatchError,
    CompiledBackboneError,
    ConfigError,
    PerceiveModel,
    PerceptionError,
    wrap,
)

IMAGES = CASES["u_shape"].images(4)
NAMES = ["default", "rain", None, "rain"]


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()  # graphs of other tests count towards its limit


@pytest.fixture
def model() -> PerceiveModel:
    model = wrapped("u_shape")
    model.add_adapter("rain", injector_like(model, seed=5))
    return model


def one_by_one(model: PerceiveModel, images: torch.Tensor = IMAGES) -> torch.Tensor:
    restored = []
    for image, name in zip(images.split(1), NAMES, strict=True):
        if name is None:
            with model.disabled():
                restored.append(model(image))
        else:
            model.set_adapter(name)
            restored.append(model(image))
    model.set_adapter("default")
    return torch.cat(restored)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["u_shape", "tokens", "windows"])
@torch.no_grad()
def test_each_image_is_restored_by_the_adapter_that_is_named_for_it(case: str, kind: str) -> None:
    images = CASES[case].images(4)
    model = wrapped(case, config=KINDS[kind])
    model.add_adapter("rain", injector_like(model, seed=5))
    mixed = model(images, adapter_names=NAMES)
    expected = one_by_one(model, images)
    assert relative(mixed, expected) < 1e-5
    assert relative(model(images), expected) > 1e-4
    torch.testing.assert_close(model(images), model(images, adapter_names=["default"] * 4))


def test_without_a_name_an_image_gets_what_the_bare_backbone_gives(model: PerceiveModel) -> None:
    with model.disabled():
        bare = model(IMAGES)
    assert torch.equal(model(IMAGES, adapter_names=[None] * 4), bare)
    assert torch.equal(model(IMAGES, adapter_names=NAMES)[2], bare[2])


def test_a_perception_may_be_given_for_all(model: PerceiveModel) -> None:
    seen = oracle(4)
    mixed = model(IMAGES, perception=seen, adapter_names=NAMES)
    torch.testing.assert_close(mixed[0], model(IMAGES[:1], perception=seen[0])[0])
    one = model(IMAGES, perception=seen[0], adapter_names=NAMES)
    torch.testing.assert_close(one[0], mixed[0])


def test_afterwards_the_active_adapter_is_at_work_alone(model: PerceiveModel) -> None:
    before = model(IMAGES)
    with pytest.raises(RuntimeError):
        model(IMAGES[:, :, :31], adapter_names=NAMES)
    assert torch.equal(model(IMAGES), before)
    model(IMAGES, adapter_names=["rain"] * 4)
    assert torch.equal(model(IMAGES), before)
    assert not model.adapters["rain"].enabled


def test_gradients_reach_the_adapter_that_trains(model: PerceiveModel) -> None:
    model(IMAGES, adapter_names=NAMES).square().mean().backward()
    together = [p.grad.clone() for p in model.injector.layers.parameters()]
    model.zero_grad()
    (model(IMAGES[:1]).square().mean() / 4).backward()
    alone = [p.grad for p in model.injector.layers.parameters()]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in model.adapters["rain"].parameters())


def test_networks_that_write_into_their_input_train_too() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = CASES["u_shape"].net()

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.net(image.sub_(0.5))
            return result

    model = wrap(Writing(), perceiver=False)
    model(IMAGES.clone(), adapter_names=["default"] * len(IMAGES)).sum().backward()
    assert any(p.grad is not None for p in model.trainable_parameters())


def test_names_that_do_not_fit_are_refused(model: PerceiveModel) -> None:
    for names in (["rain"], "rain", [*NAMES, None]):
        with pytest.raises(ConfigError, match="for 4 images: expected a list with a name for each"):
            model(IMAGES, adapter_names=names)
    with pytest.raises(ConfigError, match="no adapter 'snow'"):
        model(IMAGES, adapter_names=["snow", None, None, None])
    with model.fold(oracle(1)), pytest.raises(PerceptionError, match=r"inside fold\(\)"):
        model(IMAGES[:1], adapter_names=["rain"])
    with model.disabled():
        bare = model(IMAGES)
        assert torch.equal(model(IMAGES, adapter_names=NAMES), bare)
        with pytest.raises(ConfigError, match="no adapter 'snow'"):
            model(IMAGES, adapter_names=["snow", None, None, None])


def test_a_pass_of_another_perception_is_not_ended(model: PerceiveModel) -> None:
    seen = oracle(1)
    with model.injector.conditioned(seen):
        expected = model.backbone(IMAGES)
        with pytest.raises(PerceptionError, match="runs with another perception already"):
            model(IMAGES, adapter_names=NAMES)
        assert torch.equal(model.backbone(IMAGES), expected)


def test_images_of_different_adapters_go_through_one_compiled_graph(model: PerceiveModel) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative(compiled(IMAGES, adapter_names=NAMES), one_by_one(model)) < 1e-5
        torch.testing.assert_close(compiled(IMAGES), model(IMAGES))


# Adapters from disk


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = wrapped("u_shape", trained=False)
    moved(model.injector, seed=7)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_inside_a_fold_adapters_stay_as_they_are(model: PerceiveModel) -> None:
    for change in (partial(model.add_adapter, "snow"), partial(model.delete_adapter, "rain")):
        with model.fold(oracle(1)), pytest.raises(PerceptionError, match="fold\\(\\) is under way"):
            change()
    assert "rain" in model.adapters
    assert "snow" not in model.adapters


def test_adapters_are_added_in_the_model_s_precision(model: PerceiveModel, saved: Path) -> None:
    model.bfloat16()
    model.add_adapter("new")
    model.add_adapter("read", saved)
    for name in ("new", "read"):
        assert {p.dtype for p in model.adapters[name].parameters()} == {torch.bfloat16}


def test_a_new_adapter_changes_nothing_yet(model: PerceiveModel) -> None:
    model.add_adapter("snow")
    model.set_adapter("snow")
    with model.disabled():
        bare = model(IMAGES)
    assert torch.equal(model(IMAGES), bare)


def test_saved_adapters_are_added_and_swapped_in(model: PerceiveModel, saved: Path) -> None:
    expected = wrapped("u_shape")
    expected.hotswap_adapter(saved)
    model.add_adapter("haze", saved)
    first = model(IMAGES)
    model.set_adapter("haze")
    assert torch.equal(model(IMAGES), expected(IMAGES))
    assert relative(model(IMAGES), first) > 1e-3
    model.hotswap_adapter(saved, "rain")
    model.set_adapter("rain")
    assert torch.equal(model(IMAGES), expected(IMAGES))
    model.set_adapter("default")
    assert torch.equal(model(IMAGES), first)
    with pytest.raises(ConfigError, match="no adapter 'fog'"):
        model.hotswap_adapter(saved, "fog")


def test_adapters_that_do_not_fit_are_refused(model: PerceiveModel, tmp_path: Path) -> None:
    def add(folder: Path) -> None:
        model.add_adapter("other", folder)

    def refused(reason: str, act: Callable[[Path], None] = add, **options: object) -> None:
        other = wrapped("u_shape", trained=False, **options)
        if reason.startswith("trained"):
            other.unfreeze("ending.bias")
        other.save_pretrained(tmp_path / "other")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(AdapterMismatchError, match=reason):
            act(tmp_path / "other")
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())

    refused("takes another value range", value_range=(-1, 1))
    refused("is steered by another perceiver", perceiver="perceive-tiny")
    refused("trained parameters of the backbone")
    refused("has other sites", sites=["enc*.a"], act=model.hotswap_adapter)
    refused("has another config", config=AdapterConfig(condition_dim=8), act=model.hotswap_adapter)


def test_weights_are_swapped_without_compiling_again(saved: Path) -> None:
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model, expected = wrapped("u_shape"), wrapped("u_shape")
    expected.hotswap_adapter(saved)
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.no_grad():
        before = compiled(IMAGES)
        model.hotswap_adapter(saved)
        after = compiled(IMAGES)
        assert relative(after, before) > 1e-3
        assert relative(after, expected(IMAGES)) < 1e-5
    assert graphs.frame_count == 1


@pytest.mark.newer_torch("compiles a perception once for each size")
def test_adapters_compile_once_each_and_sizes_once_for_all() -> None:
    graphs = torch._dynamo.testing.CompileCounterWithBackend("eager")
    model = wrapped("isotropic")
    for name, seed in (("rain", 5), ("haze", 6)):
        model.add_adapter(name, injector_like(model, seed=seed))
    compiled = torch.compile(model, fullgraph=True, backend=graphs, dynamic=True)
    with torch.no_grad():
        for _ in range(2):
            for name in ("default", "rain", "haze"):
                model.set_adapter(name)
                for size in (32, 48, 64, 80):
                    image = CASES["isotropic"].images(2, size)
                    assert relative(compiled(image), model(image)) < 1e-5
    assert graphs.frame_count == 3


def test_adapters_added_after_compiling_are_refused(model: PerceiveModel) -> None:
    torch.compile(model, backend="eager")(IMAGES)
    with pytest.raises(CompiledBackboneError, match="add adapters before"):
        model.add_adapter("late")
    assert list(model.adapters) == ["default", "rain"]


@pytest.mark.newer_torch("compiles every block by itself")
def test_blocks_may_be_compiled_alone_and_share_their_code() -> None:
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model, image = wrapped("isotropic"), CASES["isotropic"].images(2)
    expected = model(image)
    expected.square().mean().backward()
    gradients = [p.grad.clone() for p in model.trainable_parameters()]
    model.zero_grad()
    for block in model.backbone.modules():
        if type(block).__name__ == "Block":
            block.compile(fullgraph=True, backend=graphs)
    actual = model(image)
    assert graphs.frame_count == 2  # a block, and the hook behind it; the same for all four
    assert relative(actual, expected) < 1e-5
    actual.square().mean().backward()
    for parameter, gradient in zip(model.trainable_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert relative(model(image, perception=oracle(2)), expected) > 1e-4
        with model.disabled():
            bare = model(image)
        assert relative(bare, CASES["isotropic"].net()(image)) < 1e-6


class FailsOnce(nn.Module):
    """Runs out of memory now and then, in the middle of a graph or after a break."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tail = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.fails = False

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = self.head(image)
        torch._dynamo.graph_break()
        if self.fails:
            raise torch.OutOfMemoryError("made up")
        return self.tail(features)


def _compiled(model: PerceiveModel, images: torch.Tensor, options: dict) -> None:
    torch.compile(model, backend="eager")(images, **options)


def _exported(model: PerceiveModel, images: torch.Tensor, options: dict) -> None:
    torch.export.export(model, (images,), options, strict=False)


@pytest.mark.parametrize("way", [_compiled, _exported])
def test_a_failure_under_tracing_leaves_nothing_behind(way: Callable) -> None:
    model = wrap(FailsOnce(), perceiver=False)
    moved(model.injector)
    model.add_adapter("rain", injector_like(model, seed=5))
    images = IMAGES[:2]
    expected = model(images).detach()
    model.backbone.fails = True
    names = {"adapter_names": ["rain", None]}
    for options in ({}, names):
        with pytest.raises(Exception, match="made up"):
            way(model, images, options)
    model.backbone.fails = False
    assert model.status().enabled
    with pytest.raises(PerceptionError, match="called by itself"):
        model.backbone(images)
    assert torch.equal(model(images), expected)
