"""Scripts that say ``torch.set_default_device("cuda")``, here with a device that has no values.

What is made on the meta device by mistake cannot be read, so that nothing passes by luck.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from restoring import FULL, Net, data
from small import folds, perceiver, photos

from perceive_adapter import DifficultyAdaptiveLoss, PerceiveModel, wrap
from perceive_adapter.data import DEGRADATIONS, FAMILIES, degrade
from perceive_adapter.data.triplets import Blend, Milder, Mixed
from perceive_adapter.evaluation.cost import measure_cost
from perceive_adapter.losses import RestorationObjective
from perceive_adapter.perceiver.audit import audit
from perceive_adapter.training.loop import Schedule, seeded
from perceive_adapter.training.pretrain import TinyTowers, draw_batch
from perceive_adapter.training.restoration import RestorationStep
from perceive_adapter.training.stage1 import Stage1, train_perceiver

IMAGE = np.random.default_rng(0).integers(0, 256, (150, 131, 3), np.uint8)


@contextmanager
def default_elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def wrapped(net: Net) -> PerceiveModel:
    torch.manual_seed(0)
    return wrap(net)


def test_a_network_is_wrapped_used_saved_and_loaded(tmp_path: Path) -> None:
    net, tensor, loss = Net(), torch.rand(1, 3, 64, 64), DifficultyAdaptiveLoss()
    model = wrapped(net)
    torch.nn.init.normal_(next(model.injector.layers.parameters()), std=0.1)
    expected = model.restore(IMAGE, tile=96)
    weights = model.injector.state_dict()
    model.unwrap()
    with default_elsewhere():
        model = wrapped(net)
        model.injector.load_state_dict(weights)
        np.testing.assert_array_equal(model.restore(IMAGE, tile=96), expected)
        model(tensor).mean().backward()
        model.add_adapter("other")
        assert measure_cost(model, 64).bare > 0
        model.save_pretrained(tmp_path)
        assert model.unwrap() is net
        loaded = wrap(net, tmp_path)
        np.testing.assert_array_equal(loaded.restore(IMAGE, tile=96), expected)
        assert loss(tensor, tensor / 2, tensor / 3, [tensor / 4]) > 0


def test_adapters_start_from_the_same_weights() -> None:
    expected = wrapped(Net()).injector.state_dict()
    net = Net()
    with default_elsewhere():
        found = wrapped(net).injector.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_images_are_degraded(name: str) -> None:
    image = photos()[0][None] / 255
    expected = degrade(image, name, 0.5, torch.Generator().manual_seed(0))
    with default_elsewhere():
        found = degrade(image, name, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(found, expected)


def test_both_stages_train() -> None:
    net, samples, samplers = Net(), data("rain", "low_light+jpeg"), folds()
    expected, objective = samples[3], RestorationObjective(FULL)
    towers = TinyTowers()
    stage1 = Stage1(schedule=Schedule(2, 1e-3), scenes=4, sides=(32,))
    with default_elsewhere():
        for part, other in zip(samples[3], expected, strict=True):
            torch.testing.assert_close(part, other, equal_nan=True)
        model = wrapped(net)
        RestorationStep(model, objective)(samples.probe(1))["total"].backward()
        trained = perceiver(degradations=FAMILIES)
        train_perceiver(trained, samplers, recipe=stage1, mediums=[Mixed([Blend(), Milder()])])
        audit(trained, photos()[:1], degradations=("rain",), patch=32)
        batch = draw_batch(samplers[0], 12, 32, towers.tokenize, seeded(0, 0))
    assert {part.device.type for part in batch} == {"cpu"}
    assert towers.loss(batch).isfinite()  # open_clip itself counts texts on the default device
    assert trained.trained
    for module in (model, trained):
        assert all(value.isfinite().all() for value in module.state_dict().values())
