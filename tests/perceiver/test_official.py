"""Import of the released prompts' format: the official arithmetic, and what is refused."""

from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from tiny_clip import VIT, images

from perceive_adapter.errors import CheckpointError
from perceive_adapter.perceiver import QualityPerceiver
from perceive_adapter.perceiver.towers import build_clip

TIERS, LENGTH, TOTAL = 3, 16, 77
TEXT_OF_B32 = {**VIT, "embed_dim": 512, "text_cfg": {"width": 512, "heads": 8, "layers": 12}}
TINY = VIT
IMAGES = images(2, 3, 224, 224)


def clip_of(architecture: Any) -> Any:
    """The random CLIP that the import builds: `create` seeds it with 0."""
    torch.manual_seed(0)
    return build_clip(architecture, None).eval()


def tokens(words: str = "photo " * LENGTH) -> torch.Tensor:
    return open_clip.tokenize([words] * TIERS)


def learner(clip: Any, seed: int = 1) -> dict[str, torch.Tensor]:
    """A state dict in the official format, with a context as training leaves it."""
    embedded = clip.token_embedding(tokens()).detach()
    noise = torch.randn(embedded[:, :LENGTH].shape, generator=torch.Generator().manual_seed(seed))
    return OrderedDict(
        context=0.05 * noise,
        token_prefix=embedded[:, :1].clone(),
        token_suffix=embedded[:, 1 + LENGTH :].clone(),
        tokenized_prompts=tokens(),
    )


def official_features(clip: Any, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The official text encoder, over all 77 tokens."""
    parts = [state["token_prefix"], state["context"], state["token_suffix"]]
    x = torch.cat(parts, dim=1) + clip.positional_embedding
    assert x.shape[:2] == (TIERS, TOTAL)
    mask = torch.full((TOTAL, TOTAL), float("-inf")).triu(1)
    x = clip.ln_final(clip.transformer(x, attn_mask=mask))
    x = x[torch.arange(TIERS), state["tokenized_prompts"].argmax(dim=-1)] @ clip.text_projection
    return x / x.norm(dim=-1, keepdim=True)


@torch.no_grad()
def official_tiers(clip: Any, state: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    seen = clip.visual((image - mean) / std)
    seen = seen / seen.norm(dim=-1, keepdim=True)
    logits = clip.logit_scale.exp() * seen @ official_features(clip, state).T
    return logits.softmax(dim=-1)


def write(path: Path, state: Any, **others: Any) -> Path:
    torch.save({"prompt_learner": state, **others}, path / "prompts.pth")
    return path / "prompts.pth"


def load(file: Path, clip: Any = TINY) -> QualityPerceiver:
    return QualityPerceiver.from_official_prompts(file, clip=clip, pretrained=None)


@pytest.mark.parametrize("architecture", [TEXT_OF_B32, "ViT-B-32-quickgelu"], ids=["text", "whole"])
def test_official_arithmetic(architecture: Any, tmp_path: Path) -> None:
    clip = clip_of(architecture)
    state = learner(clip)
    perceiver = load(write(tmp_path, state, iteration=7, best={"psnr": 30.5}), architecture)
    with torch.no_grad():
        expected = official_features(clip, state)
    assert (perceiver.text_features() - expected).abs().max() < 1e-5
    image = IMAGES[..., : perceiver.towers.image_size[0], : perceiver.towers.image_size[1]]
    perceived = perceiver(image)
    assert (perceived.tiers - official_tiers(clip, state, image)).abs().max() < 1e-5
    assert perceived.tiers.std(dim=1).min() > 1e-3  # the tiers differ, so the comparison tells
    assert perceiver.tiers == ("low", "medium", "high")
    assert perceiver.trained
    assert not any(parameter.requires_grad for parameter in perceiver.parameters())


def test_words_as_context_are_the_clips_own_text(tmp_path: Path) -> None:
    clip = clip_of(TINY)
    state = learner(clip) | {"context": clip.token_embedding(tokens())[:, 1 : 1 + LENGTH].detach()}
    with torch.no_grad():
        expected = F.normalize(clip.encode_text(tokens()), dim=1)
    features = load(write(tmp_path, state)).text_features()
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


def test_import_then_our_own_format(tmp_path: Path) -> None:
    perceiver = load(write(tmp_path, learner(clip_of(TINY))))
    loaded = QualityPerceiver.from_pretrained(perceiver.save_pretrained(tmp_path / "saved"))
    assert loaded.fingerprint() == perceiver.fingerprint()
    assert torch.equal(loaded(IMAGES).tiers, perceiver(IMAGES).tiers)


def test_half_precision_file(tmp_path: Path) -> None:
    state = learner(clip_of(TINY))
    half = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    perceiver = load(write(tmp_path, half))
    assert perceiver.prompts.context.dtype == torch.float32
    assert torch.equal(perceiver.prompts.context, half["context"].float())


class Evil:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.folder,)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("context"), "context of type NoneType: expected a dense tensor"),
        (lambda s: s.update(context=[1.0]), "context of type list"),
        (lambda s: s.update(context=torch.zeros(3, 16, 16).to_sparse()), "dense tensor"),
        (lambda s: s.update(context=torch.zeros(2, 16, 16)), r"'context': \(2, 16, 16\).*expected"),
        (lambda s: s.update(context=torch.zeros(3, 0, 16)), r"'context': \(3, 0, 16\)"),
        (lambda s: s.update(context=torch.zeros(16)), r"'context': \(16,\).*N = 16, W = 512"),
        (lambda s: s.update(context=s["context"].long()), "expected context"),
        (lambda s: s.update(context=s["context"] * float("nan")), "NaN or infinite.*context"),
        (lambda s: s.update(token_suffix=s["token_suffix"][:, 1:]), "'token_suffix'.*expected"),
        (lambda s: s.update(token_prefix=torch.zeros(3, 1, 8)), "'token_prefix'.*expected"),
        (lambda s: s.update(tokenized_prompts=tokens("photo " * 15)), r"\[16, 16, 16\].*17"),
        (lambda s: s["token_prefix"][1].add_(1), "token_prefix differs from tier to tier"),
        (lambda s: s["token_suffix"].neg_(), "another CLIP: .*end-of-text.*cosine -1.000"),
    ],
)
def test_refused(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    state = learner(clip_of(TINY))
    change(state)
    with pytest.raises(CheckpointError, match=f"(?s)prompts.pth.*{message}"):
        load(write(tmp_path, state))


def test_another_clip_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, learner(clip_of(TINY)))
    wider = {**TINY, "text_cfg": {"width": 32, "heads": 2, "layers": 1}}
    with pytest.raises(CheckpointError, match=r"\(3, 16, 16\): expected \(3, 16, 32\)"):
        load(file, wider)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "holds list: expected a dict"),
        ({"state_dict": {}, "iteration": 3}, r"\['iteration', 'state_dict'\]: expected"),
        ({"prompt_learner": 3}, "expected a dict with the key 'prompt_learner'"),
        (
            {"prompt_learner": {}, "half": Fraction(1, 2)},
            r"without running.*plain values.*save {'prompt_learner': ...}",
        ),
    ],
)
def test_other_contents(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "prompts.pth")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "prompts.pth")


def test_code_is_not_run(tmp_path: Path) -> None:
    file = write(tmp_path, learner(clip_of(TINY)), evil=Evil(tmp_path / "ran"))
    with pytest.raises(CheckpointError, match="without running"):
        load(file)
    assert not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_are_none(tmp_path: Path) -> None:
    whole = write(tmp_path, learner(clip_of(TINY))).read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], b"\x80\x04."):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load(tmp_path / "file")
    with pytest.raises(CheckpointError, match="there is no file"):
        load(tmp_path / "none")
