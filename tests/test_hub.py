"""Perceivers and adapters on the Hub: huggingface_hub's client, real HTTP, and what goes wrong."""

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import constants
from torch import nn

from perceive_adapter import (
    AdapterConfig,
    CheckpointError,
    ConfigError,
    PerceptionError,
    QualityPerceiver,
    wrap,
)
from perceive_adapter.hub import push_folder

REPO = "user/rain"
IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CLIP: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server, and the client's settings, which it reads from the environment at its import."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer() as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield server


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1))


class Perceiver:
    """How a perceiver is made, loaded and compared."""

    config, tensors = "perceiver_config.json", "perceiver_model.safetensors"

    def make(self, seed: int) -> QualityPerceiver:
        made = QualityPerceiver.create(CLIP, pretrained=None, context_length=4)
        with torch.no_grad():
            made.prompts.context += 0.1 * (seed + 1)
        return made

    def load(self, name: str) -> torch.Tensor:
        return self.output(QualityPerceiver.from_pretrained(name))

    def output(self, made: QualityPerceiver) -> torch.Tensor:
        return made(IMAGE).tiers.detach()


class Adapter:
    """How an adapter is made, loaded and compared."""

    config, tensors = "adapter_config.json", "adapter_model.safetensors"

    def make(self, seed: int) -> Any:
        model = wrap(net(), config=AdapterConfig(rank=2))
        with torch.no_grad():
            for parameter in model.injector.parameters():
                parameter += 0.05 * (seed + 1)
        return model

    def load(self, name: str) -> torch.Tensor:
        return self.output(wrap(net(), name, is_trainable=True))

    def output(self, made: Any) -> torch.Tensor:
        return made(IMAGE).detach()


@pytest.fixture(params=[Perceiver(), Adapter()], ids=["perceiver", "adapter"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def push(kind: Any, seed: int = 0, **options: Any) -> torch.Tensor:
    """Push a new checkpoint, and return its output."""
    made = kind.make(seed)
    assert "/commit/" in made.push_to_hub(REPO, token=TOKEN, **options)
    return kind.output(made)


def loads(kind: Any, expected: torch.Tensor, name: str = REPO) -> None:
    """Check that a load gives that output and warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(kind.load(name), expected)


TROUBLES: dict[str, str] = {
    "dead": "Check the network and try again",
    "hang up": "Check the network and try again",
    "500": "Check the network and try again",
    "401": "hf auth login",
    "404": "Check the spelling",
    "offline": "downloaded before",
}


def trouble(hub: HubServer, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    if what == "dead":
        hub.stop()
    elif what == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.fault = what


def test_pushed_in_private_and_loaded(
    kind: Any, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = push(kind, private=True, figures={"PSNR, rain (dB)": 31.234, "images": 100})
    assert hub.private == {REPO}
    assert hub.repos[REPO].keys() == {kind.config, kind.tensors, "README.md"}
    card = hub.repos[REPO]["README.md"].decode()
    assert "| PSNR, rain (dB) | 31.23 |\n| images | 100 |" in card
    with pytest.raises(CheckpointError, match=r"401.*hf auth login"):
        kind.load(REPO)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    loads(kind, expected)
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    loads(kind, expected)
    trouble(hub, monkeypatch, "offline")
    loads(kind, expected)


def test_options_of_an_adapter(hub: HubServer, tmp_path: Path) -> None:
    """It and its perceiver are private, and come by one token; the revision is its own."""
    Perceiver().make(0).push_to_hub("user/eye", token=TOKEN, private=True)
    with pytest.raises(CheckpointError, match="401"):
        wrap(net(), perceiver="user/eye")
    hub.tags["user/eye", "v1"] = dict(hub.repos["user/eye"])
    model = wrap(net(), perceiver="user/eye", token=TOKEN, revision="v1")
    assert model.perceiver_name == "user/eye@v1"
    Perceiver().make(1).push_to_hub("user/eye", token=TOKEN)
    model.push_to_hub(REPO, token=TOKEN, private=True, figures={"images": 3})
    hub.tags[REPO, "v1"] = dict(hub.repos[REPO])
    with pytest.raises(CheckpointError, match="401"):
        wrap(net(), REPO)
    options: Any = {"revision": "v1", "token": TOKEN, "cache_dir": tmp_path / "other"}
    loaded = wrap(net(), REPO, **options)
    assert torch.equal(loaded(IMAGE), model(IMAGE))
    loaded.add_adapter("more", REPO, **options)
    loaded.hotswap_adapter(REPO, **options)
    served = len(hub.asked)
    wrap(net(), REPO, local_files_only=True, **options)
    assert len(hub.asked) == served
    for call in (wrap, lambda _, **given: loaded.add_adapter("x", **given)):
        with pytest.raises(ConfigError, match="of no Hub repository"):
            call(net(), token=TOKEN)
        with pytest.raises(TypeError, match="unexpected keyword argument 'tokens'"):
            call(net(), tokens=TOKEN)
    wrap(net(), token=None, local_files_only=False)


def test_no_path_of_this_machine_is_pushed(hub: HubServer, tmp_path: Path) -> None:
    Perceiver().make(0).save_pretrained(tmp_path / "eye")
    model = wrap(net(), perceiver=tmp_path / "eye")
    model.push_to_hub(REPO, token=TOKEN)
    assert str(tmp_path) not in hub.repos[REPO][Adapter.config].decode()
    with pytest.raises(CheckpointError, match="it is not here; give that one as perceiver="):
        wrap(net(), REPO)
    assert torch.equal(wrap(net(), REPO, perceiver=tmp_path / "eye")(IMAGE), model(IMAGE))


def test_a_card_of_others_is_kept(kind: Any, hub: HubServer, tmp_path: Path) -> None:
    push(kind)
    card = hub.repos[REPO]["README.md"]
    for text in (card + b"more", b"# By hand"):
        hub.repos[REPO]["README.md"] = text
        with pytest.warns(UserWarning, match=f"'{REPO}' has a README.md that is not a model card"):
            expected = push(kind, seed=1)
        assert hub.repos[REPO]["README.md"] == text
        loads(kind, expected)
    hub.repos[REPO]["README.md"] = card
    push(kind)
    assert b"not edited since" in hub.repos[REPO]["README.md"]
    kind.make(0).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# Anew")
    push_folder(tmp_path, REPO, token=TOKEN)
    assert hub.repos[REPO]["README.md"] == b"# Anew"


def test_nothing_is_pushed_inside_a_fold(hub: HubServer) -> None:
    model = wrap(net())
    with (
        model.fold(model.perceive(IMAGE)),
        pytest.raises(PerceptionError, match=r"fold\(\) is under way"),
    ):
        model.push_to_hub(REPO, token=TOKEN)
    assert not hub.repos


def test_options_of_from_pretrained(hub: HubServer, tmp_path: Path) -> None:
    kind = Perceiver()
    expected = push(kind, private=True)
    hub.tags[REPO, "v1"] = dict(hub.repos[REPO])
    options = {"revision": "v1", "cache_dir": tmp_path / "other"}
    loaded = QualityPerceiver.from_pretrained(REPO, token=TOKEN, **options)
    assert torch.equal(kind.output(loaded), expected)
    served = len(hub.asked)
    local = QualityPerceiver.from_pretrained(REPO, local_files_only=True, **options)
    assert torch.equal(kind.output(local), expected)
    assert len(hub.asked) == served
    with pytest.raises(CheckpointError, match=r"@v1' .*Give one revision"):
        QualityPerceiver.from_pretrained(f"{REPO}@v1", revision="v2")
    with pytest.raises(CheckpointError, match="cannot push"):
        kind.make(0).push_to_hub(REPO, token="hf_wrong")


def test_revisions(kind: Any, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    first = push(kind)
    hub.tags[REPO, "v1"] = dict(hub.repos[REPO])
    second = push(kind, seed=1)
    assert not torch.equal(first, second)
    loads(kind, first, f"{REPO}@v1")
    loads(kind, second)
    with pytest.raises(CheckpointError, match=r"revision 'v9'.*Check the spelling and the rev"):
        kind.load(f"{REPO}@v9")
    del hub.tags[REPO, "v1"]
    with pytest.warns(UserWarning, match=r"copy downloaded before.*is used: .*'v1'"):
        assert torch.equal(kind.load(f"{REPO}@v1"), first)
    trouble(hub, monkeypatch, "dead")
    loads(kind, first, f"{REPO}@v1")
    loads(kind, second)


@pytest.mark.parametrize("what", TROUBLES)
def test_trouble(kind: Any, hub: HubServer, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    expected = push(kind)
    hub.repos["user/other"] = dict(hub.repos[REPO])
    loads(kind, expected)
    trouble(hub, monkeypatch, what)
    if what == "hang up":  # the client takes this for a fault of its own, not of the network
        with pytest.warns(UserWarning, match="copy downloaded before"):
            assert torch.equal(kind.load(REPO), expected)
    else:
        loads(kind, expected)
    with pytest.raises(CheckpointError, match=f"download 'user/other'.*{TROUBLES[what]}"):
        kind.load("user/other")


def test_a_cache_that_nobody_may_write_to(
    kind: Any, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads(kind, expected := push(kind))
    trouble(hub, monkeypatch, "hang up")

    def refuse(path: Path, text: str) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.warns(UserWarning, match="copy downloaded before"):
        assert torch.equal(kind.load(REPO), expected)


def test_damaged_download_is_not_kept(
    kind: Any, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = push(kind)
    hub.fault = "changed"
    with pytest.raises(CheckpointError, match=r"truncated or changed.*downloads it again"):
        kind.load(REPO)
    assert hub.served.count(kind.tensors) == 2
    hub.fault = None
    loads(kind, expected)
    trouble(hub, monkeypatch, "dead")
    loads(kind, expected)


def test_damaged_copy_without_the_hub(
    kind: Any, hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = push(kind)
    loads(kind, expected)
    damaged = next((tmp_path / "cache").glob(f"*/snapshots/*/{kind.tensors}"))
    damaged.write_bytes(damaged.read_bytes()[:-8])
    hub.fault = "500"
    with pytest.raises(CheckpointError, match="truncated or changed") as caught:
        kind.load(REPO)
    named = re.search(r"or delete '(.+?)'", str(caught.value))
    assert named is not None
    shutil.rmtree(named[1])
    hub.fault = None
    loads(kind, expected)
    trouble(hub, monkeypatch, "offline")
    loads(kind, expected)


def test_damaged_config_is_not_kept(kind: Any, hub: HubServer) -> None:
    expected = push(kind)
    hub.fault, hub.faulty = "changed", ".json"
    hub.repos[REPO][kind.config] = hub.repos[REPO][kind.config].rstrip()
    with pytest.raises(CheckpointError, match=r"is not JSON.*downloads it again"):
        kind.load(REPO)
    hub.fault = None
    loads(kind, expected)


def test_failed_update_keeps_the_copy(
    kind: Any, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = push(kind)
    loads(kind, first)
    second = push(kind, seed=1)
    hub.fault = "short"
    with pytest.warns(UserWarning, match="copy downloaded before.*Consistency check failed"):
        assert torch.equal(kind.load(REPO), first)
    hub.fault = "500"
    loads(kind, first)
    hub.fault = None
    loads(kind, second)
    trouble(hub, monkeypatch, "dead")
    loads(kind, second)


def test_a_transport_that_fails_untyped(
    kind: Any, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hf_xet raises RuntimeError alone, and so does the client where an upload's part fails."""
    loads(kind, expected := push(kind))
    hub.repos["user/other"] = dict(hub.repos[REPO])
    download = huggingface_hub.snapshot_download

    def dead(*args: Any, **options: Any) -> str:
        if options.get("local_files_only"):
            return download(*args, **options)
        raise RuntimeError("Data processing error: CAS service error: connection refused")

    def refused(*_: Any, **__: Any) -> None:
        cause = OSError("403 Forbidden")
        cause.response = SimpleNamespace(status_code=403)  # type: ignore[attr-defined]
        raise RuntimeError("Error while uploading 'a.safetensors' to the Hub.") from cause

    monkeypatch.setattr(huggingface_hub, "snapshot_download", dead)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", refused)
    with pytest.warns(UserWarning, match="copy downloaded before.*is used: .*CAS service error"):
        assert torch.equal(kind.load(REPO), expected)
    with pytest.raises(CheckpointError, match=r"'user/other'.*CAS service error.*Check the net"):
        kind.load("user/other")
    with pytest.raises(CheckpointError, match=r"cannot push .*while uploading.*hf auth login"):
        push(kind)


def test_wrong_etag(kind: Any, hub: HubServer) -> None:
    """The client takes a known ETag for a file that it has, and gives the old tensors."""
    hub.fault = "etag"
    loads(kind, push(kind))
    loads(kind, push(kind, seed=1))
    assert hub.served.count(kind.tensors) == 2


def test_truncated_body(hub: HubServer) -> None:
    """The client tries six times, a second apart."""
    kind = Perceiver()
    expected = push(kind)
    hub.fault = "cut"
    with pytest.raises(CheckpointError, match=r"RemoteProtocolError.*try again"):
        kind.load(REPO)
    hub.fault = None
    loads(kind, expected)


@pytest.mark.parametrize("rest", [["config"], []], ids=["config", "alone"])
def test_pickle_only(kind: Any, hub: HubServer, rest: list[str]) -> None:
    push(kind)
    files = {getattr(kind, name): hub.repos[REPO][getattr(kind, name)] for name in rest}
    hub.repos[REPO] = {**files, "adapter_model.bin": b"\x80\x04."}
    with pytest.raises(CheckpointError, match=f"adapter_model.bin.*{kind.tensors}.*Pickle"):
        kind.load(REPO)
    assert "adapter_model.bin" not in hub.served
    hub.repos[REPO] = {"README.md": b"# Nothing"}
    with pytest.raises(CheckpointError, match=r"holds README.md: expected .* Check the name"):
        kind.load(REPO)


def test_nothing_but_a_checkpoint_is_moved(kind: Any, hub: HubServer, tmp_path: Path) -> None:
    made = kind.make(0)
    made.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "options.json").write_text("{}")
    push_folder(tmp_path / "run", REPO, token=TOKEN)
    own = {kind.config, kind.tensors, "README.md"}
    assert hub.repos[REPO].keys() == own
    others = dict.fromkeys(["model.safetensors", f"unet/{kind.tensors}", "config.json"], b"{}")
    hub.repos[REPO] |= others
    loads(kind, kind.output(made))
    assert set(hub.served) == own
    hub.served.clear()
    hub.repos["user/large"] = {**others, "README.md": b"# Large"}
    with pytest.raises(CheckpointError, match=rf"holds .*model.*: expected {kind.config} and"):
        kind.load("user/large")
    assert hub.served == ["README.md"]


def change(hub: HubServer, kind: Any, where: str, value: Any) -> None:
    """Set a field of a pushed config; "@1e999" is written as that number."""
    config = json.loads(hub.repos[REPO][kind.config])
    inner = config
    *path, last = where.split(".")
    for key in path:
        inner = inner[key]
    inner[last] = value
    text = json.dumps(config).replace('"@1e999"', "1e999")
    hub.repos[REPO][kind.config] = text.encode()


VISION, TEXT = CLIP["vision_cfg"], CLIP["text_cfg"]
HOSTILE: list[tuple[Any, str, Any, str]] = [
    (Perceiver(), "clip", "hf-hub:evil/clip", "clip='hf-hub:evil/clip': expected a plain name"),
    (Perceiver(), "clip", "../../etc/passwd", "expected a plain name"),
    (Perceiver(), "clip", "x" * 10**6, "expected a plain name"),
    (Perceiver(), "clip", [], "clip: expected"),
    (Perceiver(), "clip.embed_dim", "@1e999", "not JSON"),
    (Perceiver(), "clip.embed_dim", float("nan"), "not JSON"),
    (Perceiver(), "clip.text_cfg", {**TEXT, "hf_model_name": "evil/text"}, "a plain name"),
    (
        Perceiver(),
        "clip.text_cfg",
        {**TEXT, "hf_model_name": "roberta-base"},
        "causal text tower",
    ),
    (Perceiver(), "clip.vision_cfg.timm_model_name", "hf-hub:evil/vit", "a plain name"),
    (Perceiver(), "clip.vision_cfg.timm_model_name", "local-dir:/etc", "a plain name"),
    (Perceiver(), "clip.vision_cfg.image_size", 65_536, "image_size=65536: expected at most 2048"),
    (Perceiver(), "clip.text_cfg.context_length", 60_000, "context_length=60000: expected at most"),
    (Perceiver(), "context_length", 60_000, "context_length=60000: expected"),
    (Perceiver(), "views", True, "views: expected int, found bool"),
    (Perceiver(), "pretrained", "/etc/passwd", "pretrained='/etc/passwd': expected a plain name"),
    (Perceiver(), "pretrained", "hf-hub:evil/clip", "expected a plain name"),
    (Adapter(), "config.semantic", "hf-hub:evil/vit", "no model of timm"),
    (Adapter(), "config.rank", "@1e999", "not JSON"),
    (Adapter(), "config.condition_dim", 10**15, "describes no adapter|of another shape"),
    (Adapter(), "plan.sites", {}, "plan.sites: expected"),
    (Adapter(), "perceiver", {"fingerprint": "0", "name": "hf-hub:evil/p"}, "form of a Hub"),
    (Adapter(), "perceiver", {"fingerprint": "0", "name": "../../etc"}, "form of a Hub|missing"),
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("kind", "where", "value", "message"), HOSTILE)
def test_hostile_config(kind: Any, where: str, value: Any, message: str, hub: HubServer) -> None:
    push(kind)
    change(hub, kind, where, value)
    with pytest.raises(CheckpointError, match=message) as caught:
        kind.load(REPO)
    assert len(str(caught.value)) < 3000
    assert all(REPO in path for path in hub.asked)


def test_named_clip_of_another_library_is_not_downloaded(hub: HubServer) -> None:
    push(Perceiver())
    change(hub, Perceiver(), "clip", "xlm-roberta-base-ViT-B-32")
    change(hub, Perceiver(), "pretrained", "laion5b_s13b_b90k")
    with pytest.raises(CheckpointError, match="not one of open_clip's own"):
        Perceiver().load(REPO)
    assert all(REPO in path for path in hub.asked)


def test_unknown_fields_warn_and_load(kind: Any, hub: HubServer) -> None:
    expected = push(kind)
    change(hub, kind, "from_the_future", {"a": [1]})
    with pytest.warns(UserWarning, match="ignoring unknown keys from_the_future"):
        assert torch.equal(kind.load(REPO), expected)


def test_figures_are_finite(tmp_path: Path) -> None:
    for value in (float("nan"), np.float32("inf")):
        with pytest.raises(ValueError, match=r"figures\['PSNR'\]=(nan|inf)"):
            Perceiver().make(0).save_pretrained(tmp_path, figures={"PSNR": value})
    Perceiver().make(0).save_pretrained(tmp_path, figures={"PSNR": np.float32(31.234)})
    assert "| PSNR | 31.23 |" in (tmp_path / "README.md").read_text()


def test_a_folder_inside_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot make the folder"):
        Perceiver().make(0).save_pretrained(tmp_path / "file" / "folder")


def test_a_name_alone_is_of_the_user_whose_token_it_is(kind: Any, hub: HubServer) -> None:
    made = kind.make(0)
    made.push_to_hub(REPO.removeprefix("user/"), token=TOKEN)
    assert list(hub.repos) == [REPO]
    loads(kind, kind.output(made))
