"""The quality perceiver: scores, training, caching, precision."""

import copy
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.data import astronaut
from tiny_clip import RESNET, VIT, images, tiny, trained

from perceive_adapter.errors import ConfigError, ImageError, ImageRangeWarning, LossInputError
from perceive_adapter.errors import UntrainedPerceiverWarning as Untrained
from perceive_adapter.perceiver import QualityPerceiver

IMAGES = images(3, 3, 48, 70)


@pytest.fixture
def perceiver() -> QualityPerceiver:
    return trained()


def set_context(perceiver: QualityPerceiver, value: float) -> None:
    with torch.no_grad():
        perceiver.prompts.context[0, 0].fill_(value)


def test_perceived(perceiver: QualityPerceiver) -> None:
    perceived = perceiver(IMAGES)
    assert perceived.score.shape == (3,)
    assert perceived.tiers.shape == (3, len(perceiver.tiers)) == (3, 3)
    assert perceived.embedding.shape == (3, perceiver.embedding_dim) == (3, 24)
    assert perceived.degradations.shape == perceived.severity.shape == (3, 0)
    assert perceiver.degradations == ()
    assert (perceiver.lower_better, perceiver.score_range) == (False, (0.0, 1.0))
    torch.testing.assert_close(perceived.tiers.sum(1), torch.ones(3))
    torch.testing.assert_close(perceived.tiers, perceiver.logits(IMAGES).softmax(1))
    torch.testing.assert_close(perceived.score, perceived.tiers @ torch.tensor([0, 0.5, 1]))
    torch.testing.assert_close(perceived.embedding.norm(dim=1), torch.ones(3))
    assert torch.equal(perceived.embedding, perceiver.embed(IMAGES))


def test_logits_are_scaled_cosines(perceiver: QualityPerceiver) -> None:
    cosine = F.cosine_similarity(
        perceiver.embed(IMAGES)[:, None], perceiver.text_features()[None], dim=2
    )
    scale = perceiver.towers.logit_scale.exp()
    assert scale.item() == pytest.approx(1 / 0.07)
    torch.testing.assert_close(perceiver.logits(IMAGES), scale * cosine)
    tier = torch.tensor([2, 0, 1])
    loss = F.cross_entropy(scale * cosine, tier)
    torch.testing.assert_close(perceiver.tier_loss(IMAGES, tier), loss)


@pytest.mark.parametrize(("best", "expected"), [(0, 1.0), (2, 0.0)])
def test_clip_aware_range(
    perceiver: QualityPerceiver, monkeypatch: pytest.MonkeyPatch, best: int, expected: float
) -> None:
    """At CLIP's scale of 100 a cosine margin of 0.1 decides; without the scale it gives 0.36."""
    perceiver.towers.logit_scale.fill_(torch.tensor(100.0).log())
    image = IMAGES[:1]
    embedding = perceiver.embed(image)[0]
    other = F.normalize(torch.eye(24)[0] - embedding[0] * embedding, dim=0)
    cosines = torch.full((3, 1), 0.2)
    cosines[best] = 0.3
    features = cosines * embedding + (1 - cosines**2).sqrt() * other
    monkeypatch.setattr(perceiver, "text_features", lambda: features)
    not_high = 1 - perceiver(image).tiers[0, -1].item()
    assert not_high == pytest.approx(expected, abs=1.5e-4)
    assert features.norm(dim=1).tolist() == pytest.approx([1, 1, 1])


def test_score_weighs_tiers_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    perceiver = trained(tiers=("a", "b", "c", "d"), words=["bad", "poor", "fair", "good"])
    for index in range(4):
        logits = 1e4 * F.one_hot(torch.tensor([index]), 4).float()
        monkeypatch.setattr(perceiver, "tier_logits", lambda _, logits=logits: logits)
        assert perceiver(IMAGES[:1]).score.item() == pytest.approx(index / 3)


def test_last_context_vector_is_the_word() -> None:
    low, high = (tiny(tiers=("low", "high"), words=w) for w in (["bad", "good"], ["good", "bad"]))
    assert torch.equal(low.prompts.context[:, :-1], high.prompts.context[:, :-1])
    assert torch.equal(low.prompts.context[:, -1], high.prompts.context[:, -1].flip(0))


def test_creation_is_seeded_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = tiny(), tiny(), tiny(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("clip", [VIT, RESNET, {**VIT, "custom_text": True}])
def test_training_changes_the_context_alone(clip: dict[str, Any]) -> None:
    perceiver = tiny(clip).train()
    assert not perceiver.towers.training
    before = copy.deepcopy(perceiver.state_dict())
    parameters = [p for p in perceiver.parameters() if p.requires_grad]
    assert parameters == [perceiver.prompts.context]
    optimizer = torch.optim.AdamW(parameters, lr=3e-2)
    losses = []
    for _ in range(10):
        loss = perceiver.tier_loss(IMAGES, torch.tensor([2, 2, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    after = perceiver.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        "prompts.context"
    }


def test_gradient_reaches_the_image(perceiver: QualityPerceiver) -> None:
    image = images(1, 3, 80, 40).requires_grad_()
    (1 - perceiver(image).tiers[:, -1]).sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert image.grad.abs().amax(dim=(1, 3)).min() > 0, "views cover this image's rows"
    assert all(parameter.grad is None for parameter in perceiver.parameters())


def test_gradient_is_right() -> None:
    perceiver = trained().double()
    image = images(1, 3, 6, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: perceiver(x).score, image, fast_mode=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (32, 32), (33, 31), (500, 90)])
def test_any_size(perceiver: QualityPerceiver, size: tuple[int, int]) -> None:
    perceived = perceiver(images(2, 3, *size))
    assert perceived.score.isfinite().all()
    assert perceived.tiers.shape == (2, 3)


def test_views_are_averaged(perceiver: QualityPerceiver) -> None:
    image = images(1, 3, 64, 64)
    corners = [image[..., y : y + 32, x : x + 32] for y in (0, 32) for x in (0, 32)]
    mean = torch.stack([perceiver.embed(corner) for corner in corners]).mean(0)
    torch.testing.assert_close(perceiver.embed(image), F.normalize(mean, dim=1))


def test_narrow_image_is_not_distorted(perceiver: QualityPerceiver) -> None:
    """Its crops are squares, so that a repeated square is perceived as one square."""
    square = images(1, 3, 8, 8)
    strip = square.repeat(1, 1, 1, 4)
    torch.testing.assert_close(perceiver.embed(strip), perceiver.embed(square))


def test_views_bound_the_work(perceiver: QualityPerceiver) -> None:
    seen = []
    perceiver.towers.visual.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    perceiver(images(2, 3, 1000, 700))
    assert seen == [(8, 3, 32, 32)]


def test_batch_matches_single_images(perceiver: QualityPerceiver) -> None:
    singly = torch.cat([perceiver(image[None]).score for image in IMAGES])
    torch.testing.assert_close(perceiver(IMAGES).score, singly)


class Counter:
    """How often the text tower ran."""

    def __init__(self, perceiver: QualityPerceiver) -> None:
        self.count = 0
        perceiver.towers.text.register_forward_hook(self.tick)

    def tick(self, *_: object) -> None:
        self.count += 1


def test_text_is_encoded_once_while_frozen(perceiver: QualityPerceiver) -> None:
    text = Counter(perceiver)
    with torch.inference_mode():
        first = perceiver(IMAGES).score
    with torch.autocast("cpu", torch.bfloat16):
        perceiver(IMAGES)
    with torch.no_grad():
        assert torch.equal(perceiver(IMAGES).score, first)
    image = IMAGES.clone().requires_grad_()
    perceiver(image).score.sum().backward()  # text from inference mode would fail here
    assert image.grad is not None
    assert text.count == 1


def test_loaded_in_inference_mode_it_works_there_and_elsewhere(
    perceiver: QualityPerceiver, tmp_path: Path
) -> None:
    expected = perceiver(IMAGES).tiers
    perceiver.save_pretrained(tmp_path)
    with torch.inference_mode():
        loaded = QualityPerceiver.from_pretrained(tmp_path)
        assert torch.equal(loaded(IMAGES).tiers, expected)
    image = IMAGES.clone().requires_grad_()
    loaded(image).score.sum().backward()
    assert image.grad is not None
    text = Counter(loaded)
    assert torch.equal(loaded(IMAGES).tiers, expected)
    assert text.count == 0
    with torch.inference_mode():
        moved = loaded.double()  # makes new tensors, which belong to that mode
        assert moved.prompts.context.is_inference()
        before = moved(IMAGES.double()).tiers
        torch.testing.assert_close(before.float(), expected, rtol=1e-4, atol=1e-5)
        set_context(moved, 1.0)
        assert not torch.equal(moved(IMAGES.double()).tiers, before)
    assert torch.equal(moved(IMAGES.double()).tiers, moved(IMAGES.double()).tiers)


def test_cached_text_has_full_precision(perceiver: QualityPerceiver) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        cached = perceiver.text_features()
    expected = perceiver.towers.encode_prompts(perceiver.prompts())
    assert perceiver.text_features() is cached
    assert torch.equal(cached, expected)


def replace_data(perceiver: QualityPerceiver) -> None:
    perceiver.prompts.context.data = perceiver.prompts.context.data + 1


def write_to_data(perceiver: QualityPerceiver) -> None:
    perceiver.prompts.context.data.add_(torch.eye(16)[0])  # leaves the version alone


def load_other(perceiver: QualityPerceiver) -> None:
    other = copy.deepcopy(perceiver)
    set_context(other, 2.0)
    perceiver.load_state_dict(other.state_dict())


def replace_parameter(perceiver: QualityPerceiver) -> None:
    context = perceiver.prompts.context.detach() + 1
    perceiver.prompts.context = torch.nn.Parameter(context, requires_grad=False)


def load_other_towers(perceiver: QualityPerceiver) -> None:
    weights = perceiver.towers.state_dict()
    perceiver.towers.load_state_dict({name: 1.5 * value for name, value in weights.items()})


def wrap_same_memory(perceiver: QualityPerceiver) -> None:
    data = perceiver.prompts.context.data
    data.add_(torch.eye(16)[0])  # counted by a version of its own
    assert data._version == perceiver.prompts.context._version
    perceiver.prompts.context = torch.nn.Parameter(data, requires_grad=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: set_context(p, 1.0),
        replace_data,
        write_to_data,
        load_other,
        replace_parameter,
        wrap_same_memory,
        load_other_towers,
        lambda p: p.prompts.start.add_(1),
    ],
    ids=[
        *("in place", "data", "written data", "state_dict", "parameter", "same memory"),
        *("towers", "start of text"),
    ],
)
def test_changed_context_is_encoded_again(
    perceiver: QualityPerceiver, change: Callable[[QualityPerceiver], None]
) -> None:
    before = perceiver(IMAGES).tiers
    change(perceiver)
    after = perceiver(IMAGES).tiers
    assert not torch.equal(after, before)
    perceiver._text_cache = None
    assert torch.equal(perceiver(IMAGES).tiers, after)


def test_training_context_is_never_cached(perceiver: QualityPerceiver) -> None:
    perceiver(IMAGES)
    perceiver.prompts.requires_grad_(True)
    text = Counter(perceiver)
    with torch.no_grad():
        before = perceiver(IMAGES).tiers
        perceiver.prompts.context.data.add_(torch.eye(16)[0])  # leaves the version alone
        assert not torch.equal(perceiver(IMAGES).tiers, before)
    perceiver(IMAGES).tiers[0, 0].backward()
    assert perceiver.prompts.context.grad is not None
    assert text.count == 3


def test_copies_are_independent(perceiver: QualityPerceiver) -> None:
    expected = perceiver(IMAGES).tiers
    for clone in (copy.deepcopy(perceiver), pickle.loads(pickle.dumps(perceiver))):
        assert torch.equal(clone(IMAGES).tiers, expected)
        set_context(clone, 1.0)
        assert not torch.equal(clone(IMAGES).tiers, expected)
        assert not clone.towers.train().training
    assert torch.equal(perceiver(IMAGES).tiers, expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 5e-2), (torch.float64, 1e-5)]
)
def test_precision(perceiver: QualityPerceiver, dtype: torch.dtype, tolerance: float) -> None:
    expected = perceiver(IMAGES)
    other = copy.deepcopy(perceiver).to(dtype)
    for image in (IMAGES, IMAGES.to(dtype)):
        perceived = other(image)
        assert perceived.score.dtype == torch.promote_types(dtype, torch.float32)
        cosine = F.cosine_similarity(perceived.embedding, expected.embedding)
        assert cosine.min() > 1 - tolerance
        assert (perceived.tiers - expected.tiers).abs().max() < 5 * tolerance


def test_autocast(perceiver: QualityPerceiver) -> None:
    expected = perceiver(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        perceived = perceiver(IMAGES)
    assert perceived.score.dtype == torch.float32
    assert (perceived.tiers - expected.tiers).abs().max() < 0.1
    perceiver.prompts.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        perceiver.tier_loss(IMAGES, torch.tensor([0, 1, 2])).backward()
    assert perceiver.prompts.context.grad is not None
    assert perceiver.prompts.context.grad.isfinite().all()


def test_compiles_in_one_graph(perceiver: QualityPerceiver) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(perceiver, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES).tiers, perceiver(IMAGES).tiers)


@pytest.mark.parametrize("clip", [VIT, RESNET])
def test_a_graph_of_a_tower_that_takes_one_size_takes_images_of_any(clip: dict[str, Any]) -> None:
    perceiver = trained(clip)
    sides = {axis: torch.export.Dim(f"n{axis}", min=32) for axis in (2, 3)}
    exported = torch.export.export(
        perceiver, (IMAGES,), dynamic_shapes={"image": sides}, strict=False
    ).module()
    for size in [(32, 32), (40, 64), (200, 90)]:
        image = images(3, 3, *size)
        torch.testing.assert_close(exported(image).embedding, perceiver(image).embedding)


def test_untrained_warns_once_per_instance() -> None:
    for perceiver in (tiny(), tiny()):
        perceiver.tier_loss(IMAGES, torch.tensor([0, 1, 2]))
        with pytest.warns(Untrained, match="never trained") as caught:
            perceiver(IMAGES)
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            perceiver(IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained()(IMAGES)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (images(3, 8, 8), r"\(3, 8, 8\): expected \(B, 3, H, W\)"),
        (images(1, 1, 8, 8), "Repeat the channel"),
        (images(1, 4, 8, 8), "drop an alpha channel"),
        (images(0, 3, 8, 8), "at least one image"),
        (images(1, 3, 0, 8), "one pixel"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"uint8.*image.float\(\) / 255"),
        (torch.full((1, 3, 8, 8), float("nan")), "NaN or infinite"),
        (torch.full((1, 3, 8, 8), float("inf")), "NaN or infinite"),
        (torch.full((1, 3, 8, 8), float("-inf")), "NaN or infinite"),
        (255 * images(1, 3, 8, 8), r"values up to 2\d\d.*Divide 8-bit images by 255"),
        (np.zeros((8, 8, 3)), r"got a ndarray: expected a tensor .*torch.from_numpy"),
        ("photo.jpg", "got a str: expected a tensor"),
    ],
)
def test_bad_images(perceiver: QualityPerceiver, image: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        perceiver(image)


def test_an_image_of_another_range_is_told() -> None:
    with pytest.warns(ImageRangeWarning, match=r"below 0, down to -1.*\(image \+ 1\) / 2"):
        trained()(2 * IMAGES - 1)


def test_strong_noise_on_a_photograph_is_of_no_other_range() -> None:
    photo = torch.from_numpy(astronaut()).permute(2, 0, 1)[None] / 255
    noisy = photo + 50 / 255 * torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
    assert noisy.min() < -0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained()(noisy)


@pytest.mark.parametrize("tier", [torch.tensor([0]), torch.zeros(3), torch.zeros(3, 1).long()])
def test_bad_tier_index(perceiver: QualityPerceiver, tier: torch.Tensor) -> None:
    with pytest.raises(LossInputError, match="one int64 index"):
        perceiver.tier_loss(IMAGES, tier)


@pytest.mark.parametrize("index", [-100, -1, 3])
def test_an_index_of_no_tier(perceiver: QualityPerceiver, index: int) -> None:
    with pytest.raises(LossInputError, match=f"from 0 to {index}|from {index} to 0"):
        perceiver.tier_loss(IMAGES, torch.tensor([0, index, 0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tiers": ("low",)}, "at least two different names"),
        ({"tiers": ("low", "low")}, "at least two different names"),
        ({"tiers": ("low", "fine")}, r"\['fine'\] have no default word"),
        ({"words": ("bad", "good")}, "one word for each tier"),
        ({"degradations": "noise"}, r"degradations='noise': expected several names"),
        ({"words": ("bad", "so-so", "good")}, r"\['so-so'\] are not single tokens"),
        ({"context_length": 0}, "context_length=0"),
        ({"context_length": 76}, "at most 75"),
        ({"views": 0}, "views=0"),
        ({"clip": {**VIT, "embed_dim": 10**9}}, "clip.embed_dim=1000000000"),
        ({"clip": {**VIT, "text_cfg": {"layers": 10**4}}}, "clip.text_cfg.layers=10000"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**arguments)


def test_imports_are_lazy() -> None:
    names = ["open_clip", "timm", "torchvision", "huggingface_hub"]
    code = (
        f"import sys, perceive_adapter.perceiver; print([n for n in {names} if n in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
