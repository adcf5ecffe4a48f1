"""Folding: with one perception a gated branch is a plain weight, and nobody's parameter changes."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from wrapping import oracle, relative, wrapped
from zoo import CASES

from perceive_adapter import PerceiveModel, PerceptionError

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
    assert not any(prompt.folded for prompt in model.injector.prompt_sites)
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
        unfolded = {p.site.name for p in model.injector.prompt_sites if not p.folded}
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
