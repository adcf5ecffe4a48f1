"""Training: gradients reach every prompt, and nothing but prompts changes."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from wrapping import KINDS, PAIRS, injector_like, moved, oracle, wrapped
from zoo import CASES, REAL, Case, Isotropic, WritesInEval

from perceive_adapter import BackboneError, PerceiveModel, PerceptionError, wrap


@pytest.mark.parametrize(("case", "kind"), PAIRS)
def test_gradients_reach_every_parameter_within_three_steps(case: str, kind: str) -> None:
    zoo = CASES[case]
    model = wrapped(zoo, trained=False, config=KINDS[kind])
    waiting = {name for name, p in model.named_parameters() if p.requires_grad}
    waiting = {name for name in waiting if not (case == "zero_scale" and "hidden" in name)}
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        (zoo.run(model, zoo.images(2)) - 0.3).square().mean().backward()
        optimizer.step()
        waiting -= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert waiting == set()


def _train(model: PerceiveModel, zoo: object, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=0.01, weight_decay=0.1)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        zoo.run(model, zoo.images(2, seed=step)).square().mean().backward()
        optimizer.step()


TRAINED = {name: CASES[name] for name in ("u_shape", "mixed", "normed", "tied", "reparametrized")}
TRAINED |= REAL | {"writes_in_eval": Case(WritesInEval)}


@pytest.mark.parametrize("case", TRAINED)
def test_only_the_adapter_changes(case: str) -> None:
    model = wrapped(TRAINED[case], trained=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    _train(model, TRAINED[case])
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == trainable
    assert {name.split(".")[0] for name in changed} == {"adapters"}
    assert all(p.grad is None for p in model.backbone.parameters())


def test_train_leaves_statistics_alone_and_lets_dropout_drop() -> None:
    model = wrapped("mixed").train()
    norm, dropout = model.backbone.layers[1], model.backbone.layers[3]
    assert isinstance(norm, nn.BatchNorm2d)
    assert (model.training, norm.training, dropout.training) == (True, False, True)
    model.eval()
    assert not any(module.training for module in model.modules())


def test_training_and_eval_mode_agree_where_layers_are_merged() -> None:
    model = wrapped("reparametrized")
    image = CASES["reparametrized"].images(2)
    restored = model.train()(image)
    assert torch.equal(restored, model.eval()(image))
    assert not model.backbone.body[0].training


def test_modes_follow_the_adapter_that_is_set() -> None:
    other = wrapped("reparametrized").injector
    other.detach()
    model = wrapped("reparametrized", sites=["layer:head"]).train()
    assert all(block.training for block in model.backbone.body)
    model.add_adapter("merged", other)
    model.set_adapter("merged")
    assert not any(block.training for block in model.backbone.body)


def test_what_is_unfrozen_trains_in_training_mode() -> None:
    model = wrapped("reparametrized")
    model.unfreeze("body.0.*.weight")
    before = {name: p.clone() for name, p in model.backbone.named_parameters()}
    _train(model, CASES["reparametrized"])
    after = dict(model.backbone.named_parameters())
    changed = {name for name in after if not after[name].equal(before[name])}
    assert {"body.0.wide.weight", "body.0.point.weight"} <= changed
    assert [block.training for block in model.train().backbone.body] == [True, False, False]


def test_unfrozen_parameters_train_and_others_do_not() -> None:
    model = wrapped("u_shape")
    names = model.unfreeze("ending.*", "intro.weight")
    assert names == ["ending.weight", "ending.bias", "intro.weight"]
    assert model.status().unfrozen == ("intro.weight", "ending.weight", "ending.bias")
    before = {name: p.clone() for name, p in model.backbone.named_parameters()}
    _train(model, CASES["u_shape"])
    after = dict(model.backbone.named_parameters())
    assert {name for name in after if not after[name].equal(before[name])} == set(names)


def _gradients(model: PerceiveModel, loss: Callable[[PerceiveModel], torch.Tensor]) -> torch.Tensor:
    loss(model).backward()
    prompts = [*model.injector.levels.parameters(), *model.injector.layers.parameters()]
    return torch.cat([p.grad.flatten() for p in prompts])


def _checkpointed(checkpointing: bool, sites: str | None = None) -> PerceiveModel:
    net = CASES["checkpointed"].net()
    net.checkpointing = checkpointing
    torch.manual_seed(0)
    model = wrap(net, perceiver=False, sites=sites)
    moved(model.injector)
    return model


def _one(model: PerceiveModel) -> torch.Tensor:
    return model(CASES["isotropic"].images(2), perception=oracle(2)).square().mean()


def _two(model: PerceiveModel) -> torch.Tensor:
    image = CASES["isotropic"].images(2)
    return sum(model(image, perception=oracle(2, seed)).square().mean() for seed in (1, 2))


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    expected = _gradients(_checkpointed(False), _one)
    torch.testing.assert_close(_gradients(_checkpointed(True), _one), expected)


def test_two_forward_passes_before_one_backward_pass() -> None:
    expected = _gradients(_checkpointed(False), _two)
    torch.testing.assert_close(_gradients(_checkpointed(True), _two), expected)


def test_a_pass_without_gradient_in_between_changes_nothing() -> None:
    expected = _gradients(_checkpointed(False), _one)
    model = _checkpointed(True)
    loss = _one(model)
    with torch.no_grad():
        model(CASES["isotropic"].images(2, seed=5), perception=oracle(2, 9))
    loss.backward()
    prompts = [*model.injector.levels.parameters(), *model.injector.layers.parameters()]
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in prompts]), expected)


def test_a_pass_that_is_given_up_does_not_count() -> None:
    expected = _gradients(_checkpointed(False), _one)
    model = _checkpointed(True)
    loss = _one(model)
    del loss
    torch.testing.assert_close(_gradients(model, _one), expected)


def _while_another(
    model: PerceiveModel, context: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Run the backward pass while another thread is inside a context of the model's."""
    loss = _one(model)
    inside, done = threading.Event(), threading.Event()

    def stay() -> None:
        with context():
            inside.set()
            done.wait(60)

    other = threading.Thread(target=stay)
    other.start()
    try:
        assert inside.wait(60)
        loss.backward()
    finally:
        done.set()
        other.join()


@pytest.mark.parametrize("what", ["conditioned", "disabled"])
def test_activation_checkpointing_while_another_thread_restores(what: str) -> None:
    expected = _gradients(_checkpointed(False), _one)
    model = _checkpointed(True)
    other = partial(model.injector.conditioned, oracle(1, 9))
    _while_another(model, other if what == "conditioned" else model.disabled)
    prompts = [*model.injector.levels.parameters(), *model.injector.layers.parameters()]
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in prompts]), expected)


def test_activation_checkpointing_while_another_thread_folds_is_refused() -> None:
    model = _checkpointed(True)
    with pytest.raises(PerceptionError, match="another thread restores"):
        _while_another(model, partial(model.fold, oracle(1, 9)))


def _unfrozen_alone(checkpointing: bool, sites: str | None = None) -> PerceiveModel:
    model = _checkpointed(checkpointing, sites)
    model.adapters.requires_grad_(False)
    model.unfreeze("**")
    return model


def _gradients_of_backbone(model: PerceiveModel, loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.backbone.parameters()])


def test_a_frozen_adapter_under_activation_checkpointing() -> None:
    plain, saving = _unfrozen_alone(False), _unfrozen_alone(True)
    expected = _gradients_of_backbone(plain, _one(plain))
    torch.testing.assert_close(_gradients_of_backbone(saving, _one(saving)), expected)
    plain, saving = _unfrozen_alone(False), _unfrozen_alone(True)
    expected = _gradients_of_backbone(plain, _two(plain))
    torch.testing.assert_close(_gradients_of_backbone(saving, _two(saving)), expected)


@pytest.mark.parametrize("names", [["other", "other"], ["default", "other"], [None, "other"]])
def test_adapters_by_image_under_activation_checkpointing(names: list[str | None]) -> None:
    def gradients(checkpointing: bool) -> torch.Tensor:
        model = _checkpointed(checkpointing)
        model.add_adapter("other", injector_like(model, seed=3))
        model.adapters.requires_grad_(True)
        _one(model).backward()  # so that a condition of an earlier pass is there to be mistaken
        model.zero_grad()
        images = CASES["isotropic"].images(2)
        model(images, perception=oracle(2), adapter_names=names).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.testing.assert_close(gradients(True), gradients(False))


def test_reentrant_checkpointing_is_refused_where_it_would_lose_the_gradient() -> None:
    model = _checkpointed(True)
    model.backbone.reentrant = True
    with pytest.raises(BackboneError, match="use_reentrant=False, or not at all"):
        _one(model)
    with torch.no_grad():
        _one(model)
    model.backbone.reentrant = False
    _one(model).backward()


def test_a_disabled_pass_under_activation_checkpointing_is_bare() -> None:
    def gradients(checkpointing: bool) -> torch.Tensor:
        model = _unfrozen_alone(checkpointing)
        with model.disabled():
            return _gradients_of_backbone(model, _one(model))

    torch.testing.assert_close(gradients(True), gradients(False))
    model = _unfrozen_alone(True)
    with model.disabled():
        loss = _one(model)
    with pytest.raises(BackboneError, match=r"stay inside disabled\(\) for both"):
        loss.backward()


@pytest.mark.parametrize("sites", [None, "layer:body.**"])
def test_reentrant_checkpointing_of_a_frozen_adapter(sites: str | None) -> None:
    """It is right, or refused where only the blocks that run again know of the pass."""
    plain, saving = _unfrozen_alone(False, sites), _unfrozen_alone(True, sites)
    saving.backbone.reentrant = True
    if sites is None:
        expected = _gradients_of_backbone(plain, _one(plain))
        torch.testing.assert_close(_gradients_of_backbone(saving, _one(saving)), expected)
    else:
        with pytest.raises(BackboneError, match="use_reentrant=False, or not at all"):
            _one(saving).backward()


class PartlyWithoutGradient(Isotropic):
    """Runs its head as if it had been frozen for good."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = self.head(image)
        return image + self.tail(self.body(features))


def test_a_part_that_the_network_runs_without_gradient_is_its_own_affair() -> None:
    model = wrap(PartlyWithoutGradient(), perceiver=False)
    moved(model.injector)
    model(CASES["isotropic"].images(2)).square().mean().backward()
    grads = {n: p.grad for n, p in model.injector.layers.named_parameters()}
    assert any(g is not None and g.any() for g in grads.values())


def test_forward_passes_that_are_done_with_do_not_count() -> None:
    model = _checkpointed(True)
    kept = _one(model)
    kept.backward()  # consumed, though its graph is still referenced
    _two(model)  # dropped
    _one(model).backward()


@pytest.mark.parametrize("names", [None, ["default", None]])
def test_results_that_are_kept_do_not_count(names: list[str] | None) -> None:
    def gradients(checkpointing: bool) -> torch.Tensor:
        model, images = _checkpointed(checkpointing), CASES["isotropic"].images(2)
        kept = [model(images, perception=oracle(2, seed), adapter_names=names) for seed in (5, 6)]
        model(images, perception=oracle(2), adapter_names=names).square().mean().backward()
        kept[0].square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.testing.assert_close(gradients(True), gradients(False))


def test_half_precision_backbones_train_with_full_precision_prompts() -> None:
    net = CASES["u_shape"].net().to(torch.bfloat16)
    model = wrap(net, perceiver=False)
    assert {p.dtype for p in model.trainable_parameters()} == {torch.float32}
    for _ in range(2):
        loss = model(CASES["u_shape"].images(2).bfloat16()).float().square().mean()
        loss.backward()
        torch.optim.SGD(model.trainable_parameters(), 0.1).step()
    assert all(p.grad.isfinite().all() for p in model.trainable_parameters())


def test_autocast_trains() -> None:
    model = wrapped("u_shape")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(CASES["u_shape"].images(2)).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trainable_parameters())


def test_the_status_counts_what_trains() -> None:
    model = wrapped("nafnet")
    state = model.status()
    assert state.trainable == sum(p.numel() for p in model.trainable_parameters())
    assert state.trainable == model.sites.parameters
    assert state.total == sum(p.numel() for p in model.parameters())
    assert (state.adapters, state.active, state.enabled) == (("default",), "default", True)
    with model.disabled():
        assert not model.status().enabled


def test_the_parameters_are_printed_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    wrapped("isotropic").print_trainable_parameters()
    wrapped("zero_scale").print_trainable_parameters()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("trainable: ")
    assert "4 level and 10 layer sites" in lines[0]
    assert "blocked by frozen zero scales" in lines[1]
    assert len(lines) == 2
