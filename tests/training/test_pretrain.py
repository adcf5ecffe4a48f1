"""Pretraining of perceive-tiny's towers, for a few small steps."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small import folds, perceiver, photos
from torch import Tensor

from perceive_adapter.data import FAMILIES, KINDS
from perceive_adapter.data.samples import CropSampler, degrade_each, draw_severities
from perceive_adapter.errors import CheckpointError, ConfigError
from perceive_adapter.perceiver import QualityPerceiver
from perceive_adapter.perceiver.vocabulary import WordTokenizer
from perceive_adapter.training.captions import WORDS
from perceive_adapter.training.loop import Schedule, seeded, train
from perceive_adapter.training.pretrain import (
    ARCHITECTURE,
    Batch,
    TinyTowers,
    as_perceiver,
    blended,
    contrast,
    draw_batch,
    draw_triplets,
    pretrain,
)


def drawn(count: int, side: int = 32, step: int = 0, sampler: CropSampler | None = None) -> Batch:
    tokenize = WordTokenizer(WORDS, 24)
    return draw_batch(sampler or folds()[0], count, side, tokenize, seeded(0, step))


def loss_of(towers: TinyTowers, sampler: CropSampler, step: int) -> Tensor:
    return towers.loss(drawn(32, step=step, sampler=sampler))


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
    written = torch.load(tmp_path / "pretrain.pt", weights_only=True)["settings"]
    assert {"sizes", "triplets"} <= written.keys()
    with pytest.raises(CheckpointError, match=r"seed=0: expected seed=1"):
        pretrain(photos(), seed=1, **settings)
    with pytest.raises(CheckpointError, match=r"photographs='\w+': expected photographs="):
        pretrain(photos()[:2], **settings)


@pytest.fixture(scope="module")
def bundled() -> QualityPerceiver:
    return QualityPerceiver.from_pretrained("perceive-tiny")


def test_towers_start_from_those_of_a_perceiver(bundled: QualityPerceiver) -> None:
    again = as_perceiver(TinyTowers(start=bundled), words=["bad", "mediocre", "good"])
    image = folds()[0].draw(2, 48, seeded(0, 0))
    here, there = again.embed(image), bundled.embed(image)
    assert torch.equal(here, there)
    assert bundled.heads is not None
    assert again.heads is not None
    assert again.heads.names == FAMILIES
    torch.testing.assert_close(again.heads(here), bundled.heads(there))
    captions = ["a terrible photo", "a photo with severe rain and slight noise"]
    assert torch.equal(again.towers.encode_texts(captions), bundled.towers.encode_texts(captions))
    assert torch.equal(again.towers.logit_scale, bundled.towers.logit_scale)


def test_towers_that_start_from_others_are_trained(bundled: QualityPerceiver) -> None:
    before = bundled.fingerprint()
    first, trained = (
        pretrain(photos(), start=bundled, schedule=Schedule(steps, 1e-3)) for steps in (0, 2)
    )
    assert bundled.fingerprint() == before
    assert not any(parameter.requires_grad for parameter in bundled.towers.parameters())
    moved = {
        name
        for name, value in trained.named_parameters()
        if not value.equal(first.get_parameter(name))
    }
    assert moved == {name for name, _ in trained.named_parameters()}


def test_towers_do_not_start_from_those_of_another_kind() -> None:
    with pytest.raises(ConfigError, match=r"expected those of perceive-tiny"):
        TinyTowers(start=perceiver())


def test_a_checkpoint_of_other_first_towers_is_refused(
    bundled: QualityPerceiver, tmp_path: Path
) -> None:
    settings = {"schedule": Schedule(1, 1e-3), "checkpoint": tmp_path / "pretrain.pt"}
    pretrain(photos(), start=bundled, **settings)
    pretrain(photos(), start=bundled, **settings)
    with pytest.raises(CheckpointError, match=r"start='\w+': expected start="):
        pretrain(photos(), start=as_perceiver(TinyTowers(seed=1)), **settings)


def test_samples_are_as_files_hold_them_and_labelled() -> None:
    batch = drawn(144)
    assert batch.image.shape == (144, 3, 32, 32)
    assert batch.severity.shape == (144, len(KINDS))
    levels = batch.image * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert 0 <= batch.image.min() < batch.image.max() <= 1
    assert 0 <= batch.severity.min() < batch.severity.max() <= 1
    clean = (batch.severity == 0).all(dim=1)
    assert clean.sum() == 24 + 8  # of the triplets, and one of nine others
    torch.testing.assert_close(batch.tiers.sum(dim=1), torch.ones(144))
    assert batch.tiers[clean, 2].eq(1).all()
    assert len(batch.captioned) == 48
    assert batch.captions.shape == (48 + 3, 24)


def test_half_belong_to_a_triplet_of_their_scene() -> None:
    batch = drawn(144, side=64)
    low, medium, high = batch.severity[:72].view(3, 24, -1)
    assert batch.tiers[:72].argmax(dim=1).tolist() == 24 * [0] + 24 * [1] + 24 * [2]
    assert batch.tiers[:72].amax(dim=1).eq(1).all()
    assert low.amax(dim=1).min() >= 0.5
    shares = (medium / low)[low > 0]
    assert ((shares - 0.4).abs().lt(1e-5) | (shares - 0.5).abs().lt(1e-5)).all()
    assert (shares < 0.45).any()
    assert (shares > 0.45).any()
    assert not high.any()


def test_the_middle_of_a_triplet_is_labelled_as_it_was_made() -> None:
    photos = folds()[0].draw(24, 48, seeded(0, 0))
    low, medium, high = draw_triplets(photos, seeded(0, 1))
    assert torch.equal(high.degraded, photos)
    halves = low.degraded.lerp(photos, 0.5)
    blends = (medium.degraded - halves).abs().amax(dim=(1, 2, 3)) < 1e-6
    assert 4 <= blends.sum() <= 20
    torch.testing.assert_close(medium.severity[blends], 0.5 * low.severity[blends])
    torch.testing.assert_close(medium.severity[~blends], 0.4 * low.severity[~blends])


def test_some_images_are_half_restored() -> None:
    """Severities from 0.05 on become smaller, to a fifth at least."""
    rest = torch.cat([drawn(144, step=step).severity[72:] for step in range(4)])
    least = rest.masked_fill(rest == 0, 1).amin(dim=1)
    assert 0.01 <= least.min() < 0.05


def test_a_blend_is_labelled_in_proportion() -> None:
    photos = folds()[0].draw(8, 32, seeded(0, 0))
    whole = degrade_each(photos, draw_severities(8, seeded(0, 1)), seeded(0, 2))
    remains = torch.linspace(0.2, 1, 8)
    part = blended(whole, remains)
    left, damage = ((one.degraded - photos).flatten(1).norm(dim=1) for one in (part, whole))
    torch.testing.assert_close(left, remains * damage)
    torch.testing.assert_close(part.severity, remains[:, None] * whole.severity)


def test_processes_draw_what_the_thread_draws() -> None:
    schedule = Schedule(2, 1e-3)
    one, other = (pretrain(photos(), schedule=schedule, workers=n).state_dict() for n in (0, 2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


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
