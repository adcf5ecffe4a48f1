"""Folding: with one perception a gated branch is a plain weight, and nobody's parameter changes."""

import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from wrapping import injector_like, moved, oracle, relative, state, wrapped
from zoo import CASES

from perceive_adapter import PerceiveModel, PerceptionError, plan_sites, wrap

ROUNDING = 1e-4


def folded_run(model: PerceiveModel, zoo: Any, image: Tensor, seen: Any) -> Tensor:
    with model.fold(seen):
        return zoo.run(model, image)


@pytest.mark.parametrize("case", CASES)
def test_folded_and_unfolded_agree(case: str) -> None:
    zoo = CASES[case]
    model, image, seen = wrapped(zoo), zoo.images(2), oracle(1)
    parameters = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    folded = folded_run(model, zoo, image, seen)
    with torch.no_grad(), model.injector.conditioned(seen):
        assert relative(folded, zoo.run(model.backbone, image)) < ROUNDING
    for name, parameter in model.named_parameters():
        before, value = parameters[name]
        assert id(parameter) == before
        assert torch.equal(parameter, value)
    if case != "zero_scale":
        assert relative(folded_run(model, zoo, image, oracle(1, seed=9)), folded) > 10 * ROUNDING


def test_weights_are_swapped_inside_and_put_back_after_an_exception() -> None:
    model = wrapped("tied")
    layers = [model.backbone.get_submodule(site.name) for site in model.sites.of("layer")]
    before = [layer.weight for layer in layers]

    def swap_and_fail() -> None:
        with model.fold(oracle(1)):
            assert not any(now.weight is was for now, was in zip(layers, before, strict=True))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        swap_and_fail()
    assert all(now.weight is was for now, was in zip(layers, before, strict=True))
    assert not any(prompt.fold.under_way for prompt in model.injector.prompt_sites)
    assert model.backbone.body[0].a.weight is model.backbone.body[1].a.weight


def test_a_network_that_raises_leaves_its_weights_in_place() -> None:
    model = wrapped("multiple")
    before = [id(p) for p in model.parameters()]
    with torch.no_grad(), pytest.raises(ValueError, match="multiples of 8"):
        model(torch.rand(1, 3, 130, 130))
    assert [id(p) for p in model.parameters()] == before
    assert model(torch.rand(1, 3, 16, 16)).isfinite().all()


def test_tied_layers_get_a_weight_each() -> None:
    model = wrapped("tied")
    one, two = model.backbone.body[0].a, model.backbone.body[1].a
    with model.fold(oracle(1)):
        assert not torch.equal(one.weight, two.weight)


def test_computed_weights_run_unfolded() -> None:
    model = wrapped("normed")
    with model.fold(oracle(1)):
        unfolded = {p.site.name for p in model.injector.prompt_sites if not p.fold.under_way}
    assert unfolded >= {f"body.{i}.a" for i in range(4)}


@pytest.mark.parametrize(
    ("size", "batch", "grad", "folds"),
    [(128, 1, False, True), (32, 1, False, False), (128, 2, False, False), (128, 1, True, False)],
)
def test_forward_folds_by_itself_where_it_pays(
    size: int, batch: int, grad: bool, folds: bool
) -> None:
    model, seen = wrapped("isotropic"), []
    layer = model.backbone.head
    weight = layer.weight
    layer.register_forward_pre_hook(lambda module, args: seen.append(module.weight is not weight))
    with torch.set_grad_enabled(grad):
        model(torch.rand(batch, 3, size, size))
    assert seen == [folds]


class Counting(TorchDispatchMode):
    """Counts the operations that compute something, each a launch on an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and "view" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_more_takes_no_operation_more_to_compose(
    dtype: torch.dtype, order: torch.memory_format
) -> None:
    counts = []
    for depth in (4, 12):
        net = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(depth)))
        model = wrap(net.to(dtype), perceiver=False).to(memory_format=order)
        assert len(model.sites.of("layer")) == depth
        with Counting() as counting, model.fold(oracle(1)):
            counts.append(counting.count)
    assert counts[0] == counts[1]


def test_many_passes_inside_one_fold_share_the_perception() -> None:
    model, images = wrapped("u_shape"), [torch.rand(1, 3, 32, 32) for _ in range(2)]
    seen = model.perceive(images[0])
    with torch.no_grad():
        expected = [model(image, perception=seen) for image in images]
    with model.fold(seen):
        for image, restored in zip(images, expected, strict=True):
            assert relative(model(image), restored) < ROUNDING
            assert relative(model(image, perception=seen), restored) < ROUNDING
        assert not model(images[0]).requires_grad


class Standardized(nn.Conv2d):
    """Convolves with its weight standardised, as many published layers do."""

    def forward(self, image: Tensor) -> Tensor:
        weight = F.normalize(self.weight.flatten(1), dim=1).view_as(self.weight)
        return F.conv2d(image, weight, self.bias, padding=self.padding)


class Activated(nn.Conv2d):
    """Ends in an activation."""

    def _conv_forward(self, *args: Any) -> Tensor:
        return F.gelu(super()._conv_forward(*args))


class ReadsElsewhere(nn.Module):
    """Goes back through the weight that it came by."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        features = self.body(F.gelu(self.head(image)))
        return F.conv_transpose2d(features, self.head.weight, padding=1)


def _around(middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), middle, nn.Conv2d(8, 3, 3, padding=1))


def _hooked_by_its_owner() -> nn.Module:
    net = _around(nn.Conv2d(8, 8, 3, padding=1))
    net[1].register_forward_hook(lambda module, args, output: 2 * output)
    return net


def _patched(name: str, forward: Any) -> nn.Module:
    """Its middle layer does something else, and no other of its class does."""
    net = _around(nn.Conv2d(8, 8, 3, padding=1))
    setattr(net[1], name, partial(forward, net[1]))
    return net


def _circular(layer: nn.Conv2d, image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(F.pad(image, [1] * 4, "circular"), weight, bias)


def _centered_before_each_pass() -> nn.Module:
    net = _around(nn.Conv2d(8, 8, 3, padding=1))

    def center(layer: Any, args: Any) -> None:
        layer.weight.data = layer.weight.data - layer.weight.data.mean((1, 2, 3), True)

    net[1].register_forward_pre_hook(center)
    return net


@pytest.mark.parametrize(
    "make",
    [
        lambda: _patched("forward", Standardized.forward),
        lambda: _patched("_conv_forward", _circular),
        _centered_before_each_pass,
        lambda: _around(Standardized(8, 8, 3, padding=1)),
        lambda: _around(Activated(8, 8, 3, padding=1)),
        _hooked_by_its_owner,
        ReadsElsewhere,
    ],
)
def test_layers_that_folding_would_change_run_by_their_hooks(make: Any) -> None:
    torch.manual_seed(0)
    model, image, seen = wrap(make(), perceiver=False), torch.rand(1, 3, 32, 32), oracle(1)
    moved(model.injector)
    assert len(model.sites.of("layer")) >= 2
    unfolded = model(image, perception=seen).detach()
    with model.fold(seen):
        assert relative(model(image), unfolded) < ROUNDING


def test_hooks_of_all_modules_keep_their_effect_and_what_they_saw() -> None:
    torch.manual_seed(0)
    net = _around(nn.Conv2d(8, 8, 3, padding=1))
    model, image, seen = wrap(net, perceiver=False), torch.rand(1, 3, 32, 32), oracle(1)
    moved(model.injector)
    kept: list[tuple[Tensor, Tensor]] = []

    def double(module: nn.Module, _: Any, output: Any) -> Any:
        if not isinstance(module, nn.Conv2d):
            return None
        kept.append((2 * output, (2 * output).clone()))
        return kept[-1][0]

    handle = register_module_forward_hook(double)
    try:
        unfolded = model(image, perception=seen).detach()
        with model.fold(seen):
            assert relative(model(image), unfolded) < ROUNDING
        with torch.no_grad():
            assert relative(model(image, perception=seen), unfolded) < ROUNDING
            model(image.repeat(2, 1, 1, 1), perception=oracle(2))
    finally:
        handle.remove()
    assert kept
    assert all(torch.equal(output, then) for output, then in kept)


def test_counting_operations_counts_what_runs_folded() -> None:
    model, image, seen = wrapped("isotropic"), torch.rand(1, 3, 32, 32), oracle(1)
    with FlopCounterMode(display=False) as bare, model.disabled():
        model(image)
    with FlopCounterMode(display=False) as unfolded:
        model(image, perception=seen)
    with model.fold(seen), FlopCounterMode(display=False) as folded:
        model(image)
    added = unfolded.get_total_flops() - bare.get_total_flops()
    assert folded.get_total_flops() - bare.get_total_flops() < added / 10


def test_a_network_that_reads_weights_elsewhere_is_found_out_and_left_as_it_was() -> None:
    net = ReadsElsewhere()
    before = state(net)
    assert not plan_sites(net).folds
    assert state(net) == before
    assert plan_sites(_around(nn.Conv2d(8, 8, 1))).folds


def test_bare_is_not_to_be_had_inside_a_fold_nor_are_weights_to_be_saved(tmp_path: Path) -> None:
    model = wrapped("isotropic")
    with model.fold(oracle(1)):
        for use in (model.disabled().__enter__, lambda: model.save_pretrained(tmp_path / "it")):
            with pytest.raises(PerceptionError, match=r"fold\(\) is under way already"):
                use()
    assert not (tmp_path / "it").exists()
    model.save_pretrained(tmp_path / "it")


def test_folds_do_not_nest_and_take_one_perception() -> None:
    model, seen = wrapped("isotropic"), oracle(1)
    with model.fold(seen):
        with pytest.raises(PerceptionError, match="under way"), model.fold(seen):
            pass
        with pytest.raises(PerceptionError, match="another perception"):
            model(torch.rand(1, 3, 16, 16), perception=oracle(1, seed=2))
        model(torch.rand(1, 3, 16, 16))
    with pytest.raises(PerceptionError, match="one image, and this is of 2"), model.fold(oracle(2)):
        pass


def _in_threads(work: Any, count: int) -> list[Any]:
    results: list[Any] = [None] * count
    start = threading.Barrier(count)

    def run(index: int) -> None:
        start.wait()
        results[index] = work(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("size", [32, 128])
def test_threads_take_turns(size: int) -> None:
    """Folded (128 px) and unfolded: every thread gets what it would get alone."""
    model, images = wrapped("u_shape"), [torch.rand(1, 3, size, size) for _ in range(4)]

    @torch.no_grad()
    def work(index: int) -> list[Tensor]:
        return [model(images[index]) for _ in range(8)]

    alone = [work(index)[0] for index in range(4)]
    for expected, results in zip(alone, _in_threads(work, 4), strict=True):
        assert all(torch.equal(result, expected) for result in results)


def test_disabling_in_one_thread_waits_for_passes_in_others() -> None:
    model, image = wrapped("isotropic"), torch.rand(1, 3, 16, 16)
    inside, leave = threading.Event(), threading.Event()

    def disable() -> None:
        with model.disabled():
            inside.set()
            leave.wait(5)

    thread = threading.Thread(target=disable)

    def while_running(module: object, args: object) -> None:
        if not thread.ident:
            thread.start()
            inside.wait(0.5)

    with torch.no_grad():
        expected = model(image)
        model.backbone.body[0].register_forward_pre_hook(while_running)
        actual = model(image)
        leave.set()
        thread.join()
    assert torch.equal(actual, expected)


def test_a_compiled_model_runs_inside_a_fold() -> None:
    model, image = wrapped("isotropic"), CASES["isotropic"].images(2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for seed in range(3):
        with model.fold(oracle(1, seed)):
            assert relative(compiled(image), model(image)) < ROUNDING


def test_a_compiled_model_takes_no_other_perception_inside_a_fold() -> None:
    model, image = wrapped("isotropic"), CASES["isotropic"].images(2)
    compiled = torch.compile(model, backend="eager")
    given: tuple[dict[str, Any], ...] = (
        {"perception": oracle(1, 5)},
        {"adapter_names": ["no"] * 2},
    )
    with model.fold(oracle(1)):
        for options in given:
            with pytest.raises(PerceptionError, match="another perception, or names of adapters"):
                compiled(image, **options)


@torch.no_grad()
def test_one_perception_at_a_time() -> None:
    model, image = wrapped("isotropic"), CASES["isotropic"].images(2)
    with model.injector.conditioned(oracle(1)):
        first = model.backbone(image)
        for other in (model.injector.conditioned(oracle(1, 5)), model.fold(oracle(1, 5))):
            with pytest.raises(PerceptionError, match="another perception already"), other:
                pass
        assert torch.equal(model.backbone(image), first)
    with model.fold(oracle(1)):
        folded = model(image)
        inner = model.injector.conditioned(oracle(1, 5))
        with pytest.raises(PerceptionError, match="another perception already"), inner:
            pass
        assert torch.equal(model(image), folded)


class Dropping(nn.Module):
    """Drops features, and takes its time, so that threads meet in it."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.drop = nn.Conv2d(3, 8, 3, padding=1), nn.Dropout(0.5)
        self.tail = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        features = self.drop(self.head(image))
        time.sleep(0.1)
        return self.tail(features)


def test_threads_that_restore_leave_modes_alone() -> None:
    model, image = wrap(Dropping(), perceiver=False).train(), torch.rand(3, 24, 24)
    expected = model.restore(image)

    def work(index: int) -> Tensor:
        time.sleep(0.05 * index)  # the second comes while the first restores
        return model.restore(image)

    assert all(torch.equal(result, expected) for result in _in_threads(work, 2))
    assert model.training
    assert model.backbone.drop.training


def test_switching_adapters_waits_for_passes_in_other_threads() -> None:
    model, image = wrap(Dropping(), perceiver=False).eval(), torch.rand(1, 3, 24, 24)
    moved(model.injector)
    model.add_adapter("other", injector_like(model, seed=3))
    expected = dict.fromkeys(("default", "other"))
    for name in expected:
        model.set_adapter(name)
        expected[name] = model(image).detach()

    def work(index: int) -> bool:
        for turn in range(4):
            if index:
                time.sleep(0.05)  # the other thread is in the middle of a pass
                model.set_adapter("default" if turn % 2 else "other")
                continue
            restored = model(image)
            if not any(torch.equal(restored, value) for value in expected.values()):
                return False
        return True

    assert all(_in_threads(work, 2))
