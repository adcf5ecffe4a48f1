"""A wrapped network is a module like others: copied, moved, compiled, exported, unwrapped."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from wrapping import moved, oracle, relative, state, wrapped
from zoo import CASES

from perceive_adapter import (
    AlreadyWrappedError,
    BackboneError,
    ConfigError,
    ImageError,
    PerceiveModel,
    PerceptionError,
    PromptInjector,
    QualityPerceiver,
    SiteError,
    plan_sites,
    wrap,
)

IMAGE = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _pickled(model: PerceiveModel) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled])
@pytest.mark.parametrize("case", ["u_shape", "windows", "mixed"])
def test_copies_are_equal_and_independent(case: str, duplicate: Any) -> None:
    model = wrapped(case)
    model(IMAGE).mean().backward()
    twin = duplicate(model)
    expected = model(IMAGE)
    assert torch.equal(twin(IMAGE), expected)
    moved(twin.injector, seed=7)
    assert not torch.equal(twin(IMAGE), expected)
    assert torch.equal(model(IMAGE), expected)
    net = twin.unwrap()
    assert net is twin.backbone
    assert not any(module._forward_hooks for module in net.modules())
    assert torch.equal(model(IMAGE), expected)


def test_data_parallel_names_the_one_that_works() -> None:
    replica = wrapped("u_shape")._replicate_for_data_parallel()
    with pytest.raises(BackboneError, match="DistributedDataParallel"):
        replica(IMAGE)


def test_a_data_parallel_backbone_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"is a DataParallel, .*wrap the network in it"):
        wrap(torch.nn.DataParallel(torch.nn.Conv2d(3, 3, 3, padding=1)), example=IMAGE)


@pytest.mark.parametrize("name", ["perception", "adapter_names"])
def test_arguments_that_the_model_takes_for_itself_are_refused(name: str) -> None:
    class Own(torch.nn.Conv2d):
        pass

    exec(f"def forward(self, image, {name}=None): return image", scope := {})
    Own.forward = scope["forward"]  # type: ignore[method-assign]
    with pytest.raises(BackboneError, match=f"argument '{name}' of its own"):
        wrap(Own(3, 3, 3))


@pytest.mark.parametrize("given", [None, "rain"])
def test_what_is_no_perception_is_refused(given: Any) -> None:
    model = wrapped("u_shape")
    for context in (model.fold, model.injector.conditioned):
        with pytest.raises(PerceptionError, match="expected a Perception"), context(given):
            pass
    model(IMAGE)


@pytest.mark.parametrize("call", [PerceiveModel.forward, PerceiveModel.perceive])
def test_images_on_another_device_are_refused(call: Any) -> None:
    with pytest.raises(ImageError, match="the image is on meta and the model on cpu"):
        call(wrapped("u_shape"), IMAGE.to("meta"))


@pytest.mark.parametrize("taken", [copy.deepcopy, _pickled, PerceiveModel.state_dict])
def test_nothing_is_taken_of_folded_weights(taken: Any) -> None:
    model = wrapped("u_shape")
    with (
        model.fold(model.perceive(IMAGE[:1])),
        pytest.raises(PerceptionError, match="under way already"),
    ):
        taken(model)
    taken(model)


@contextmanager
def folded_elsewhere(model: PerceiveModel) -> Iterator[None]:
    """Have another thread fold the model's weights for a while."""
    inside, leave = threading.Event(), threading.Event()

    def restore() -> None:
        with model.fold(model.perceive(IMAGE[:1])):
            inside.set()
            leave.wait(0.3)

    thread = threading.Thread(target=restore)
    thread.start()
    assert inside.wait(60)
    yield
    thread.join()


@pytest.mark.parametrize("taken", [copy.deepcopy, _pickled, PerceiveModel.state_dict])
def test_who_takes_weights_waits_for_a_fold_of_another_thread(taken: Any) -> None:
    model = wrapped("u_shape")
    expected = copy.deepcopy(model.state_dict())
    with folded_elsewhere(model):
        found = taken(model)
    weights = found if isinstance(found, dict) else found.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_what_pickle_is_given_does_not_fold() -> None:
    """It is read later, when another thread may restore; its tensors are shared all the same."""
    model = wrapped("u_shape")
    held = model.__reduce_ex__(2)[2]["_modules"]["backbone"]  # type: ignore[index]
    expected = {name: value.data_ptr() for name, value in model.backbone.named_parameters()}
    with model.fold(model.perceive(IMAGE[:1])):
        assert {n: p.data_ptr() for n, p in held.named_parameters()} == expected


def _loaded(model: PerceiveModel) -> None:
    other = wrapped("u_shape", seed=1)
    model.load_state_dict(other.state_dict())


def _loaded_around(model: PerceiveModel) -> None:
    nn.Sequential(model).load_state_dict(nn.Sequential(wrapped("u_shape", seed=1)).state_dict())


@pytest.mark.parametrize("put", [_loaded, _loaded_around, PerceiveModel.double])
def test_no_weights_are_put_into_a_fold(put: Any) -> None:
    """At its end they would be lost."""
    model = wrapped("u_shape")
    before = copy.deepcopy(model.state_dict())
    with (
        model.fold(model.perceive(IMAGE[:1])),
        pytest.raises(PerceptionError, match="under way already"),
    ):
        put(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_who_puts_weights_waits_for_a_fold_of_another_thread() -> None:
    model, other = wrapped("u_shape"), wrapped("u_shape", seed=1)
    with folded_elsewhere(model):
        model.load_state_dict(other.state_dict())
    found, expected = model.state_dict(), other.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled])
def test_a_copy_of_a_compiled_model_is_its_own_and_not_compiled(duplicate: Any) -> None:
    model = wrapped("u_shape")
    expected = model(IMAGE)
    model.compile(backend="eager")
    model(IMAGE)
    twin = duplicate(model)
    moved(twin.injector, seed=7)
    assert relative(twin(IMAGE), expected) > 1e-3
    twin.add_adapter("rain")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled])
def test_a_context_does_not_reach_into_a_copy(duplicate: Any) -> None:
    model = wrapped("u_shape")
    with model.disabled():
        twin = duplicate(model)
    assert twin.status().enabled
    assert torch.equal(twin(IMAGE), model(IMAGE))


@pytest.mark.parametrize("saved", [False, True])
def test_a_backbone_is_left_alone_where_wrapping_is_interrupted(
    saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    model = wrapped("u_shape")
    model.save_pretrained(tmp_path)
    net = model.unwrap()
    with monkeypatch.context() as patch:
        if saved:
            patch.setattr("perceive_adapter.injection.wrap.load_unfrozen", interrupted)
        else:
            patch.setattr(QualityPerceiver, "fingerprint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            wrap(net, tmp_path if saved else None)
    assert not any(module._forward_hooks for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_precision_of_the_whole_model_changes(dtype: torch.dtype) -> None:
    model = wrapped("u_shape")
    expected = model(IMAGE)
    model.to(dtype)
    tolerance = {torch.float64: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
    actual = model(IMAGE.to(dtype))
    assert actual.dtype == dtype
    assert relative(actual.to(expected), expected) < tolerance
    with model.fold(model.perceive(IMAGE[:1].to(dtype))):
        assert model(IMAGE.to(dtype)).dtype == dtype


def test_channels_last_gives_the_same() -> None:
    model = wrapped("u_shape")
    expected = model(IMAGE)
    model.to(memory_format=torch.channels_last)
    assert relative(model(IMAGE.to(memory_format=torch.channels_last)), expected) < 1e-5


def test_the_state_dict_restores_a_model() -> None:
    model, other = wrapped("u_shape"), wrapped("u_shape", seed=3)
    assert not torch.equal(other(IMAGE), model(IMAGE))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IMAGE), model(IMAGE))
    net = {n.removeprefix("backbone.") for n in model.state_dict() if n.startswith("backbone.")}
    assert net == set(CASES["u_shape"].net().state_dict())


def test_modes_reach_all_but_frozen_parts() -> None:
    model = wrapped("u_shape")
    assert not model.training
    assert all(module.training for module in model.train().modules())
    assert not any(module.training for module in model.eval().modules())


# torch.compile and torch.export


@pytest.mark.parametrize("case", ["u_shape", "windows", "nafnet"])
def test_compiled_without_a_graph_break(case: str) -> None:
    model, image = wrapped(case), CASES[case].images(2)
    with torch.no_grad():
        expected = model(image)
        actual = torch.compile(model, fullgraph=True, backend="aot_eager")(image)
    assert relative(actual, expected) < 1e-5


def test_a_compiled_model_trains() -> None:
    torch._dynamo.reset()  # graphs of other tests count towards its limit
    model, seen = wrapped("isotropic"), oracle(2)
    model(IMAGE, perception=seen).square().mean().backward()
    expected = [p.grad.clone() for p in model.injector.layers.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(IMAGE, perception=seen).square().mean().backward()
    actual = [p.grad for p in model.injector.layers.parameters()]
    torch.testing.assert_close(actual, expected)


def test_switching_off_works_in_a_compiled_model() -> None:
    model, net = wrapped("isotropic"), CASES["isotropic"].net()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert relative(compiled(IMAGE), net(IMAGE)) > 1e-3
        with model.disabled():
            assert torch.equal(compiled(IMAGE), net(IMAGE))
        assert relative(compiled(IMAGE), model(IMAGE)) < 1e-6


def test_an_exported_model_perceives_new_images() -> None:
    model = wrapped("u_shape")
    program = torch.export.export(model, (IMAGE,)).module()
    other = IMAGE.flip(-1) * 0.5
    assert relative(program(IMAGE), model(IMAGE)) < 1e-5
    assert relative(program(other), model(other)) < 1e-5


# Unwrapping


@pytest.mark.parametrize("case", ["u_shape", "mixed", "normed", "tied", "swinir"])
def test_unwrap_gives_the_original_back(case: str) -> None:
    net = CASES[case].net().train()
    next(net.parameters()).requires_grad_(False)
    next(net.children()).eval()
    image, hook = CASES[case].images(2), []
    next(net.children()).register_forward_hook(lambda *_: hook.append(1))
    torch.manual_seed(0)
    before = state(net)
    model = wrap(net, **CASES[case].wrap)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=0.1)
    for _ in range(2):
        model.train()(image).square().mean().backward()
        optimizer.step()
    model.eval()
    assert model.unwrap() is net
    assert state(net)[:4] == before[:4]
    assert len(hook) > 0


@pytest.mark.parametrize("saved", [False, True])
def test_wrapped_inside_inference_mode(saved: bool, tmp_path: Path) -> None:
    if saved:
        wrapped("u_shape").save_pretrained(tmp_path)
    net = CASES["u_shape"].net()
    with torch.inference_mode():
        model = wrap(net, tmp_path if saved else None)
        restored = model.restore(IMAGE)
    assert torch.equal(model.restore(IMAGE), restored)
    model.adapters.requires_grad_(True)
    model(IMAGE).mean().backward()


def test_weights_made_inside_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        net = CASES["u_shape"].net()
        with pytest.raises(BackboneError, match="where no gradient can ever pass"):
            wrap(net)


def test_unwrap_puts_unfrozen_weights_back() -> None:
    net = CASES["mixed"].net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    expected = net(IMAGE)
    model = wrap(net)
    model.unfreeze("**")
    model(IMAGE).square().mean().backward()
    torch.optim.SGD(model.trainable_parameters(), lr=0.1).step()
    with model.disabled():
        assert not torch.equal(model(IMAGE), expected)
    assert torch.equal(model.unwrap()(IMAGE), expected)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_a_network_whose_model_is_lost_can_be_wrapped_again() -> None:
    net = CASES["u_shape"].net().train()
    net.requires_grad_(False).intro.weight.requires_grad_(True)
    before, expected = state(net), net(IMAGE)
    model = wrap(net, perceiver=False)
    model.add_adapter("other")
    model.unfreeze("**")
    torch.nn.init.zeros_(net.intro.weight)
    del model
    with pytest.raises(BackboneError, match=r"the model that wrapped this network is gone"):
        net(IMAGE)
    again = wrap(net, perceiver=False)
    assert again.unwrap() is net
    assert state(net)[:-1] == before[:-1]  # but for torch's random state
    assert torch.equal(net(IMAGE), expected)


def test_a_lost_injector_leaves_room_for_another() -> None:
    net = CASES["u_shape"].net()
    plan = plan_sites(net)
    injector = PromptInjector(plan)
    injector.attach(net)
    with pytest.raises(AlreadyWrappedError):
        PromptInjector(plan).attach(net)
    del injector
    PromptInjector(plan).attach(net)


@pytest.mark.parametrize("through", [copy.deepcopy, _pickled])
def test_copies_of_a_model_know_their_own_hooks(through: Any) -> None:
    model = wrapped("u_shape")
    other = through(model)
    with pytest.raises(AlreadyWrappedError):
        wrap(other.backbone)
    net = other.backbone
    del model, other
    wrap(net).unwrap()(IMAGE)


def test_models_are_freed_without_the_garbage_collector() -> None:
    model = wrapped("u_shape")
    gone = weakref.ref(model.backbone)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_requires_grad_reaches_what_trains_and_no_more() -> None:
    model = wrapped("u_shape", perceiver=None)
    model.unfreeze("intro.*")
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.requires_grad_(True) is model
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains


def test_weights_that_train_unnamed_are_not_lost_when_saving(tmp_path: Path) -> None:
    model = wrapped("u_shape")
    model.backbone.intro.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"'intro\.weight'.*model\.unfreeze\('intro\.weight'"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    model.unfreeze("intro.weight")
    model.save_pretrained(tmp_path / "adapter")
    model.backbone.add_module("extra", nn.Conv2d(3, 3, 1))  # somebody else's
    model.save_pretrained(tmp_path / "adapter")


def test_loading_another_network_s_weights_after_unfreeze_warns(
    recwarn: pytest.WarningsRecorder,
) -> None:
    trained, model = wrapped("u_shape", seed=1), wrapped("u_shape", seed=2)
    model.load_state_dict(trained.state_dict())  # nothing is unfrozen yet
    model.unfreeze("intro.*")
    model.load_state_dict(trained.state_dict())
    assert not recwarn.list
    other = wrapped("u_shape", seed=3).state_dict()
    with pytest.warns(UserWarning, match=r"other values for \d+ frozen.*unwrap\(\) will put back"):
        nn.ModuleDict({"net": model}).load_state_dict({f"net.{k}": v for k, v in other.items()})


def test_unfreezing_what_is_not_there_changes_nothing() -> None:
    model = wrapped("u_shape")
    with pytest.raises(SiteError, match=r"'endign\.\*' matches none .* parameters"):
        model.unfreeze("intro.weight", "endign.*")
    assert model.status().unfrozen == ()


def test_an_unwrapped_model_says_so() -> None:
    model = wrapped("u_shape")
    net = model.unwrap().eval()
    uses = (
        lambda: model(IMAGE),
        lambda: model.save_pretrained("nowhere"),
        lambda: model.restore(IMAGE),
        lambda: model.add_adapter("rain"),
        lambda: model.set_adapter("default"),
        lambda: model.unfreeze("**"),
        lambda: model.size_multiple,
        lambda: model.disabled().__enter__(),
        lambda: model.fold(oracle(1)).__enter__(),
        model.unwrap,
    )
    for use in uses:
        with pytest.raises(BackboneError, match="was unwrapped"):
            use()
    model.train().double().requires_grad_(False)
    assert not net.training
    assert {(p.dtype, p.requires_grad) for p in net.parameters()} == {(torch.float32, True)}
    assert copy.deepcopy(model).backbone is not net
    assert not any(module._forward_hooks for module in net.modules())


def _lora(net: nn.Module) -> None:
    config = peft.LoraConfig(r=2, target_modules=["a", "b"])
    peft.inject_adapter_in_model(config, net)


def _pruned(net: nn.Module) -> None:
    prune.l1_unstructured(net.ending, "weight", 0.5)


def _extended(net: nn.Module) -> None:
    net.add_module("extra", nn.Conv2d(3, 3, 1))


@pytest.mark.parametrize("change", [_lora, _pruned, _extended])
def test_unwrap_copes_with_what_others_have_added(change: Any) -> None:
    model = wrapped("u_shape")
    model.unfreeze("intro.weight")
    own = list(model.backbone.parameters())
    change(model.backbone)
    net = model.unwrap()
    assert all(parameter.requires_grad for parameter in own)
    assert not any(module._forward_hooks for module in net.modules() if module is not net)
    net(IMAGE).mean().backward()


def test_an_unwrapped_backbone_can_be_wrapped_again() -> None:
    net = CASES["u_shape"].net()
    expected = net(IMAGE)
    assert torch.equal(wrap(wrap(net).unwrap())(IMAGE), expected)


class Returns(nn.Module):
    """Its forward is given the wrapped model, as users' own models do it."""

    def __init__(self, model: PerceiveModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image).clamp(0, 1)


def test_inside_another_module() -> None:
    outer = Returns(wrapped("u_shape")).train()
    outer(IMAGE).mean().backward()
    trainable = {name for name, p in outer.named_parameters() if p.grad is not None}
    assert trainable
    assert all(name.startswith("model.adapters.") for name in trainable)


def test_arguments_of_the_wrong_kind_are_named() -> None:
    net = CASES["u_shape"].net()
    with pytest.raises(ConfigError, match=r"config is a dict; expected an AdapterConfig"):
        wrap(net, config={"rank": 4})  # type: ignore[arg-type]
    with pytest.raises(BackboneError, match=r"give wrap\(\) one that works, example=.*on\.$"):
        wrap(net, image_arg=1)
    assert not any(module._forward_hooks for module in net.modules())
    model: Any = wrap(net, perceiver=False)
    with pytest.raises(ConfigError, match=r"\['rain'\] cannot be told apart.*one by one"):
        model.treat(["rain"])
    with pytest.raises(SiteError, match=r"got a list.*one by one"):
        model.unfreeze(["**"])
    perceived = QualityPerceiver.from_pretrained("perceive-tiny")(IMAGE)
    for call in (model, model.restore):
        with pytest.raises(PerceptionError, match="got a Perceived; expected a Perception"):
            call(IMAGE, perception=perceived)
    with pytest.raises(PerceptionError, match="got a Perceived"), model.fold(perceived):
        pass
