"""Frozen CLIP towers: exact short prompts, the QuickGELU trap, what cannot carry tier prompts."""

import copy
import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_clip import RESNET, VIT, images, tiny

from perceive_adapter.errors import CheckpointError, ConfigError
from perceive_adapter.perceiver.towers import ClipTowers, build_clip, embed_words

SENTENCES = ["a terrible photo of a house", "an excellent one", "rain"]


def text_variant(**text_cfg: Any) -> dict[str, Any]:
    return {**VIT, "text_cfg": {**VIT["text_cfg"], **text_cfg}}


@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize(
    "architecture",
    [
        VIT,
        {**VIT, "custom_text": True},
        {**VIT, "quick_gelu": False},
        {**text_variant(proj_bias=True), "custom_text": True},
        {**text_variant(proj_type="none"), "embed_dim": 16},
        text_variant(ls_init_value=0.5),
    ],
    ids=["clip", "custom", "gelu", "biased", "unprojected", "scaled"],
)
def test_short_prompt_is_exact(architecture: dict[str, Any], sentence: str) -> None:
    torch.manual_seed(0)
    clip = build_clip(architecture, None).eval()
    tokens = open_clip.tokenize([sentence])
    length = int(tokens.argmax()) + 1
    text = clip.text if architecture.get("custom_text") else clip
    with torch.no_grad():
        expected = clip.encode_text(tokens)
        actual = ClipTowers(clip, length).text(text.token_embedding(tokens[:, :length]))
    assert length < tokens.shape[1]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", [VIT, RESNET], ids=["vit", "resnet"])
def test_image_features_are_those_of_clip(architecture: dict[str, Any]) -> None:
    clip = build_clip(architecture, None).eval()
    image = images(2, 3, 32, 32)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).reshape(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).reshape(3, 1, 1)
    with torch.no_grad():
        expected = clip.encode_image((image - mean) / std, normalize=True)
        towers = ClipTowers(clip, 6)
        actual = towers.encode_image(image)
        resized = F.interpolate(images(1, 3, 20, 20), 32, mode="bicubic", antialias=True)
        small = towers.encode_image(images(1, 3, 20, 20))
        torch.testing.assert_close(small, towers.encode_image(resized))
    torch.testing.assert_close(actual, expected)


def test_averages_of_all_buffers_perceive() -> None:
    perceiver = tiny()
    average = torch.optim.swa_utils.AveragedModel(perceiver, use_buffers=True)
    average.update_parameters(perceiver)
    average.update_parameters(perceiver)
    image = images(1, 3, 40, 40)
    assert torch.equal(average.module.logits(image), perceiver.logits(image))


def test_towers_never_leave_eval_mode() -> None:
    towers = ClipTowers(build_clip(RESNET, None), 6)
    before = copy.deepcopy(towers.state_dict())
    assert any("running_mean" in name for name in before)
    towers.train()
    towers.encode_image(images(4, 3, 32, 32))
    assert not any(module.training for module in towers.modules())
    assert not any(parameter.requires_grad for parameter in towers.parameters())
    for name, tensor in towers.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_embed_words_reads_the_token_table() -> None:
    clip = build_clip(VIT, None)
    words, start, end = embed_words(clip, ["terrible", "excellent"])
    ids = open_clip.SimpleTokenizer().encode("terrible excellent")
    assert torch.equal(words, clip.token_embedding.weight[ids])
    assert torch.equal(start, clip.token_embedding.weight[-2])
    assert torch.equal(end, clip.token_embedding.weight[-1])
    with pytest.raises(ConfigError, match=r"\['unphotogenic', 'two words', ''\] are not single"):
        embed_words(clip, ["unphotogenic", "bad", "two words", ""])
    with pytest.raises(ConfigError, match="vocabulary of 100 tokens: expected"):
        embed_words(build_clip(text_variant(vocab_size=100), None), ["bad"])


@pytest.mark.parametrize(
    ("clip", "tag", "message"),
    [
        ("ViT-B-32", "openai", r"with QuickGELU.*without it.*clip='ViT-B-32-quickgelu'"),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "no weights 'laion2b_s34b_b79k'"),
        ("ViT-B-32-quickgelu", "openia", r"no such file.*Its tags are openai, "),
        ("ViT-B-32-quickgleu", "openai", r"no model.*Did you mean 'ViT-B-32-quickgelu'"),
        ("?", "openai", r"no model '\?'\. open_clip\.list_models"),
        ("roberta-ViT-B-32", None, r"causal text tower.*ViT-B-32-quickgelu"),
        ("ViT-B-16-SigLIP", None, r"causal text tower.*ViT-B-32-quickgelu"),
        (text_variant(no_causal_mask=True), None, "no causal mask"),
        ({**text_variant(pool_type="last"), "custom_text": True}, None, "pool_type='last'"),
        ({**text_variant(embed_cls=True), "custom_text": True}, None, "causal text tower"),
        ({**VIT, "multimodal_cfg": {}}, None, "causal text tower"),
        ({"embed_dim": 8}, None, "expected embed_dim, vision_cfg and text_cfg"),
        ({**VIT, "embed_dims": 8}, None, "cannot build a model.*embed_dims"),
        (text_variant(heads=3), None, "cannot build a model"),
        (VIT, "openai", "'openai' is not a file"),
    ],
)
def test_what_cannot_be_built(clip: Any, tag: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message), torch.device("meta"):
        ClipTowers(build_clip(clip, tag), 18)


def test_both_sides_of_the_quickgelu_trap(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip's own tables decide: no pair that it would only warn of gets through."""
    built = []
    monkeypatch.setattr(open_clip, "create_model", lambda name, **_: built.append(name))
    for name, tag in open_clip.list_pretrained():
        weights = open_clip.get_pretrained_cfg(name, tag)
        model = open_clip.get_model_config(name)
        built.clear()
        fits = model.get("quick_gelu", False) == weights.get("quick_gelu", False)
        if fits and "hf_model_name" not in model["text_cfg"]:
            build_clip(name, tag)
            assert built == [name]
        else:  # refused before anything is downloaded
            with pytest.raises(ConfigError, match="causal text tower" if fits else "QuickGELU"):
                build_clip(name, tag)
            assert built == []


def test_prompt_longer_than_the_text_tower() -> None:
    clip = build_clip(text_variant(context_length=10), None)
    ClipTowers(clip, 10)
    with pytest.raises(ConfigError, match=r"context_length=9 needs 11 tokens.*at most 8"):
        ClipTowers(clip, 11)


def test_weights_from_a_file(tmp_path: Path) -> None:
    source = build_clip(VIT, None)
    save_file(source.state_dict(), tmp_path / "clip.safetensors")
    loaded = build_clip(VIT, tmp_path / "clip.safetensors")
    for name, tensor in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    with pytest.raises(CheckpointError, match="cannot load"):
        build_clip(RESNET, tmp_path / "clip.safetensors")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(CheckpointError, match="cannot load"):
        build_clip(VIT, tmp_path / "text.pt")


def test_failed_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"no route.*check the network, or pass the file"):
        build_clip("ViT-B-32-quickgelu", "openai")


def test_random_towers_are_built_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build_clip(VIT, None)
    assert not caplog.records
