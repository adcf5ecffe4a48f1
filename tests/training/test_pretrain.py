"""Pretraining of perceive-tiny's towers, for a few small steps."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small import folds, photos
from torch import Tensor

from perceive_adapter.data import KINDS
from perceive_adapter.data.samples import (
    CropSampler,
    as_file,
    as_stored,
    cut,
    degrade_each,
    draw_severities,
    with_surroundings,
)
from perceive_adapter.errors import CheckpointError
from perceive_adapter.training.captions import WORDS
from perceive_adapter.training.loop import Schedule, seeded, train
from perceive_adapter.training.pretrain import (
    ARCHITECTURE,
    TinyTowers,
    contrast,
    draw_samples,
    pretrain,
)


def loss_of(towers: TinyTowers, sampler: CropSampler, step: int) -> Tensor:
    generator = seeded(0, step)
    return towers.loss(draw_samples(sampler, 32, 32, generator), generator)


def test_loss_falls() -> None:
    towers, sampler, losses = TinyTowers().train(), folds()[0], []

    def loss_at(step: int) -> Tensor:
        loss = loss_of(towers, sampler, step)
        losses.append(loss.item())
        return loss

    train({"towers": towers}, loss_at, Schedule(15, 2e-3, warmup=3))
    assert all(torch.tensor(losses).isfinite())
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])


def test_every_parameter_gets_a_gradient() -> None:
    towers = TinyTowers().train()
    loss_of(towers, folds()[0], 0).backward()
    lacking = [name for name, p in towers.named_parameters() if p.grad is None]
    assert lacking == []


def test_the_seed_decides() -> None:
    state = torch.get_rng_state()
    schedule = Schedule(1, 1e-3)
    first, again, other = (pretrain(photos(), schedule=schedule, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.training
    weights = again.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first.state_dict().items())
    image = folds()[0].draw(2, 32, seeded(0, 0))
    assert not torch.equal(first.embed(image), other.embed(image))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    settings = {"schedule": Schedule(1, 1e-3), "checkpoint": tmp_path / "pretrain.pt"}
    pretrain(photos(), **settings)
    with pytest.raises(CheckpointError, match=r"seed=0: expected seed=1"):
        pretrain(photos(), seed=1, **settings)
    with pytest.raises(CheckpointError, match=r"photographs='\w+': expected photographs="):
        pretrain(photos()[:2], **settings)


def test_samples_are_as_files_hold_them_and_labelled() -> None:
    samples = draw_samples(folds()[0], 144, 32, seeded(0, 0))
    assert samples.degraded.shape == (144, 3, 32, 32)
    assert samples.severity.shape == (144, len(KINDS))
    levels = samples.degraded * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert 0 <= samples.degraded.min() < samples.degraded.max() <= 1
    assert 0 <= samples.severity.min() < samples.severity.max() <= 1
    clean = (samples.severity == 0).all(dim=1)
    assert clean.sum() == 16
    changed = (samples.degraded - samples.clean).abs().amax(dim=(1, 2, 3)) * 255
    rounded = changed[clean] < 0.51
    assert 6 <= rounded.sum() <= 15  # the others were stored as JPEG
    assert changed[clean].max() < 60
    assert changed[~clean].min() > 0.51


def test_what_is_half_restored_is_labelled_in_proportion() -> None:
    generator = seeded(0, 0)
    photos = folds()[0].draw(64, with_surroundings(32), generator)
    whole = degrade_each(photos, draw_severities(64, generator), generator)
    for _ in range(2):
        torch.rand(64, generator=generator)  # how much remains, and of which
    coded = (as_stored(photos, generator) - as_file(photos)).flatten(1).any(dim=1)
    clean, degraded = cut((photos, whole.degraded), 32, generator)
    samples = draw_samples(folds()[0], 64, 32, seeded(0, 0))
    damaged = whole.severity.any(dim=1)
    damaged &= ~coded
    share = (samples.severity.sum(1) / whole.severity.sum(1))[damaged]
    damage, left = (
        (one - clean)[damaged].flatten(1).norm(dim=1) for one in (degraded, samples.degraded)
    )
    torch.testing.assert_close(left / damage, share, atol=0.05, rtol=0)
    assert 1 <= (share < 1).sum() <= 20
    assert share.min() >= 0.2
    assert share[share < 1].max() <= 0.7 + 1e-6


def test_contrast_takes_every_caption_of_equal_content_for_right() -> None:
    units = F.normalize(torch.randn(3, 8, generator=seeded(0, 0)), dim=1)
    image = text = units[[0, 1, 1, 2]]
    same = torch.tensor([[0, 1], [2, 0], [2, 0], [3, 3]])
    different = torch.tensor([[0, 1], [2, 0], [2, 1], [3, 3]])
    scale = torch.tensor(100.0)
    # Two images share a caption: each can be had with half the probability, log(2) on average.
    assert contrast(image, text, same, scale).item() == pytest.approx(0.3466, abs=1e-3)
    assert contrast(image, text, different, scale).item() == pytest.approx(0.3466, abs=1e-3)
    apart = F.normalize(torch.randn(4, 8, generator=seeded(0, 1)), dim=1)
    assert contrast(apart, apart, different, scale) < 0.01
    assert contrast(apart, apart, same, scale) > 1


def test_fused_clip_embeds_alike_and_bounds_its_scale() -> None:
    towers = TinyTowers().train()
    for step in range(2):
        loss_of(towers, folds()[0], step).backward()  # batch statistics
    with torch.no_grad():
        towers.clip.logit_scale.fill_(5.0)
    towers.eval()
    image = folds()[0].draw(2, 40, seeded(0, 0))
    expected = copy.deepcopy(towers).embed(image)
    clip = towers.fused_clip()
    embedding = clip.encode_image((image - towers.mean) / towers.std, normalize=True)
    torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=1e-5)
    assert clip.logit_scale.exp().item() == pytest.approx(30)
    assert ARCHITECTURE["text_cfg"]["vocab_size"] == len(WORDS) + 3
