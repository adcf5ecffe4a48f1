"""Saved perceivers: exact round trips, and every way in which a folder can be wrong."""

import copy
import json
import os
import warnings
from pathlib import Path
from types import MappingProxyType
from typing import Any

import open_clip
import pytest
import torch
from tiny_clip import RESNET, VIT, images, tiny, trained

from perceive_adapter.errors import CheckpointError, UntrainedPerceiverWarning
from perceive_adapter.folders import load_folder, save_folder
from perceive_adapter.perceiver import QualityPerceiver
from perceive_adapter.perceiver.towers import build_clip

IMAGES = images(2, 3, 40, 70)
NAMES = ("perceiver_config.json", "perceiver_model.safetensors")
TIMM: dict[str, Any] = {
    **VIT,
    "vision_cfg": {
        "image_size": 224,
        "timm_model_name": "eva02_tiny_patch14_224",
        "timm_model_pretrained": True,
        "timm_pool": "token",
        "timm_proj": "linear",
    },
}


def edit(folder: Path, config: dict[str, Any], tensors: dict[str, Any] | None = None) -> None:
    """Save a folder again with other values; None removes a tensor."""
    old_config, old_tensors = load_folder(folder, *NAMES)
    merged = {**old_tensors, **(tensors or {})}
    save_folder(
        folder,
        config={**old_config, **config},
        tensors={name: tensor for name, tensor in merged.items() if tensor is not None},
        config_name=NAMES[0],
        tensors_name=NAMES[1],
        card="",
    )


@pytest.fixture
def named_clip(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Stand in for open_clip's downloaded weights: a tiny CLIP of a seed that a test can change."""
    source = {"seed": 0}

    def create_model(name: str, pretrained: str) -> Any:
        assert (name, pretrained) == ("ViT-B-32-quickgelu", "openai")
        torch.manual_seed(source["seed"])
        return build_clip(VIT, None)

    monkeypatch.setattr(open_clip, "create_model", create_model)
    return source


@pytest.mark.parametrize("clip", [VIT, RESNET, {**VIT, "custom_text": True}, TIMM])
def test_round_trip_is_exact(clip: dict[str, Any], tmp_path: Path) -> None:
    perceiver = trained(clip, tiers=("low", "high"), views=3)
    folder = perceiver.save_pretrained(tmp_path / "saved")
    state = torch.get_rng_state()
    loaded = QualityPerceiver.from_pretrained(folder)
    assert torch.equal(loaded(IMAGES).tiers, perceiver(IMAGES).tiers)
    assert torch.equal(loaded(IMAGES).score, perceiver(IMAGES).score)
    assert loaded.fingerprint() == perceiver.fingerprint()
    assert loaded.tiers == ("low", "high")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    again = QualityPerceiver.from_pretrained(loaded.save_pretrained(tmp_path / "again"))
    assert again.fingerprint() == perceiver.fingerprint()


def test_half_precision_round_trip(tmp_path: Path) -> None:
    perceiver = trained().half()
    loaded = QualityPerceiver.from_pretrained(perceiver.save_pretrained(tmp_path))
    assert loaded.prompts.context.dtype == torch.float16
    assert torch.equal(loaded(IMAGES).tiers, perceiver(IMAGES).tiers)
    assert loaded.fingerprint() == perceiver.fingerprint()


def test_default_device_does_not_matter(tmp_path: Path) -> None:
    with torch.device("meta"):
        perceiver = tiny()
        loaded = QualityPerceiver.from_pretrained(perceiver.save_pretrained(tmp_path))
    assert perceiver.fingerprint() == loaded.fingerprint() == tiny().fingerprint()


def test_named_weights_are_not_saved(tmp_path: Path, named_clip: dict[str, int]) -> None:
    perceiver = trained("ViT-B-32-quickgelu", pretrained="openai")
    own = trained().save_pretrained(tmp_path / "own")
    folder = perceiver.save_pretrained(tmp_path / "named")
    assert not any(name.startswith("towers") for name in load_folder(folder, *NAMES)[1])
    assert (folder / NAMES[1]).stat().st_size < 0.1 * (own / NAMES[1]).stat().st_size
    loaded = QualityPerceiver.from_pretrained(folder)
    assert torch.equal(loaded(IMAGES).tiers, perceiver(IMAGES).tiers)
    assert loaded.fingerprint() == perceiver.fingerprint()


def test_other_named_weights_are_noticed(tmp_path: Path, named_clip: dict[str, int]) -> None:
    folder = tiny("ViT-B-32-quickgelu", pretrained="openai").save_pretrained(tmp_path)
    named_clip["seed"] = 1
    with pytest.raises(CheckpointError, match=r"another CLIP than 'ViT-B-32-quickgelu'.*cosine"):
        QualityPerceiver.from_pretrained(folder)


def test_weights_from_a_file_are_saved(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(build_clip(VIT, None).state_dict(), tmp_path / "clip.safetensors")
    perceiver = trained(pretrained=str(tmp_path / "clip.safetensors"))
    folder = perceiver.save_pretrained(tmp_path / "saved")
    (tmp_path / "clip.safetensors").unlink()
    assert str(tmp_path) not in (folder / NAMES[0]).read_text()
    assert QualityPerceiver.from_pretrained(folder).fingerprint() == perceiver.fingerprint()


def test_trainable_and_untrained_survive(tmp_path: Path) -> None:
    folder = tiny().save_pretrained(tmp_path)
    loaded = QualityPerceiver.from_pretrained(folder, is_trainable=True)
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == ["prompts.context"]
    assert not loaded.trained
    with pytest.warns(UntrainedPerceiverWarning):
        loaded(IMAGES)
    loaded.tier_loss(IMAGES, torch.tensor([0, 1])).backward()
    torch.optim.SGD([loaded.prompts.context], lr=0.1).step()
    again = QualityPerceiver.from_pretrained(loaded.save_pretrained(tmp_path))
    assert again.trained
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again(IMAGES)


def test_card_tells_the_truth(tmp_path: Path, named_clip: dict[str, int]) -> None:
    own = (tiny(context_length=5).save_pretrained(tmp_path / "a") / "README.md").read_text()
    named = trained("ViT-B-32-quickgelu", pretrained="openai").save_pretrained(tmp_path / "b")
    card = (named / "README.md").read_text()
    assert "a custom architecture, with its own weights, which are in this repository" in own
    assert "5 context vectors" in own
    assert "**not trained**" in own
    assert "| 2 | high | excellent |" in own
    assert "ViT-B-32-quickgelu, with open_clip's weights `openai`, which are not in this" in card
    assert "were trained" in card


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format_version": 2}, "format_version=2.*reads 1"),
        ({"tiers": "low"}, "tiers.*expected"),
        ({"tiers": ["low"]}, "at least two"),
        ({"views": "4"}, "views: expected int"),
        ({"views": 10**12}, "views=1000000000000"),
        ({"context_length": 8}, "does not fit"),
        ({"context_length": -1}, "context_length=-1"),
        ({"clip": 7}, "clip: expected"),
        ({"clip": "no-such-model"}, "no model 'no-such-model'"),
        ({"clip": "ViT-B-32"}, "does not fit.*size mismatch"),
        ({"clip": {}}, "expected embed_dim"),
        ({"clip": {**VIT, "embed_dim": 60_000}}, "does not fit.*size mismatch"),
        ({"clip": {**VIT, "embed_dim": 10**15}}, "clip.embed_dim=1000000000000000"),
        ({"clip": {**VIT, "embed_dim": "24"}}, "cannot build"),
        ({"clip": {**VIT, "text_cfg": {"width": [16]}}}, "cannot build"),
        ({"clip": {**VIT, "text_cfg": 3}}, "expected embed_dim, vision_cfg and text_cfg"),
        *(
            ({"clip": {**VIT, "vision_cfg": {"image_size": size}}}, "image_size=.*pixels of a side")
            for size in (None, "x", [], [1], -1, 0, True, [32, 0])
        ),
        ({"pretrained": "openai"}, "has no tags"),
        ({"pretrained": "openai", "clip": "ViT-B-32"}, "QuickGELU"),
        ({"pretrained": 1}, "pretrained: expected"),
    ],
)
def test_hostile_config(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = tiny().save_pretrained(tmp_path)
    edit(folder, config)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        QualityPerceiver.from_pretrained(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"prompts.context": None}, "Missing key.*context"),
        ({"prompts.context": torch.zeros(3, 4, 17)}, "size mismatch for context"),
        ({"prompts.context": torch.zeros(3, 4, 16).int()}, "does not fit"),
        ({"prompts.context": torch.zeros(3, 4, 16).half()}, None),
        ({"prompts.context": torch.full((3, 4, 16), float("nan"))}, "NaN or infinite"),
        ({"towers.text.norm.bias": torch.full((16,), float("inf"))}, "NaN or infinite"),
        ({"heads.severity.bias": torch.full((2,), float("nan"))}, "severity.bias has NaN"),
        ({"prompts.more": torch.zeros(1)}, "Unexpected key"),
        ({"towers.text.norm.weight": None}, "Missing key"),
        ({"towers.text.norm.weight": torch.ones(16).half()}, "expected one floating point dtype"),
        ({"more": torch.zeros(1)}, r"unknown tensors \['more'\]"),
        ({"probe": None}, "probe of shape None"),
        ({"probe": torch.zeros(23)}, r"probe of shape \(23,\)"),
        ({"probe": torch.zeros(24)}, "another CLIP"),
        ({"probe": torch.full((24,), float("nan"))}, "another CLIP"),
    ],
)
def test_hostile_tensors(tensors: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    folder = tiny(degradations=("haze", "rain")).save_pretrained(tmp_path)
    edit(folder, {}, tensors)
    if message is None:
        QualityPerceiver.from_pretrained(folder)
        return
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        QualityPerceiver.from_pretrained(folder)


def test_unknown_key_warns(tmp_path: Path) -> None:
    folder = tiny().save_pretrained(tmp_path)
    edit(folder, {"mood": "good"})
    with pytest.warns(UserWarning, match="ignoring unknown keys mood"):
        QualityPerceiver.from_pretrained(folder)


def test_what_is_no_perceiver(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in [
        (tmp_path, "perceiver_config.json"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "none", "Check the path"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            QualityPerceiver.from_pretrained(path)
    with pytest.raises(CheckpointError, match="is a file"):
        tiny().save_pretrained(tmp_path / "file")


def test_fingerprint_tells_what_decides_a_score() -> None:
    base = trained().fingerprint()
    assert len(base) == 64
    assert trained().requires_grad_(True).fingerprint() == base
    moved = trained()
    with torch.no_grad():
        moved.prompts.context[0, 0, 0] += 1e-6
    other_tower = trained()
    other_tower.towers.text.positions[0, 0] += 1e-6
    others = [moved, other_tower, trained(views=2), trained(seed=1), trained().half()]
    others.append(trained(clip={**VIT, "quick_gelu": not VIT["quick_gelu"]}))  # the same weights
    assert len({base, *(other.fingerprint() for other in others)}) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    perceiver = trained()
    try:
        torch.set_default_dtype(dtype)
        QualityPerceiver.from_pretrained("perceive-tiny")
        perceiver.save_pretrained(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert QualityPerceiver.from_pretrained(tmp_path).fingerprint() == perceiver.fingerprint()


def test_the_architecture_is_its_own_copy(tmp_path: Path) -> None:
    clip = copy.deepcopy(VIT)
    perceiver = trained(clip=MappingProxyType(clip))
    clip["vision_cfg"]["patch_size"] = 8
    saved = perceiver.save_pretrained(tmp_path)
    assert torch.equal(
        QualityPerceiver.from_pretrained(saved)(IMAGES).score, perceiver(IMAGES).score
    )


def test_a_bundled_name_means_what_came_with_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained().save_pretrained(tmp_path / "perceive-tiny")
    monkeypatch.chdir(tmp_path)
    own = QualityPerceiver.from_pretrained("./perceive-tiny")
    assert own.embedding_dim != QualityPerceiver.from_pretrained("perceive-tiny").embedding_dim


def test_real_architecture(tmp_path: Path) -> None:
    """ViT-B/32 with random weights: creation, 20 steps, save, load, the same bits."""
    perceiver = QualityPerceiver.create(pretrained=None)
    frozen = {n: t.clone() for n, t in perceiver.state_dict().items() if n != "prompts.context"}
    optimizer = torch.optim.AdamW([perceiver.prompts.context], lr=1e-2)
    brightness = torch.tensor([0.2, 0.6, 1.0]).reshape(3, 1, 1, 1)
    batch, tier = brightness * images(3, 3, 64, 64), torch.arange(3)
    losses = []
    for _ in range(20):
        loss = perceiver.tier_loss(batch, tier)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    state = perceiver.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in frozen.items())
    perceiver.requires_grad_(False)
    loaded = QualityPerceiver.from_pretrained(perceiver.save_pretrained(tmp_path))
    image = images(1, 3, 300, 500)
    assert torch.equal(loaded(image).score, perceiver(image).score)
    assert json.loads((tmp_path / NAMES[0]).read_text())["clip"] == "ViT-B-32-quickgelu"
    assert os.path.getsize(tmp_path / NAMES[1]) < 510e6
