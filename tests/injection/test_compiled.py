"""torch.compile: the whole model in one graph, perception included."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from wrapping import moved, oracle, relative, wrapped
from zoo import CASES

from perceive_adapter import PerceiveModel, wrap

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
