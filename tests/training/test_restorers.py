"""Half-trained restorers: one for each fold, each better than doing nothing."""

from pathlib import Path

import pytest
import torch
from small import folds
from torch import Tensor, nn

from perceive_adapter.data import KINDS
from perceive_adapter.data.samples import Samples, degrade_each, draw_severities
from perceive_adapter.data.triplets import Restored, Scene
from perceive_adapter.errors import CheckpointError
from perceive_adapter.training.loop import Schedule, seeded
from perceive_adapter.training.restorers import SmallRestorer, train_restorers


@pytest.fixture(scope="module")
def trained() -> tuple[SmallRestorer, ...]:
    return train_restorers(folds(), schedule=Schedule(20, 3e-3, 5e-4, warmup=3))


def crops(fold: int) -> Samples:
    """Damaged crops (42, 3, 48, 48) of a fold's photographs."""
    generator = seeded(99, fold)
    drawn = [severities for severities in draw_severities(48, generator, low=0.5) if severities]
    return degrade_each(folds()[fold].draw(len(drawn), 48, generator), drawn, generator)


def psnr(image: Tensor, clean: Tensor) -> float:
    error = (image.clamp(0, 1) - clean).square().mean((1, 2, 3))
    return -10 * error.log10().mean().item()


@pytest.mark.parametrize("fold", [0, 1])
def test_each_improves_the_photographs_that_it_never_saw(
    trained: tuple[SmallRestorer, ...], fold: int
) -> None:
    samples = crops(fold)
    restored = trained[1 - fold](samples.degraded).clamp(0, 1)
    damage = (samples.degraded - samples.clean).abs().mean()
    assert (restored - samples.clean).abs().mean() < 0.93 * damage
    # Light comes back first.
    dark = samples.severity[:, KINDS.index("low_light")] > 0
    clean = samples.clean[dark]
    assert psnr(restored[dark], clean) > psnr(samples.degraded[dark], clean) + 1


def test_two_folds_make_two_restorers_that_are_frozen(
    trained: tuple[SmallRestorer, ...],
) -> None:
    assert len(trained) == 2
    image = crops(0).degraded
    assert (trained[0](image) - trained[1](image)).abs().max() > 0.02
    for restorer in trained:
        assert not restorer.training
        assert not any(parameter.requires_grad for parameter in restorer.parameters())


def test_serve_as_a_medium(trained: tuple[SmallRestorer, ...]) -> None:
    scene = Scene(crops(0).clean[:1], {"low_light": 0.6}, seed=1)
    degraded, half = scene.degraded(), Restored(trained)(scene, scene.degraded())
    assert half.shape == degraded.shape
    assert psnr(degraded, scene.clean) + 6 < psnr(half, scene.clean) < 40


def test_the_seed_decides_and_the_global_generator_is_spared(tmp_path: Path) -> None:
    schedule = Schedule(1, 1e-3)
    state = torch.get_rng_state()
    first = train_restorers(folds(), schedule=schedule, folder=tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    again = train_restorers(folds(), schedule=schedule)
    other = train_restorers(folds(), schedule=schedule, seed=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["restorer-0.pt", "restorer-1.pt"]
    resumed = train_restorers(folds(), schedule=schedule, folder=tmp_path)
    image = crops(0).degraded
    for fold in (0, 1):
        assert torch.equal(first[fold](image), again[fold](image))
        assert torch.equal(first[fold](image), resumed[fold](image))
        assert not torch.equal(first[fold](image), other[fold](image))


def test_checkpoints_of_another_seed_or_of_other_photographs_are_refused(tmp_path: Path) -> None:
    settings = {"schedule": Schedule(1, 1e-3), "folder": tmp_path}
    train_restorers(folds(), **settings)
    with pytest.raises(CheckpointError, match=r"restorer-0\.pt.* seed=0: expected seed=7\."):
        train_restorers(folds(), seed=7, **settings)
    with pytest.raises(CheckpointError, match=r"photographs='\w+': expected photographs='\w+'"):
        train_restorers(folds()[::-1], **settings)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 4), (33, 48)])
def test_any_size_and_untrained_it_does_nothing(size: tuple[int, int]) -> None:
    image = torch.rand(2, 3, *size)
    restorer = SmallRestorer()
    assert torch.equal(restorer(image), image)
    for parameter in restorer.parameters():
        nn.init.normal_(parameter, std=0.1)
    restored = restorer(image)
    assert restored.shape == image.shape
    assert restored.isfinite().all()
    assert (restored != image).any()
