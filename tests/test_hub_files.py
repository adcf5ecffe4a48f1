"""Folders of JSON and safetensors, and their way to the Hub and back over real HTTP."""

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import TOKEN, HubServer
from safetensors.torch import save_file

from perceive_adapter.errors import CheckpointError, ConfigError
from perceive_adapter.folders import load_folder, save_folder
from perceive_adapter.hub import push_folder, resolve

CARD = "---\nlibrary_name: perceive_adapter\ntags: [adapter]\n---\n# Card\n"
NAMES = ("adapter_config.json", "adapter_model.safetensors")
CONFIG: dict[str, Any] = {"rank": 4, "sites": ["a", "b"], "note": "naïve", "alpha": None}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=generator)
    return {"a.weight": weight, "a.tied": weight, "b": weight.half().T, "scale": torch.tensor(3.0)}


def save(folder: Path | str, config: dict[str, Any] = CONFIG, card: str = CARD) -> Path:
    return save_folder(
        folder,
        config=config,
        tensors=tensors(),
        config_name=NAMES[0],
        tensors_name=NAMES[1],
        card=card,
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "new" / "folder")


def test_round_trip_is_exact(saved: Path) -> None:
    config, loaded = load_folder(saved, *NAMES)
    assert config == CONFIG
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert (saved / "README.md").read_text().startswith(CARD)


def test_folder_holds_three_ordinary_files(saved: Path, tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert sorted(f.name for f in saved.iterdir()) == sorted([*NAMES, "README.md"])
    for file in saved.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_saving_again_replaces(saved: Path) -> None:
    save(saved, {"rank": 8}, card=CARD.replace("Card", "Other"))
    assert load_folder(saved, *NAMES)[0] == {"rank": 8}
    assert "# Other" in (saved / "README.md").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "# My project\n",
        "",
        "---\nlibrary_name: peft\n---\nlibrary_name: perceive_adapter\n",
        "---\nlibrary_name: perceive_adapter_fork\n---\n",
        "library_name: perceive_adapter\n",
    ],
)
def test_a_card_of_others_is_kept(saved: Path, text: str) -> None:
    (saved / "README.md").write_text(text)
    with pytest.warns(UserWarning, match=r"README.md' is not a model card.*is kept.*Move it away"):
        save(saved, {"rank": 8})
    assert (saved / "README.md").read_text() == text
    assert load_folder(saved, *NAMES)[0] == {"rank": 8}


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_card_of_its_own_is_replaced(saved: Path, ends: str) -> None:
    card = saved / "README.md"
    card.write_bytes(card.read_bytes().replace(b"\n", ends.encode()))
    save(saved, card="# Another")
    assert card.read_text().startswith("# Another\n")


@pytest.mark.parametrize("edit", [("# Card\n", "# Card\nMine.\n"), ("[adapter]", "[mine]")])
def test_a_card_of_its_own_that_was_edited_is_kept(saved: Path, edit: tuple[str, str]) -> None:
    card = saved / "README.md"
    text = card.read_text().replace(*edit)
    card.write_text(text)
    with pytest.warns(UserWarning, match=r"as perceive_adapter wrote it, and is kept"):
        save(saved, {"rank": 8}, card="# Another")
    assert card.read_text() == text


def test_failed_save_leaves_the_old_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    with pytest.raises(ConfigError, match="JSON"):
        save(saved, {"rank": float("nan")})
    with pytest.raises(ConfigError, match="JSON"):
        save(saved, {"rank": object()})

    def full_disk(draft: Path, _: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(draft))

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(
        CheckpointError, match=r"cannot save to '.*folder': No space left on dev"
    ) as e:
        save(saved)
    assert "/." not in str(e.value)  # the draft is nobody's business
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_files_are_on_the_disk_before_they_have_their_names(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    synced, replaced = os.fsync, os.replace

    def fsync(file: int) -> None:
        synced(file)
        done.append("written")

    def replace(draft: Path, target: Path) -> None:
        replaced(draft, target)
        done.append(target.name)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save(saved)
    assert done == ["written", NAMES[1], "written", NAMES[0], "written", "README.md"]


def test_save_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"it is a file.*name of a folder"):
        save(tmp_path / "file")


def test_save_refuses_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot save to ''.*or '\.' for this one"):
        save("")
    assert not any(tmp_path.iterdir())


def damage_tensors(folder: Path, how: str) -> None:
    file = folder / NAMES[1]
    data = file.read_bytes()
    if how == "truncated":
        file.write_bytes(data[:-5])
    elif how == "tampered":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "foreign":
        save_file({"a.weight": torch.zeros(2)}, file)
    elif how == "lfs":
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    else:
        file.unlink()
        if how == "pickle":
            (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "SHA-256.*truncated or changed.*whole folder again"),
        ("tampered", "SHA-256.*truncated or changed"),
        ("foreign", "belongs to another save"),
        ("lfs", "git lfs pull"),
        ("missing", "adapter_model.safetensors.*missing.*README.md"),
        ("pickle", "Pickle is never loaded"),
    ],
)
def test_damaged_tensors(saved: Path, how: str, message: str) -> None:
    damage_tensors(saved, how)
    with pytest.raises(CheckpointError, match=message):
        load_folder(saved, *NAMES)


def test_tensors_that_are_no_safetensors(saved: Path) -> None:
    (saved / NAMES[1]).write_bytes(b"\xff" * 64)
    config = json.loads((saved / NAMES[0]).read_text())
    config["sha256"] = hashlib.sha256(b"\xff" * 64).hexdigest()
    (saved / NAMES[0]).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_folder(saved, *NAMES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{'rank': 4}", "not JSON"),
        ('{"rank": NaN}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"rank": ' + "9" * 5000 + "}", "not JSON"),
        ("\udcff", "not JSON"),
        ("[1, 2]", "JSON list: expected an object"),
        (" " * (16 * 2**20 + 1), "expected at most"),
        ("{}", "sha256=None: expected"),
        ('{"sha256": 7}', "sha256=7: expected"),
        ('{"sha256": "' + "g" * 9999 + '"}', r"sha256='g{199}\.\.\.: expected"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else None,
)
def test_hostile_config(saved: Path, text: str, message: str) -> None:
    (saved / NAMES[0]).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_folder(saved, *NAMES)
    assert len(str(caught.value)) < 2000


def test_what_is_not_a_checkpoint_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        load_folder(tmp_path / "file", *NAMES)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_folder(tmp_path / "none", *NAMES)
    with pytest.raises(CheckpointError, match=r"adapter_config.json.*missing.*\['file'\]"):
        load_folder(tmp_path, *NAMES)


def test_resolve_without_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # what lies around elsewhere is nobody's business
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path), revision="main") == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(tmp_path / "file")
    bad = ["a/b/c", "./none", "../none", "none", "", "user/repo\n", "a/b@../c", "a/b@/c"]
    for name in [tmp_path / "none", *bad]:
        with pytest.raises(CheckpointError, match="Check the path"):
            resolve(name)
    with pytest.raises(CheckpointError, match="save_pretrained first"):
        push_folder(tmp_path / "none", "user/repo")


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def client(code: str, url: str, home: Path, *args: object, **env: str) -> str:
    """Run code in a process of its own, since huggingface_hub reads HF_ENDPOINT at import."""
    prelude = "import sys\nfrom perceive_adapter import hub\nargs = sys.argv[1:]\n"
    failure = "\nexcept hub.CheckpointError as e:\n    print('CheckpointError', e)"
    body = "".join(f"    {line}\n" for line in code.splitlines())
    quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", f"{prelude}try:\n{body}{failure}", *map(str, args)],
        env={**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), **quiet, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_hub_round_trip(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    (saved / "evil.bin").write_bytes(b"\x80\x04.")
    push = "print(hub.push_folder(args[0], 'user/rain', private=True, token=args[1]))"
    assert "/commit/" in client(push, hub.url, tmp_path / "home", saved, TOKEN)
    assert hub.repos["user/rain"].keys() == {*NAMES, "README.md"}
    assert hub.private == {"user/rain"}

    hub.repos["user/rain"]["weights.bin"] = b"\x80\x04."
    pull = "print(hub.resolve('user/rain', token=args[0]))"
    folder = Path(client(pull, hub.url, tmp_path / "home", TOKEN))
    assert {file.name for file in folder.iterdir()} == {*NAMES, "README.md"}
    config, loaded = load_folder(folder, *NAMES)
    assert config == CONFIG
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors().items())

    served = len(hub.served)
    offline = "print(hub.resolve('user/rain', local_files_only=True))"
    assert Path(client(offline, hub.url, tmp_path / "home")) == folder
    assert Path(client(pull, hub.url, tmp_path / "home", "", HF_HUB_OFFLINE="1")) == folder
    assert len(hub.served) == served


def test_hub_refusals(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    hub.repos["user/secret"] = {}
    hub.private.add("user/secret")
    code = """\
for call in (
    lambda: hub.resolve('user/none'),
    lambda: hub.resolve('user/secret'),
    lambda: hub.resolve('user/--bad'),
    lambda: hub.resolve('user/none', local_files_only=True),
    lambda: hub.push_folder(args[0], 'user/new', token='hf_wrong'),
):
    try:
        print(call())
    except hub.CheckpointError as error:
        print(str(error).replace(chr(10), ' '))
"""
    missing, secret, bad, local, push = client(code, hub.url, tmp_path, saved).splitlines()
    assert "cannot download 'user/none', which is not a local folder either" in missing
    assert "Check the spelling" in missing
    assert "cannot download 'user/secret'" in secret
    assert "hf auth login" in secret
    assert "Give a repository as 'user/repo'" in bad
    assert "Check the network" in local
    assert "to 'user/new'" in push
    assert "hf auth login" in push


def test_dead_hub(saved: Path, tmp_path: Path) -> None:
    with HubServer() as server:
        url = server.url
    start = time.monotonic()
    code = """\
for call in (
    lambda: hub.resolve('user/rain'),
    lambda: hub.push_folder(args[0], 'user/rain', token='t'),
):
    try:
        print(call())
    except hub.CheckpointError as error:
        print(str(error).replace(chr(10), ' '))
"""
    pull, push = client(code, url, tmp_path, saved).splitlines()
    code = "print(hub.push_folder(args[0], 'user/rain'))"
    offline = client(code, url, tmp_path, saved, HF_HUB_OFFLINE="1")
    assert pull.startswith("cannot download")
    assert "Check the network" in pull
    assert push.startswith("cannot push")
    assert "Check the network" in push
    assert "Unset HF_HUB_OFFLINE" in offline
    assert time.monotonic() - start < 60


def test_imports_no_hub_client() -> None:
    code = "import sys, perceive_adapter.hub; print('huggingface_hub' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
