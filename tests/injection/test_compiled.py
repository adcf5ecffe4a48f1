"""torch.compile: the whole model in one graph, perception included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.modules.module import register_module_forward_hook
from wrapping import injector_like, moved, oracle, relative, wrapped
from zoo import CASES

from perceive_adapter import PerceiveModel, Perception, wrap

NETWORKS = ("nafnet", "restormer", "swinir")


def perceiving(case: str) -> PerceiveModel:
    """A network with the bundled perceiver inside."""
    torch.manual_seed(0)
    model = wrap(CASES[case].net())
    moved(model.injector)
    return model


@pytest.mark.parametrize("case", NETWORKS)
def test_one_frame_without_a_graph_break(case: str) -> None:
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("eager")
    model = perceiving(case)
    compiled = torch.compile(model, backend=graphs)  # a break would make further frames
    with torch.no_grad():
        for seed in (1, 2):
            image = CASES[case].images(1, 64, seed)
            assert relative(compiled(image), model(image)) < 1e-5
    assert graphs.frame_count == 1


FEWER = getattr(torch.compiler, "skip_guard_on_inbuilt_nn_modules_unsafe", None)


@pytest.mark.skipif(FEWER is None, reason="since torch 2.8")
@torch.no_grad()
def test_what_the_model_is_told_is_noticed_where_torchs_layers_have_no_guards() -> None:
    torch._dynamo.reset()
    model, image = wrapped("isotropic"), CASES["isotropic"].images(1, 64)
    model.add_adapter("other", injector_like(model, seed=3))

    def eager(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        return graph.forward

    options = {"guard_filter_fn": FEWER}
    compiled = torch.compile(model, backend=eager, fullgraph=True, options=options)
    restored = []
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        restored.append(compiled(image))
        assert relative(restored[-1], model(image)) < 1e-5
        with model.disabled():
            assert relative(compiled(image), model(image)) < 1e-5
    assert relative(restored[0], restored[1]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", NETWORKS)
def test_inductor_restores_the_same(case: str) -> None:
    torch._dynamo.reset()
    model, image = perceiving(case), CASES[case].images(1, 64)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        expected = model(image)
        assert relative(compiled(image), expected) < 1e-4
    with torch.no_grad():
        moved(model.injector, seed=3)
        assert relative(model(image), expected) > 1e-4
        assert relative(compiled(image), model(image)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", ["restormer", "swinir"])  # a NAFNet does not, bare either
def test_inductor_trains_the_same(case: str) -> None:
    torch._dynamo.reset()
    model, images, seen = wrapped(case), CASES[case].images(2, 64), oracle(2)
    model(images, perception=seen).square().mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True)
    compiled(images, perception=seen).square().mean().backward()
    for name, value in expected.items():
        actual = model.get_parameter(name).grad
        torch.testing.assert_close(actual, value, rtol=1e-2, atol=1e-5 * float(value.abs().max()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", NETWORKS)
def test_cuda_graphs_restore_the_same(case: str) -> None:
    torch._dynamo.reset()
    model, image = perceiving(case).cuda(), CASES[case].images(1, 64).cuda()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for seed in (1, 2):
            moved(model.injector, seed)
            expected = model(image)
            for _ in range(3):  # the second records the graph, the third replays it
                assert relative(compiled(image), expected) < 1e-3


def operations(model: torch.nn.Module, *args: torch.Tensor, **known: Perception) -> Counter[str]:
    """What is left of a model where nobody uses the result of an operation."""
    found: Counter[str] = Counter()

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        found.update(str(node.target) for node in graph.graph.nodes)
        found["results"] = len(graph.graph.output_node().args[0])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    torch.compile(model, backend=aot_autograd(fw_compiler=count), fullgraph=True)(*args, **known)
    return found


@torch.no_grad()
def test_layers_run_once_with_folded_weights_for_one_image() -> None:
    bare, image = CASES["nafnet"].net(), CASES["nafnet"].images(1, 64)
    convolutions = "aten.convolution.default"
    expected = operations(bare, image)[convolutions]
    model = wrapped("nafnet")
    moved(model.injector)
    folded = operations(model, image, perception=oracle(1))
    assert folded[convolutions] == expected
    assert folded["results"] == 1  # folded weights are not kept
    beside = operations(model, CASES["nafnet"].images(2, 64), perception=oracle(2))
    assert beside[convolutions] > expected
    assert beside["results"] == 1


@pytest.mark.parametrize("images", [1, 2])
@torch.no_grad()
def test_hooks_of_others_keep_their_effect(images: int) -> None:
    torch._dynamo.reset()
    model, image, seen = wrapped("nafnet"), CASES["nafnet"].images(images, 64), oracle(images)
    moved(model.injector)
    named = dict(model.backbone.named_modules())
    layers = [named[name] for name in model.status().layers]
    before = model(image, perception=seen)
    for layer in layers[::3]:
        layer.register_forward_hook(lambda _, args, output: 1.1 * output)
        layer._forward_hooks.move_to_end(next(iter(layer._forward_hooks)))  # before ours
    expected = model(image, perception=seen)
    assert relative(expected, before) > 1e-3
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert relative(compiled(image, perception=seen), expected) < 1e-5


@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks")
@pytest.mark.parametrize("images", [1, 2])
@torch.no_grad()
def test_hooks_of_all_modules_keep_their_effect(images: int) -> None:
    torch._dynamo.reset()
    model, image, seen = wrapped("nafnet"), CASES["nafnet"].images(images, 64), oracle(images)
    moved(model.injector)
    before = model(image, perception=seen)
    handle = register_module_forward_hook(louder)
    try:
        expected = model(image, perception=seen)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        found = compiled(image, perception=seen)
    finally:
        handle.remove()
    assert relative(expected, before) > 1e-3
    assert relative(found, expected) < 1e-5


def louder(module: nn.Module, _: Any, output: Any) -> Tensor | None:
    """Hook of all modules that changes what convolutions give."""
    return 1.1 * output if isinstance(module, nn.Conv2d) else None


@torch.no_grad()
def test_an_inactive_adapter_on_the_same_layers_changes_nothing() -> None:
    torch._dynamo.reset()
    model, image, seen = wrapped("nafnet"), CASES["nafnet"].images(1, 64), oracle(1)
    moved(model.injector)
    model.add_adapter("other")
    moved(model.adapters.named("other"), seed=5)
    expected = model(image, perception=seen)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert relative(compiled(image, perception=seen), expected) < 1e-5
    model.set_adapter("other")
    assert relative(model(image, perception=seen), expected) > 1e-3
    assert relative(compiled(image, perception=seen), model(image, perception=seen)) < 1e-5
