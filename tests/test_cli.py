"""The command line, run as users run it: real files, real training, real kills."""

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from perceive_adapter import ConfigError, ImageError, QualityPerceiver, UnseenTaskWarning
from perceive_adapter.cli import COMMANDS, _parsers, main
from perceive_adapter.cli.finetune_data import TrainingFiles, find_data
from perceive_adapter.cli.options import device, integer, rate, read_path, with_config
from perceive_adapter.data import FAMILIES, KINDS
from perceive_adapter.data.contents import content_digest
from perceive_adapter.data.pairs import Pair, read_pair
from perceive_adapter.data.photos import load_photos
from perceive_adapter.perceiver.towers import build_clip
from perceive_adapter.training.holdout import set_aside
from perceive_adapter.training.pretrain import TinyTowers, as_perceiver
from perceive_adapter.training.runs import audit_elsewhere, split_photos

TINY_VIT: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1},
}
SCENES = ("astronaut", "camera", "chelsea", "coffee", "rocket", "brick")
QUICK = ["--scenes", "2", "--sides", "32", "40", "--device", "cpu"]
RESTORERS = ["--restorer-steps", "2"]
LENGTHS = ["--pretrain-steps", "3", "--steps", "60", "--checkpoint-every", "1"]
KILLED = ["--clip", "perceive-tiny", *LENGTHS, *RESTORERS]
WEIGHTS = "perceiver_model.safetensors"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photographs, one of them gray, in two folders."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for index, scene in enumerate(SCENES):
        image = Image.fromarray(getattr(skimage.data, scene)())
        image.thumbnail((96, 96))
        image.save(folder / ("more" if index % 2 else ".") / f"{scene}.png")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small perceiver, its prompts moved so that it does not warn."""
    perceiver = QualityPerceiver.create(TINY_VIT, None, context_length=4, degradations=FAMILIES)
    with torch.no_grad():
        perceiver.prompts.context += 0.1
    return perceiver.save_pretrained(tmp_path_factory.mktemp("perceiver"))


def perceive(*arguments: object) -> int:
    return main(["perceive", *map(str, arguments)])


def train(*arguments: object) -> int:
    return main(["train-perceiver", *map(str, arguments), *QUICK])


# perceive


def test_a_table(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the perceiver that comes with the package."""
    assert perceive(photos) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["file", "score", "tier", "degradations", "and", "their", "severity"]
    assert len(rows) == len(SCENES)
    bundled = QualityPerceiver.from_pretrained("perceive-tiny")
    for row, name in zip(rows, sorted(photos.rglob("*.png")), strict=True):
        file, score, tier, *_ = row.split()
        assert file == str(name)
        assert 0 <= float(score) <= 1
        assert tier in bundled.tiers


def test_the_table_lists_what_is_present(tmp_path: Path, saved: Path, capsys: Any) -> None:
    Image.new("RGB", (40, 40), "gray").save(tmp_path / "gray.png")
    chosen = QualityPerceiver.from_pretrained(saved)
    with torch.no_grad():
        chosen.heads.presence.weight.zero_()
        chosen.heads.presence.bias.copy_(torch.tensor([-9.0, 9, 9, -9, -9, -9]))
        chosen.heads.severity.weight.zero_()
        chosen.heads.severity.bias.copy_(torch.tensor([9.0, -1, 1, 0, 0, 0]))
    chosen.save_pretrained(tmp_path / "p")
    assert perceive(tmp_path / "gray.png", "--perceiver", tmp_path / "p") == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert row.endswith(f"{FAMILIES[2].replace('_', ' ')} 0.73, {FAMILIES[1]} 0.27")
    with torch.no_grad():
        chosen.heads.presence.bias.fill_(-9)
    chosen.save_pretrained(tmp_path / "p")
    assert perceive(tmp_path / "gray.png", "--perceiver", tmp_path / "p") == 0
    assert capsys.readouterr().out.endswith("  none\n")


def test_json_agrees_with_the_perceiver(photos: Path, saved: Path, capsys: Any) -> None:
    perceiver = QualityPerceiver.from_pretrained(saved)
    assert perceive(photos, "--json", "--perceiver", saved) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["file"] for record in records] == [str(p) for p in sorted(photos.rglob("*.png"))]
    for record in records:
        pixels = np.array(Image.open(record["file"]).convert("RGB"))
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            expected = perceiver(image)
        assert record["score"] == pytest.approx(expected.score.item(), abs=1e-6)
        assert list(record["tiers"]) == list(perceiver.tiers)
        assert list(record["tiers"].values()) == pytest.approx(expected.tiers[0].tolist(), abs=1e-6)
        assert record["tier"] == perceiver.tiers[int(expected.tiers.argmax())]
        assert list(record["severity"]) == list(FAMILIES)
        for name in ("degradations", "severity"):
            values = getattr(expected, name)[0].tolist()
            assert list(record[name].values()) == pytest.approx(values, abs=1e-6)
        assert record["embedding"] == pytest.approx(expected.embedding[0].tolist(), abs=1e-6)


def test_maps(tmp_path: Path, saved: Path, capsys: Any) -> None:
    """Each of its image's size, none in another's place, no input overwritten."""
    sizes = {"a.png": (50, 30), "b/a.png": (33, 70), "a-quality.png": (20, 20), "c.jpg": (1, 1)}
    (tmp_path / "b").mkdir()
    for name, size in sizes.items():
        Image.new("RGB", size, "gray").save(tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in sizes}
    given = [tmp_path / name for name in sizes]
    code = perceive(*given, "--json", "--map", tmp_path, "--perceiver", saved)
    assert code == 0
    records = json.loads(capsys.readouterr().out)
    maps = {name: Path(record["map"]) for name, record in zip(sizes, records, strict=True)}
    assert len(set(maps.values())) == len(sizes)
    for name, size in sizes.items():
        assert Image.open(maps[name]).size == size
        assert (tmp_path / name).read_bytes() == before[name]


def test_maps_are_not_perceived_again(tmp_path: Path, saved: Path, capsys: Any) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 20), "gray").save(tmp_path / name)
    given = ["--json", "--map", tmp_path / "maps", "--perceiver", saved]
    for _ in range(2):
        assert perceive(tmp_path, *given) == 0
        assert len(json.loads(capsys.readouterr().out)) == 2
    assert len(list((tmp_path / "maps").iterdir())) == 2
    (tmp_path / "maps" / "more").mkdir()
    shutil.copy(tmp_path / "a.png", tmp_path / "maps" / "more")
    assert perceive(tmp_path / "maps" / "more", *given) == 0  # it is what is asked for
    assert len(json.loads(capsys.readouterr().out)) == 1
    (tmp_path / "link").symlink_to("maps")
    for folder in ("maps", "link"):
        assert perceive(tmp_path / folder, *given) == 2
        assert "maps is a folder that is searched for images" in capsys.readouterr().err
    assert perceive(tmp_path, "--map", tmp_path / "a.png", "--perceiver", saved) == 2
    assert "a.png' is a file: give the name of a folder" in capsys.readouterr().err


def test_a_map_that_cannot_be_written(tmp_path: Path, saved: Path, capsys: Any) -> None:
    long = f"{'q' * 246}.png"  # the map's name has a few characters more
    for name in (long, "z.png"):
        Image.new("RGB", (20, 20), "gray").save(tmp_path / name)
    maps = tmp_path / "maps"
    assert perceive(tmp_path, "--json", "--map", maps, "--perceiver", saved) == 1
    captured = capsys.readouterr()
    assert "cannot be written: " in captured.err
    records = {Path(record["file"]).name: record for record in json.loads(captured.out)}
    assert "map" not in records[long]
    assert Path(records["z.png"]["map"]).is_file()


def test_links_that_lead_nowhere(tmp_path: Path, saved: Path, capsys: Any) -> None:
    Image.new("RGB", (20, 20), "gray").save(tmp_path / "a.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    paths = [tmp_path / "loop.png", tmp_path / "a.png", tmp_path / "links"]
    assert perceive(*paths, "--map", tmp_path / "maps", "--perceiver", saved) == 1
    errors = capsys.readouterr().err
    assert "loop.png" in errors
    assert "dangling.png' is a link to a file that is not there" in errors


def test_where_nothing_can_be_perceived(tmp_path: Path, saved: Path) -> None:
    Image.new("CMYK", (20, 20)).save(tmp_path / "cmyk.jpg")
    (tmp_path / "empty").mkdir()
    for given in (tmp_path / "cmyk.jpg", tmp_path / "none.png", tmp_path / "empty"):
        assert perceive(given, "--perceiver", saved) == 2


def test_a_map_shows_where_the_quality_is_low(tmp_path: Path) -> None:
    from perceive_adapter.cli.perceive import _draw

    quality = torch.tensor([[0.0, 1.0]])
    _draw(torch.full((3, 40, 80), 128, dtype=torch.uint8), quality, tmp_path / "map.png")
    drawn = np.array(Image.open(tmp_path / "map.png")).astype(int)
    red, _, blue = drawn.transpose(2, 0, 1)
    assert (red - blue)[:, :20].min() > 20
    assert (blue - red)[:, 60:].min() > 20


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P"])
def test_kinds_of_image(mode: str, tmp_path: Path, saved: Path, capsys: Any) -> None:
    file = tmp_path / "image.png"
    Image.fromarray(skimage.data.chelsea()[:64, :48]).convert(mode).save(file)
    assert perceive(file, "--json", "--map", tmp_path, "--perceiver", saved) == 0
    record = json.loads(capsys.readouterr().out)[0]
    assert Image.open(record["map"]).size == (48, 64)


def test_unreadable_files(photos: Path, tmp_path: Path, saved: Path, capsys: Any) -> None:
    """They are named, with the remedy, and the others are done."""
    whole = (photos / "astronaut.png").read_bytes()
    bad = {"text.jpg": b"no image", "cut.png": whole[: len(whole) // 2]}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    (tmp_path / "empty").mkdir()
    skipped = [*bad, "deep.png", "missing.png", "empty"]
    given = [photos, *(tmp_path / name for name in skipped)]
    assert perceive(*given, "--json", "--perceiver", saved) == 1
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == len(SCENES)
    complaints = captured.err.splitlines()
    for name in skipped:
        (complaint,) = (line for line in complaints if f"{tmp_path / name}: " in line)
        assert "leave this one out" in complaint or "Give a folder" in complaint
    assert "Traceback" not in captured.err


def test_an_image_with_more_pixels_than_pil_opens(
    tmp_path: Path, saved: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert perceive(tmp_path / "large.png", "--perceiver", saved) == 2
    complaint = capsys.readouterr().err
    assert "1600 pixels" in complaint
    assert "raise PIL.Image.MAX_IMAGE_PIXELS" in complaint
    assert "8-bit" not in complaint


def test_a_folder_that_cannot_be_listed(
    photos: Path, saved: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path) == photos / "more":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert perceive(photos, "--json", "--perceiver", saved) == 1
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == len(SCENES) // 2
    assert f"the folder '{photos}/more' cannot be listed (Permission denied)" in captured.err


def test_names_that_the_terminal_cannot_show(tmp_path: Path, saved: Path) -> None:
    names = ["été.png", os.fsdecode(b"\xff.png"), "plain.png"]
    for name in names:
        Image.new("RGB", (40, 40), "gray").save(tmp_path / name)
    told = [sys.executable, "-m", "perceive_adapter", "perceive", "--perceiver", str(saved)]
    told += [str(tmp_path), str(tmp_path / "né.png")]
    for encoding, shown, more in (
        ("ascii", r"\xe9t\xe9.png", []),
        ("utf-8", "été.png", []),
        ("ascii", "", ["--json"]),
    ):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        run = subprocess.run([*told, *more], env=environment, capture_output=True)
        assert b"Traceback" not in run.stderr
        assert run.returncode == 1  # one is missing
        printed = run.stdout.decode(encoding)
        if more:
            assert {Path(record["file"]).name for record in json.loads(printed)} == set(names)
            continue
        header, *rows = printed.splitlines()
        assert {Path(row.split()[0]).name for row in rows} == {shown, r"\udcff.png", "plain.png"}
        assert {row[header.index("score") - 1] for row in rows} == {" "}


def test_a_reader_who_has_enough_ends_it_quietly(photos: Path, saved: Path) -> None:
    told = [sys.executable, "-m", "perceive_adapter", "perceive", "--perceiver", str(saved)]
    run = subprocess.Popen([*told, photos], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert run.stderr.read() == b""
    assert run.wait() == 141


def test_an_unknown_perceiver(photos: Path, tmp_path: Path, capsys: Any) -> None:
    assert perceive(photos, "--perceiver", tmp_path) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "perceiver_config.json" in captured.err
    assert "Give the folder that save_pretrained wrote" in captured.err
    assert "Traceback" not in captured.err


def test_a_revision_is_of_the_hub_alone(photos: Path, saved: Path, capsys: Any) -> None:
    for name in ("perceive-tiny", saved):
        assert perceive(photos, "--perceiver", name, "--revision", "v9") == 2
        captured = capsys.readouterr()
        assert "--revision v9 is of a Hub repository" in captured.err
        assert captured.out == ""


def test_help_is_complete_and_fast() -> None:
    """It names every command, and loads neither torch nor anything else that is slow."""
    code = (
        "import sys; from perceive_adapter.cli import main\n"
        "try: main(['--help'])\n"
        "finally: sys.stderr.write(str([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr == "[]"
    for command in COMMANDS:
        assert command.NAME in run.stdout
        assert command.SUMMARY.split()[0] in run.stdout


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (integer(1, 9), ["1", "9"], ["0", "10", "2.5", "x", ""]),
        (rate, ["4e-5", "1"], ["0", "-1", "nan", "inf", "2", "x"]),
        (device, ["cpu", "auto"], ["gpu", "cpu:x", "", "cuda:99"]),
    ],
)
def test_values_of_options(read: Any, good: list[str], bad: list[str]) -> None:
    for text in good:
        read(text)
    for text in bad:
        with pytest.raises(Exception, match=r"expected|no such device"):
            read(text)


# train-perceiver


@pytest.fixture(scope="module")
def uninterrupted(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of perceive-tiny from scratch, restorers included, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert train("--data", photos, "--out", out, *KILLED) == 0
    return out, printed.getvalue()


def test_training_from_scratch(uninterrupted: tuple[Path, str]) -> None:
    out, printed = uninterrupted
    perceiver = QualityPerceiver.from_pretrained(out)
    assert perceiver.trained
    assert perceiver.degradations == FAMILIES
    audit = json.loads((out / "audit.json").read_text())
    mean, worst = audit["figures"]["mean"], audit["figures"]["worst"]
    assert len(audit["audited"]) == audit["photographs audited"] == 3
    assert audit["photographs trained on"] == 3
    gates = [(g["figure"], g["over"], g["at least"]) for g in audit["gates"]]
    assert gates == [
        ("tier accuracy", "mean", 0.85),
        ("tier accuracy", "worst", 0.75),
        ("triplets right", "mean", 0.7),
        ("monotonic", "mean", 0.9),
        ("monotonic", "worst", 0.8),
    ]
    assert f"| 0.75 | {worst['tier accuracy']:.3f} | m" in printed
    assert f"| mean | {mean['tier accuracy']:.3f} | " in printed
    card = (out / "README.md").read_text()
    assert f"(authors' gate: 0.85) | {mean['tier accuracy']:.4g} |" in card
    assert "| medium images | restored |" in card


def test_training_from_the_towers_of_another(
    uninterrupted: tuple[Path, str], photos: Path, tmp_path: Path, capsys: Any
) -> None:
    """They are moved a little, and no other's run is taken for this one."""
    start, _ = uninterrupted
    unseen = tmp_path / "unseen"
    unseen.mkdir()
    Image.fromarray(skimage.data.coins()[:96, :96]).save(unseen / "coins.png")
    tmp_path /= "out"
    options = ["--data", photos, "--out", tmp_path, *KILLED]
    assert train(*options, "--start-from", start) == 2
    assert "Name photographs that it never saw" in capsys.readouterr().err
    options += ["--audit-data", unseen]
    assert train(*options, "--start-from", start) == 0
    before, after = (load_file(folder / WEIGHTS) for folder in (start, tmp_path))
    name = "towers.visual.trunk.stages.0.0.weight"
    assert 0 < (after[name] - before[name]).abs().max() < 0.01
    fingerprint = QualityPerceiver.from_pretrained(start).fingerprint()
    assert (
        f"from those of the perceiver with the fingerprint {fingerprint[:8]}"
        in (tmp_path / "README.md").read_text()
    )
    capsys.readouterr()
    assert train(*options, "--start-from", "perceive-tiny") == 2
    assert "start=" in capsys.readouterr().err


def test_the_same_command_again_changes_nothing(
    uninterrupted: tuple[Path, str], photos: Path
) -> None:
    out, _ = uninterrupted
    before = (out / WEIGHTS).read_bytes()
    assert train("--data", photos, "--out", out, *KILLED) == 0
    assert (out / WEIGHTS).read_bytes() == before


def kill_at(file: Path, arguments: list[str]) -> None:
    """Run the command in a process of its own, and kill that once it has written a file."""
    code = "import sys; from perceive_adapter.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert file.exists()


def steps_done(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=True)["step"])


def test_a_killed_run_ends_with_the_same_weights(
    uninterrupted: tuple[Path, str], photos: Path, tmp_path: Path
) -> None:
    out, checkpoints = tmp_path / "killed", tmp_path / "killed" / "checkpoints"
    options = ["--data", str(photos), "--out", str(out), *KILLED]
    for name, steps in (("pretrain.pt", 3), ("stage1.pt", 60)):
        kill_at(checkpoints / name, ["train-perceiver", *options, *QUICK])
        assert 0 < steps_done(checkpoints / name) < steps
        assert not (out / WEIGHTS).exists()
    # What a kill in the middle of writing leaves: it is never taken for a checkpoint.
    (checkpoints / ".stage1.pt.9999999").write_bytes(b"half")
    assert train(*options) == 0
    killed, whole = (load_file(folder / WEIGHTS) for folder in (out, uninterrupted[0]))
    assert killed.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(killed[name], tensor), name
    assert (out / "audit.json").read_text() == (uninterrupted[0] / "audit.json").read_text()


@pytest.fixture
def small_clip(tmp_path: Path) -> list[str]:
    """Options that name a small CLIP of open_clip's, and a file of its weights."""
    (tmp_path / "small-test-clip.json").write_text(json.dumps(TINY_VIT))
    open_clip.add_model_config(tmp_path / "small-test-clip.json")
    weights = build_clip(TINY_VIT, None).state_dict()
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        tmp_path / "clip.safetensors",
    )
    return ["--clip", "small-test-clip", "--pretrained", str(tmp_path / "clip.safetensors")]


@pytest.mark.parametrize(
    ("medium", "heads"), [("restored", "--heads"), ("blend", "--no-heads"), ("milder", "--heads")]
)
def test_training_on_a_clip(
    medium: str, heads: str, small_clip: list[str], photos: Path, tmp_path: Path
) -> None:
    """Prompts and heads train, and nothing else."""
    options = ["--medium", medium, heads, "--steps", "2", "--learning-rate", "0.01", *small_clip]
    options += RESTORERS if medium == "restored" else []
    words = ["--words", "bad", "fair", "good"]
    assert train("--data", photos, "--out", tmp_path / "out", *options, *words) == 0
    trained = QualityPerceiver.from_pretrained(tmp_path / "out")
    start = QualityPerceiver.create(
        "small-test-clip",
        small_clip[-1],
        words=words[1:],
        degradations=FAMILIES if heads == "--heads" else (),
    )
    assert trained.trained
    assert trained.config.words == ("bad", "fair", "good")
    before = start.state_dict()
    changed = {name for name, t in trained.state_dict().items() if not torch.equal(t, before[name])}
    assert {name.split(".")[0] for name in changed} == (
        {"prompts", "heads"} if heads == "--heads" else {"prompts"}
    )
    restorers = (tmp_path / "out" / "checkpoints").glob("restorer-*.pt")
    assert len(list(restorers)) == (2 if medium == "restored" else 0)


def test_an_output_folder_belongs_to_one_run(
    uninterrupted: tuple[Path, str], photos: Path, tmp_path: Path, capsys: Any
) -> None:
    out, _ = uninterrupted
    data = ["--data", photos]
    assert train(*data, "--out", out, *KILLED, "--seed", 1) == 2
    assert "Run with the same options and data, or give another" in capsys.readouterr().err
    assert train(*data, "--out", out, "--clip", "perceive-tiny", "--medium", "blend") == 2
    assert "medium='restored'" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert train(*data, "--out", tmp_path / "file", *KILLED) == 2
    assert "give the name of a folder" in capsys.readouterr().err
    (tmp_path / "perceiver_config.json").touch()
    assert train(*data, "--out", tmp_path, *KILLED) == 2
    assert "which would be lost" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["options.json", "stage1.pt", "pretrain.pt"])
def test_a_damaged_checkpoint_is_refused(
    name: str, uninterrupted: tuple[Path, str], photos: Path, capsys: Any
) -> None:
    file = uninterrupted[0] / "checkpoints" / name
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[: len(whole) // 2])
        assert train("--data", photos, "--out", uninterrupted[0], *KILLED) == 2
        complaint = capsys.readouterr().err
        assert repr(str(file)) in complaint
        assert "delete it to start afresh" in complaint
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--clip RN50 --pretrain-steps 3", "Leave it out"),
        ("--clip RN50 --workers 3", "--workers is for --clip perceive-tiny"),
        ("--clip RN50 --start-from perceive-tiny", "--start-from is for --clip perceive-tiny"),
        ("--clip perceive-tiny --start-from /nowhere", "/nowhere"),
        ("--medium blend --restorer-steps 9", "--restorer-steps is for --medium restored or mixed"),
        ("--clip perceive-tiny --learning-rate 1e-5", "expected it to fall"),
        ("--clip perceive-tiny --words bad mediocre flawless", "does not know, ['flawless']"),
        ("--clip perceive-tiny --context-length 23", "Use at most 22"),
        ("--clip no-such-clip", "no-such-clip"),
    ],
)
def test_options_that_cannot_work(
    options: str, complaint: str, photos: Path, tmp_path: Path, capsys: Any
) -> None:
    """They are found before anything is trained or written."""
    assert train("--data", photos, "--out", tmp_path / "out", *options.split()) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert not (tmp_path / "out").exists()


def test_photographs_that_cannot_be_used(photos: Path, tmp_path: Path, capsys: Any) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    options = ["--data", data, "--out", out, *KILLED]
    assert train(*options) == 2
    assert "is no folder" in capsys.readouterr().err
    data.mkdir()
    for file in sorted(photos.rglob("*.png"))[:4]:
        (data / file.name).write_bytes(file.read_bytes())
        (data / f"copy-of-{file.name}").write_bytes(file.read_bytes())
    assert train(*options) == 2
    assert "got 4 different photographs: expected at least 5" in capsys.readouterr().err
    (data / "text.png").write_text("no image")
    assert train(*options) == 2
    assert f"{str(data / 'text.png')!r} cannot be used" in capsys.readouterr().err
    assert not out.exists()


def test_a_split_hangs_on_contents_and_seed(tmp_path: Path) -> None:
    files = [tmp_path / f"{index}.jpg" for index in range(40)]
    for index, file in enumerate(files):
        file.write_text(str(index))
    split = split_photos(files)
    assert (len(split.audit), len(split.trained)) == (4, 36)
    assert sorted([*split.audit, *split.trained]) == sorted(files)
    assert split_photos(files[::-1]) == split
    assert split_photos(files, seed=1).audit != split.audit
    assert split_photos(files[1:]).digest != split.digest
    copy = tmp_path / "copy.jpg"
    copy.write_text("7")
    assert split_photos([*files, copy]) == split
    with pytest.raises(ConfigError, match="at least 5"):
        split_photos(files[:4])


def test_an_audit_elsewhere_trains_on_everything_but_never_on_what_it_audits(
    tmp_path: Path,
) -> None:
    files = [tmp_path / f"{index}.jpg" for index in range(6)]
    for index, file in enumerate(files):
        file.write_text(str(index))
    split = audit_elsewhere(files[:4], files[4:])
    assert split.trained == tuple(files[:4])
    assert split.audit == tuple(files[4:])
    swapped = audit_elsewhere([*files[:3], files[4]], [files[3], files[5]])
    assert swapped.digest != split.digest  # the same photographs, another of them audited
    assert audit_elsewhere(files[:4], files[:3:-1]).digest == split.digest
    assert audit_elsewhere(files[3::-1], files[4:]).digest != split.digest  # other folds
    with pytest.raises(ConfigError, match="both to be trained on and audited on"):
        audit_elsewhere(files[:4], files[3:])
    with pytest.raises(ConfigError, match="two at least"):
        audit_elsewhere(files[:1], files[1:])


def test_towers_become_a_perceiver_and_stay_as_they_are(tmp_path: Path) -> None:
    towers = TinyTowers(seed=3).eval()
    before = {name: tensor.clone() for name, tensor in towers.state_dict().items()}
    perceiver = as_perceiver(towers)
    after = towers.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    image = torch.rand(2, 3, 64, 48)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both_ways = F.normalize(towers.embed(image) + towers.embed(image.flip(3)), dim=1)
        torch.testing.assert_close(perceiver.embed(image), both_ways)
        logits = dict(zip(KINDS, towers.heads(both_ways)[1].T, strict=True))
        blurs = ("blur", "motion_blur", "downsampling")
        logits["blur"] = torch.stack([logits[kind] for kind in blurs]).mean(dim=0)
        severity = torch.stack([logits[family] for family in FAMILIES], dim=1).sigmoid()
        torch.testing.assert_close(perceiver(image).severity, severity)
    perceiver.save_pretrained(tmp_path)
    assert QualityPerceiver.from_pretrained(tmp_path).fingerprint() == perceiver.fingerprint()


# Stage 2 and evaluation

SHORT = ["--steps", "6", "--context", "48", "--patch", "32", "--batch", "4", "--cpu"]
NETWORK = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.tail = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, image):
        return image + 0.01 * self.tail(self.body(image))


def build():
    return Net()


def twice():
    return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2))


def gray():
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1))


def eighths():
    inside = [nn.PixelUnshuffle(8), nn.Conv2d(192, 192, 3, padding=1), nn.PixelShuffle(8)]
    return nn.Sequential(*inside)


def asks(path):
    return Net()


nothing = 3
"""


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Code in the current folder that returns a small network."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return "mine:build"


def dark_pairs(folder: Path, photos: Path) -> Path:
    for index, path in enumerate(sorted(photos.rglob("*.png"))):
        image = Image.open(path).convert("RGB")
        for side, shown in (("input", image.point(lambda value: value // 3)), ("gt", image)):
            (folder / side).mkdir(parents=True, exist_ok=True)
            shown.save(folder / side / f"{index}.png")
    return folder


def test_finetune_saves_an_adapter_that_evaluate_measures(
    network: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dark = dark_pairs(tmp_path / "sets" / "enhance", photos)
    (dark / "input" / "alone.png").write_bytes(b"no image")
    out = tmp_path / "out"
    told = ["finetune", "--backbone", network, "--data", str(tmp_path / "sets"), str(photos)]
    told += ["--tasks", "rain", "haze", "--out", str(out), *SHORT]
    assert main(told) == 2
    assert "alone.png' has no partner" in capsys.readouterr().err
    assert not out.exists()
    assert main([*told, "--broken", "skip", "--ratios", "enhance=2"]) == 0
    printed = capsys.readouterr()
    assert "Tasks: enhance, rain, haze. 5 pairs and 5 photographs" in printed.err
    assert "Skipped 1 files, such as: " in printed.err
    assert "| enhance | 1 |" in printed.out
    assert "| rain | 2 |" in printed.out
    card = (out / "README.md").read_text()
    assert "enhance, wrapped: PSNR in dB on what was set aside" in card
    assert list((out / "logs").rglob("events*"))

    pictures = tmp_path / "pictures"
    told = ["evaluate", "--backbone", network, "--adapter", str(out), "--device", "cpu"]
    told += ["--data", str(dark), "--limit", "2"]
    (dark / "input" / "alone.png").unlink()
    assert main([*told, "--out", str(pictures)]) == 0
    table = capsys.readouterr().out
    assert re.search(r"\| pairs \| 2 \| \d+\.\d\d / 0\.\d+ \| .* \| .* \|", table)
    stamped = json.loads((pictures / "stamp.json").read_text())
    assert stamped["protocol"] == "pairs"
    assert {file.name for file in pictures.iterdir()} == {
        "table.md",
        "images.csv",
        "stamp.json",
        "psnr.png",
        "images.png",
    }
    assert main(["evaluate", "--backbone", network, "--data", str(dark), "--tile", "96"]) == 0
    assert "wrapped" not in capsys.readouterr().out


def test_mediums_come_from_folders_and_from_restorers(
    network: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dark = dark_pairs(tmp_path / "enhance", photos)
    told = ["finetune", "--backbone", network, "--data", str(dark), *SHORT]
    told += ["--difficulty-adaptive", "0.1", "--treat", "everywhere", "--out"]
    assert main([*told, str(tmp_path / "plain")]) == 0
    (dark / "medium").mkdir()
    for path in (dark / "input").iterdir():
        image = Image.open(path)
        image.point(lambda value: 2 * value).save(dark / "medium" / path.name)
    assert main([*told, str(tmp_path / "folder")]) == 0
    assert main([*told, str(tmp_path / "both"), "--mediums", "earlier", network]) == 0
    trained = [
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("plain", "folder", "both")
    ]
    for one, other in ((0, 1), (1, 2)):
        assert any(not torch.equal(trained[one][key], trained[other][key]) for key in trained[one])
    capsys.readouterr()
    assert main([*told, str(tmp_path / "x"), "--mediums", "mine:missing"]) == 2
    assert "--mediums mine:missing cannot be imported" in capsys.readouterr().err


def test_finetune_goes_on_where_it_was_killed(
    network: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from perceive_adapter.training import restoration_run

    told = ["finetune", "--backbone", network, "--data", str(photos), "--seed", "3", *SHORT]
    told += ["--checkpoint-every", "2", "--ema", "0.5"]
    assert main([*told, "--out", str(tmp_path / "whole")]) == 0

    update = restoration_run.RestorationRun.update

    def dying(self: Any, step: int, passes: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt
        update(self, step, passes)

    killed = [*told, "--out", str(tmp_path / "killed")]
    with monkeypatch.context() as patched:
        patched.setattr(restoration_run.RestorationRun, "update", dying)
        assert main(killed) == 130
    assert main(killed) == 0
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed")
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert main([*killed, "--steps", "7"]) == 2  # another run's folder


def test_another_adapter_or_restorer_makes_another_run(
    network: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever its name: what it holds counts."""
    usual = ["finetune", "--backbone", network, "--data", str(photos), *SHORT]
    first, out = tmp_path / "first", tmp_path / "out"
    assert main([*usual, "--treat", "rain", "--out", str(first)]) == 0
    further = [*usual, "--adapter", str(first), "--out", str(out)]
    assert main(further) == 0
    shutil.copytree(first, tmp_path / "same")
    assert main([*further, "--adapter", str(tmp_path / "same")]) == 0
    config = json.loads((first / "adapter_config.json").read_text())
    config["config"]["treats"] = [0, 3]
    (first / "adapter_config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(further) == 2
    assert "was written by a run with adapter.treats=[1]: expected " in capsys.readouterr().err

    medium = [*usual, "--difficulty-adaptive", "0.1", "--mediums", "mine:other", "--out"]
    code = Path("mine.py")
    code.write_text(code.read_text() + "\n\ndef other():\n    return nn.Conv2d(3, 3, 1)\n")
    del sys.modules["mine"]
    torch.manual_seed(0)
    assert main([*medium, str(tmp_path / "medium")]) == 0
    code.write_text(code.read_text().replace("Conv2d(3, 3, 1)", "Conv2d(3, 3, 3, padding=1)"))
    del sys.modules["mine"]
    assert main([*medium, str(tmp_path / "medium")]) == 2
    assert "was written by a run with mediums=['" in capsys.readouterr().err


def test_large_photographs_are_measured_as_they_are_trained_on(tmp_path: Path) -> None:
    for index in range(9):
        Image.new("RGB", (2600, 40), (index, 0, 0)).save(tmp_path / f"{index}.png")
    found = find_data([tmp_path], "raise")
    sides = {case.load()[0].shape[-1] for case in found.held_cases(["rain"])}
    assert sides == {photo.shape[-1] for photo in found.photos} == {1200}


def test_names_that_are_no_text_lose_no_figures(network: str, photos: Path, tmp_path: Path) -> None:
    dark = dark_pairs(tmp_path / os.fsdecode(b"sets/nuit_\xe9"), photos)
    for side in ("input", "gt"):
        (dark / side / "0.png").rename(dark / side / os.fsdecode(b"caf\xe9.png"))
    out, report = tmp_path / "out", tmp_path / "report"
    told = ["--backbone", network, "--data", str(tmp_path / "sets")]

    def run(*command: str) -> None:
        subprocess.run([sys.executable, "-m", "perceive_adapter", *command, *told], check=True)

    run("finetune", "--out", str(out), *SHORT)
    assert r"nuit_\udce9, wrapped: PSNR" in (out / "README.md").read_text()
    run("evaluate", "--device", "cpu", "--out", str(report))
    assert r"caf\udce9.png" in (report / "images.csv").read_text()
    assert (report / "images.png").is_file()


def test_evaluate_leaves_out_what_is_broken_if_asked(
    network: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dark = dark_pairs(tmp_path / "dark", photos)
    (dark / "gt" / "0.png").unlink()
    told = ["evaluate", "--backbone", network, "--data", str(dark), "--device", "cpu"]
    assert main(told) == 2
    assert 'leave them out (broken="skip", or --broken skip)' in capsys.readouterr().err
    assert main([*told, "--broken", "skip"]) == 0
    printed = capsys.readouterr()
    assert "Skipped 1 images" in printed.err
    assert "| pairs | 5 |" in printed.out


def test_evaluate_leaves_out_what_turns_out_to_be_broken(
    network: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dark = dark_pairs(tmp_path / "dark", photos)
    file = min((dark / "gt").iterdir())
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    mixed = tmp_path / "mixed"
    shutil.copytree(photos, mixed)
    Image.new("RGB", (5, 5)).save(mixed / "tiny.png")
    (mixed / "notes.png").write_text("no image")
    for data, protocol, count in ((dark, "pairs", 1), (mixed, "synthetic", 44)):
        told = ["evaluate", "--backbone", network, "--data", str(data), "--protocol", protocol]
        told += ["--device", "cpu", "--limit", "100"]
        assert main(told) == 2
        capsys.readouterr()
        assert main([*told, "--broken", "skip"]) == 0
        printed = capsys.readouterr()
        assert f"Skipped {count} images, such as: " in printed.err
        assert "mean of the groups" in printed.out
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(mixed / "tiny.png", alone)
    told = ["evaluate", "--backbone", network, "--data", str(alone), "--protocol", "synthetic"]
    assert main([*told, "--broken", "skip", "--device", "cpu"]) == 2
    assert "nothing is left to measure" in capsys.readouterr().err


def test_paths_that_name_nothing_or_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for told in (["perceive", ""], ["perceive", "a.png", "--map", ""]):
        with pytest.raises(SystemExit, match="2"):
            main(told)
        assert "'' names nothing: expected a path" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_path("~/run") == tmp_path / "run"
    with pytest.raises(SystemExit, match="2"):
        main(["perceive", "a.png", "--perceiver", ""])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    told = ["restore", str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    assert main([*told, "--backbone", "~/net.pth"]) == 2
    assert f"there is no checkpoint '{tmp_path}/net.pth'" in capsys.readouterr().err


def test_a_report_is_no_part_of_what_is_measured(
    network: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["evaluate", "--backbone", network, "--data", str(photos), "--protocol", "synthetic"]
    assert main([*told, "--out", str(photos / "report")]) == 2
    assert "lies in --data" in capsys.readouterr().err
    assert not (photos / "report").exists()


def test_images_too_small_to_measure_are_told_before_training(
    network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(9):
        for side in ("input", "gt"):
            file = tmp_path / "tiny" / side / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (index, 9, 9)).save(file)
    out = tmp_path / "out"
    for data, side in ((tmp_path / "tiny", "input"), (tmp_path / "tiny" / "gt", "gt")):
        told = ["finetune", "--backbone", network, "--data", str(data), "--out", str(out)]
        assert main([*told, *SHORT]) == 2
        said = capsys.readouterr().err
        assert re.search(rf"{side}/\d\.png' has 4 x 4 pixels.*--broken skip", said)
        assert not out.exists()


def test_data_of_which_nothing_can_be_used(
    network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ink").mkdir()
    for index in range(3):
        Image.new("CMYK", (40, 40), (index, 0, 0, 0)).save(tmp_path / "ink" / f"{index}.jpg")
    told = ["finetune", "--backbone", network, "--data", str(tmp_path / "ink"), "--broken", "skip"]
    assert main([*told, "--out", str(tmp_path / "out"), *SHORT]) == 2
    assert "nothing to train on: " in capsys.readouterr().err


def test_options_may_come_from_a_file(
    network: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(
        f"backbone: {network}\ndata: {photos}\ntasks: [rain, low_light]\nsteps: 9\n"
        "context: 48\npatch: 32\nbatch: 2\ncpu: true\ncompile: false\nrank: null\n"
        "ratios: {}\nmediums: []\n"
        "treat: [low_light, rain]\n"
    )
    out = tmp_path / "out"
    assert main(["finetune", "--steps", "2", "--config", str(file), "--out", str(out)]) == 0
    printed = capsys.readouterr().err
    assert "Tasks: rain, low_light." in printed
    assert "treats low_light, rain; leaves other images alone." in printed
    options = json.loads((out / "checkpoints" / "options.json").read_text())
    assert options["recipe"]["schedule"]["steps"] == 2
    for content, message in [
        ("- a", "holds a list"),
        ("a: [", "cannot be read as YAML"),
        ("seed: 2020-13-45", "cannot be read as YAML"),
    ]:
        file.write_text(content)
        assert main(["finetune", "--config", str(file), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (["--backbone", "mine"], "expected a checkpoint file"),
        (["--backbone", "nowhere:build"], "cannot be imported (ModuleNotFoundError"),
        (["--backbone", "torn:build"], "cannot be imported (SyntaxError"),
        (["--backbone", "lacking:build"], "cannot be imported (RuntimeError: no weights here"),
        (["--backbone", "mine:nothing"], "gave a int"),
        (["--backbone", "./mine.py:build"], "cannot be imported"),
        (["--backbone", "mine:asks"], "mine:asks raised TypeError"),
        (["--backbone", "mine:twice"], "trains restoration of RGB images at their own size"),
        (["--backbone", "mine:gray"], "trains restoration of RGB images at their own size"),
        (
            ["--backbone", "mine:eighths", "--patch", "20"],
            "multiples of 8, and the patches have 20",
        ),
        (["--backbone", "missing.pth"], "no checkpoint 'missing.pth'"),
        (["--backbone", "mine.safetensors"], "no checkpoint of an architecture"),
        (["--learning-rate", "1e-6"], "expected it to fall"),
        (["--ratios", "rain"], "expected TASK=NUMBER"),
        (["--ratios", "snow=1"], "ratios of snow"),
        (["--tasks", "snow"], "'snow' names no degradation"),
        (["--treat", "snow"], "snow cannot be told apart"),
        (["--patch", "64"], "patch=64 and context=48"),
        (["--adapter", "x", "--rank", "3"], "brings its own rank"),
        (["--data", "nowhere"], "is no folder"),
    ],
)
def test_finetune_says_what_cannot_be(
    network: str,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    told: list[str],
    message: str,
) -> None:
    Path("mine.safetensors").write_bytes(b"nothing")
    Path("torn.py").write_text("def build(:\n")
    Path("lacking.py").write_text('raise RuntimeError("no weights here")\n')
    out = tmp_path / "out"
    usual = ["finetune", "--backbone", network, "--data", str(photos), "--out", str(out), *SHORT]
    assert main([*usual, *told]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_tasks_are_for_clean_photographs(
    network: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dark, out = dark_pairs(tmp_path / "enhance", photos), tmp_path / "out"
    told = ["finetune", "--backbone", network, "--data", str(dark), "--out", str(out), *SHORT]
    assert main([*told, "--tasks", "jpeg"]) == 2
    assert "--tasks jpeg names degradations of clean photographs" in capsys.readouterr().err
    assert not out.exists()


def test_a_checkpoint_file_is_a_backbone_and_an_adapter_trains_further(
    photos: Path, tmp_path: Path
) -> None:
    from spandrel.architectures.NAFNet import NAFNet

    network = NAFNet(width=16, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1])
    save_file(network.state_dict(), tmp_path / "nafnet.safetensors")
    told = ["finetune", "--backbone", str(tmp_path / "nafnet.safetensors"), "--data", str(photos)]
    told += [*SHORT, "--treat", "everywhere"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*told, "--out", str(first), "--rank", "2"]) == 0
    config = json.loads((first / "adapter_config.json").read_text())
    assert config["config"]["rank"] == 2
    assert config["config"]["treats"] is None
    assert main([*told, "--out", str(second), "--adapter", str(first), "--seed", "1"]) == 0
    before, after = (load_file(out / "adapter_model.safetensors") for out in (first, second))
    assert before.keys() == after.keys()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def test_why_an_adapter_works_everywhere_is_noted(
    network: str, photos: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsure(*_: Any) -> tuple[str, ...]:
        warnings.warn("nothing is seen of rain", UnseenTaskWarning, stacklevel=2)
        warnings.warn("something else", UserWarning, stacklevel=2)
        return ()

    monkeypatch.setattr("perceive_adapter.training.treated.find_treated", unsure)
    told = ["finetune", "--backbone", network, "--data", str(photos), *SHORT]
    with pytest.warns(UserWarning, match="something else"):
        assert main([*told, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().err
    assert "Note: nothing is seen of rain.\n" in printed
    assert "works on every image." in printed


def test_a_folder_is_not_taken_before_training_begins(
    network: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    told = ["finetune", "--backbone", network, "--data", str(photos), "--out", str(out), *SHORT]
    assert main([*told, "--batch", "3", "--accumulate", "2"]) == 2
    assert "cannot be shared out evenly" in capsys.readouterr().err
    assert main([*told, "--batch", "2", "--accumulate", "2"]) == 0
    assert main([*told, "--batch", "4", "--accumulate", "2"]) == 2
    message = capsys.readouterr().err
    assert "run with recipe.batch=2: expected recipe.batch=4. Run with" in message
    shutil.rmtree(out / "checkpoints")
    assert main(told) == 2
    assert "holds a saved adapter already" in capsys.readouterr().err


def test_a_run_keeps_the_precision_that_accelerate_chose(
    network: str,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    no_accelerator_yet: Callable[[], None],
) -> None:
    told = ["finetune", "--backbone", network, "--data", str(photos), *SHORT]
    told += ["--out", str(tmp_path / "out"), "--treat", "everywhere"]
    assert main(told) == 0
    no_accelerator_yet()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert main(told) == 2
    assert "with precision='no': expected precision='bf16'" in capsys.readouterr().err
    no_accelerator_yet()
    assert main([*told, "--precision", "no"]) == 0


def test_broken_photographs_are_named_or_skipped_and_never_lose_the_adapter(
    network: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "some"
    shutil.copytree(photos, folder)
    for index, name in enumerate(("a.jpg", "b.jpg")):
        Image.open(photos / "astronaut.png").save(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[: -60 - index])
    out = tmp_path / "out"
    told = ["finetune", "--backbone", network, "--data", str(folder), "--out", str(out), *SHORT]
    assert main(told) == 2
    assert re.search(r"[ab]\.jpg.*--broken skip", capsys.readouterr().err)
    assert main([*told, "--broken", "skip"]) == 0
    printed = capsys.readouterr()
    assert "Skipped 2 files" in printed.err
    assert (out / "adapter_model.safetensors").exists()


def test_the_backbone_alone_is_measured_as_if_nothing_were_wrapped(
    network: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dark = str(dark_pairs(tmp_path / "sets" / "enhance", photos))
    told = ["finetune", "--backbone", network, "--data", dark, "--out", str(tmp_path / "out")]
    assert main([*told, *SHORT, "--learning-rate", "0.05", "--treat", "everywhere"]) == 0
    usual = ["evaluate", "--backbone", network, "--data", dark, "--device", "cpu"]
    capsys.readouterr()
    assert main([*usual, "--adapter", str(tmp_path / "out")]) == 0
    with_adapter = capsys.readouterr().out.splitlines()[2].split(" | ")
    assert main(usual) == 0
    alone = capsys.readouterr().out.splitlines()[2].split(" | ")
    assert with_adapter[3] == alone[3].removesuffix(" |")
    assert with_adapter[4].removesuffix(" |") != with_adapter[3]


# What finetune trains on and sets aside


def pair_files(folder: Path, name: str, scene: int, damage: int = 100) -> None:
    """A pair whose target is decided by the scene alone."""
    pixels = np.random.default_rng(scene).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for side, shown in (("input", pixels // 2 + damage), ("gt", pixels)):
        file = folder / side / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shown.astype(np.uint8)).save(file)


def contents(found: TrainingFiles) -> tuple[set[bytes], set[bytes]]:
    """What is trained on, and what is set aside, as pixels."""

    def pixels(pairs: Sequence[Pair]) -> set[bytes]:
        return {read_pair(pair)[1].numpy().tobytes() for pair in pairs}

    photos = {photo.numpy().tobytes() for photo in found.photos}
    held = {photo.numpy().tobytes() for photo in load_photos(found.held_photos)}
    return pixels(found.pairs) | photos, pixels(found.held_pairs) | held


def held_counts(found: TrainingFiles) -> dict[str, tuple[int, int]]:
    groups = {pair.group for pair in (*found.pairs, *found.held_pairs)}
    return {
        group: tuple(
            sum(pair.group == group for pair in pairs) for pairs in (found.pairs, found.held_pairs)
        )
        for group in groups
    }


def test_tasks_are_folders_and_targets_are_set_aside_with_all_that_is_theirs(
    tmp_path: Path,
) -> None:
    for scene in range(2):
        pair_files(tmp_path / "GOPRO" / "train" / str(scene), "1", scene)
    for index in range(6):
        for beta in (1, 2, 3):
            pair_files(tmp_path / "RESIDE", f"{index}_{beta}", 10 + index, 10 * beta)
            target = tmp_path / "RESIDE" / "gt" / f"{index}_{beta}.png"
            target.rename(target.with_name(f"{index}.png"))
    found = find_data([tmp_path], "raise")
    assert held_counts(found) == {"GOPRO": (2, 0), "RESIDE": (15, 3)}
    assert not {p.target for p in found.held_pairs} & {p.target for p in found.pairs}
    alone = find_data([tmp_path / "RESIDE", tmp_path / "GOPRO"], "raise")
    assert {pair.group for pair in alone.pairs} == {"train", "RESIDE"}


def test_what_is_set_aside_is_not_trained_on_under_another_name_or_task(tmp_path: Path) -> None:
    for scene in range(30):
        pair_files(tmp_path / "all" / "derain", f"{scene}", scene)
        pair_files(tmp_path / "all" / "derain", f"copy-{scene}", scene, damage=50)
    for scene in range(20, 40):
        pair_files(tmp_path / "all" / "dehaze", f"{scene}", scene, damage=30)
    for scene in (1, 21, 22, 39):
        pair_files(tmp_path / "all" / "few", f"{scene}", scene, damage=20)
    shutil.copytree(tmp_path / "all" / "derain" / "gt", tmp_path / "photos" / "deep")
    for scene in range(50, 60):
        pair_files(tmp_path / "x", f"{scene}", scene)
        shutil.copy(tmp_path / "x" / "gt" / f"{scene}.png", tmp_path / "photos")
    found = find_data([tmp_path / "all", tmp_path / "photos"], "raise")
    trained, held = contents(found)
    assert held
    assert not trained & held
    assert held_counts(found) == {"derain": (54, 6), "dehaze": (18, 2), "few": (4, 0)}
    assert (len(found.photos), len(found.held_photos)) == (36, 4)
    again = [tmp_path / "all" / "dehaze", tmp_path / "photos" / "deep"]
    overlapping = find_data([tmp_path / "all", tmp_path / "photos", *again], "raise")
    assert overlapping[2:] == found[2:]
    assert overlapping.pairs == found.pairs


def test_of_a_task_of_few_sets_single_targets_are_set_aside(tmp_path: Path) -> None:
    for index, scene in enumerate(("light", "heavy")):
        for frame in range(10):
            pair_files(tmp_path / "derain" / scene, f"{frame}", 10 * index + frame)
    found = find_data([tmp_path], "raise")
    assert (len(found.pairs), len(found.held_pairs)) == (18, 2)


def test_whole_scenes_are_set_aside(tmp_path: Path) -> None:
    for scene in range(12):
        for frame in range(4):
            pair_files(tmp_path / "GOPRO" / "train" / str(scene), f"{frame}", 10 * scene + frame)
    pair_files(tmp_path / "GOPRO" / "train" / "11", "4", 0, damage=10)  # of the first scene
    found = find_data([tmp_path], "raise")
    scenes = [
        {pair.target.parent.parent.name for pair in pairs}
        for pairs in (found.pairs, found.held_pairs)
    ]
    assert not scenes[0] & scenes[1]
    assert len(scenes[0]) + len(scenes[1]) == 12
    assert len(scenes[1]) in (1, 2)
    assert ("0" in scenes[1]) == ("11" in scenes[1])


@pytest.mark.parametrize("shards", [False, True])
def test_scenes_may_be_folders_inside_a_side_or_a_shard(shards: bool, tmp_path: Path) -> None:
    for scene in range(10):
        for frame in range(4):
            name = f"{scene:03}/{frame}"
            if shards:
                pair_files(tmp_path / "made", name, 10 * scene + frame)
            else:
                pair_files(tmp_path / "all" / "deblur", name, 10 * scene + frame)
    if shards:
        (tmp_path / "all" / "deblur").mkdir(parents=True)
        with tarfile.open(tmp_path / "all" / "deblur" / "0.tar", "w") as shard:
            for file in sorted((tmp_path / "made").rglob("*.png")):
                side = file.relative_to(tmp_path / "made").parts[0]
                shard.add(file, f"{file.parent.name}/{file.stem}.{side}.png")
    found = find_data([tmp_path / "all"], "raise")
    assert (len(found.pairs), len(found.held_pairs)) == (36, 4)
    names = [
        {str(pair.target).rpartition("/")[0] for pair in pairs}
        for pairs in (found.pairs, found.held_pairs)
    ]
    assert (len(names[0]), len(names[1])) == (9, 1)
    assert not names[0] & names[1]


@pytest.mark.parametrize(("parts", "expected"), [(4, 0), (5, 1), (9, 1), (19, 1), (20, 2)])
def test_shares_that_are_set_aside(parts: int, expected: int) -> None:
    task = [{f"{index}"} for index in range(parts)]
    assert len(set_aside([task])) == expected
    assert set_aside([task[::-1], task]) == set_aside([task])


def test_parts_of_shards_are_told_by_their_contents(tmp_path: Path) -> None:
    for scene in range(10):
        pair_files(tmp_path / "files" / "haze", f"{scene}", scene)
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "haze-0.tar", "w") as archive:
        for scene in range(10):
            for side in ("input", "gt"):
                file = tmp_path / "files" / "haze" / side / f"{scene}.png"
                archive.add(file, f"{9 - scene}.{side}.png")
    alone = find_data([tmp_path / "shards"], "raise")
    both = find_data([tmp_path / "files", tmp_path / "shards"], "raise")
    assert (len(both.pairs), len(both.held_pairs)) == (len(alone.pairs), 1)
    assert contents(alone) == contents(both)


def test_other_contents_are_other_data_and_other_spellings_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for scene in range(6):
        pair_files(tmp_path / "sets" / "rain", f"{scene}", scene)
        pair_files(tmp_path / "photos", f"{scene}", 10 + scene)
    shutil.rmtree(tmp_path / "photos" / "input")
    folders = [tmp_path / "sets", tmp_path / "photos"]

    def digest(*given: Path) -> str:
        return find_data(given, "raise").digest

    first = digest(*folders)
    monkeypatch.chdir(tmp_path / "sets")
    assert digest(Path("."), Path("../photos")) == first
    (tmp_path / "elsewhere").mkdir()
    moved = [shutil.copytree(folder, tmp_path / "elsewhere" / folder.name) for folder in folders]
    assert digest(*moved) == first
    for change in ("sets/rain/input/3.png", "sets/rain/gt/3.png", "photos/gt/3.png"):
        file = tmp_path / change
        before = file.read_bytes()
        pixels = np.asarray(Image.open(file)) ^ 1
        Image.fromarray(pixels).save(file)
        assert digest(*folders) != first
        file.write_bytes(before)
    assert digest(*folders) == first
    file.rename(file.with_name("9.png"))
    assert digest(*folders) != first


@pytest.mark.parametrize("sides", [("A", "B"), ("degraded", "gt-8-bit")])
@pytest.mark.parametrize("broken", ["raise", "skip"])
def test_pairs_of_other_names_are_not_trained_on_as_photographs(
    tmp_path: Path, sides: tuple[str, str], broken: str
) -> None:
    for scene in range(6):
        pair_files(tmp_path, f"{scene}", scene)
    for known, name in zip(("input", "gt"), sides, strict=True):
        (tmp_path / known).rename(tmp_path / name)
    with pytest.raises(ConfigError, match=f"{sides[0]}' .*named input, degraded, .*give each by"):
        find_data([tmp_path], broken)
    assert len(find_data([tmp_path / sides[1]], broken).photos) == 5


@pytest.mark.parametrize("folder", [".", "gt"])
def test_broken_files_that_are_set_aside_are_named_or_skipped(tmp_path: Path, folder: str) -> None:
    """Of pairs, and of photographs."""
    for scene in range(9):
        pair_files(tmp_path, f"{scene}", scene)
    first, *others = sorted((tmp_path / "gt").iterdir())
    kept = [{content_digest(file)} for file in others]
    cut = first.read_bytes()[:-60]
    for junk in itertools.count():  # until it is this one that is set aside
        first.write_bytes(cut + struct.pack(">I", junk))
        if content_digest(first) in set_aside([[*kept, {content_digest(first)}]]):
            break
    with pytest.raises(ImageError, match=r"0\.png.* Or leave such files out with --broken skip"):
        find_data([tmp_path / folder], "raise")
    found = find_data([tmp_path / folder], "skip")
    assert len(found.pairs or found.photos) == 8
    assert not found.held_pairs
    assert not found.held_photos
    assert len(found.skipped) == 1


def test_a_saved_adapter_keeps_what_it_treats(network: str, photos: Path, tmp_path: Path) -> None:
    told = ["finetune", "--backbone", network, "--data", str(photos), *SHORT]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*told, "--treat", "jpeg", "--out", str(first)]) == 0
    assert main([*told, "--adapter", str(first), "--out", str(second)]) == 0
    configs = [json.loads((out / "adapter_config.json").read_text()) for out in (first, second)]
    assert configs[0]["config"]["treats"] == configs[1]["config"]["treats"] == [5]


def test_the_file_of_options_may_be_joined_by_a_sign(
    network: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "o.yaml"
    file.write_text("ratios: {snow: 3}\n")
    told = ["finetune", "--backbone", network, "--data", str(photos), "--out", str(tmp_path / "o")]
    assert main([*told, f"--config={file}", *SHORT]) == 2
    assert "ratios of snow" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*told, f"--conf={file}"])


def test_every_command_reads_options_from_a_file(photos: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "options.yaml").write_text("json: true\nperceiver: perceive-tiny\n")
    file = next(photos.glob("*.png"))
    assert main(["perceive", str(file), "--config", str(tmp_path / "options.yaml")]) == 0
    assert json.loads(capsys.readouterr().out)[0]["file"] == str(file)


@pytest.fixture
def options_in(tmp_path: Path) -> Any:
    """Reads a command's options from files of these contents, after which the line goes on."""

    def read(command: str, *contents: str, line: str = "") -> argparse.Namespace:
        told = [command]
        for index, content in enumerate(contents):
            (tmp_path / f"{index}.yaml").write_text(content)
            told += ["--config", str(tmp_path / f"{index}.yaml")]
        parser, commands = _parsers()
        return parser.parse_args(with_config([*told, *line.split()], commands))

    return read


TUNING = "backbone: b\ndata: d\nout: o\n"
STAGE_1 = "data: d\nout: o\n"


def test_a_word_that_yaml_takes_for_a_boolean_is_told_by_the_option_s_kind(options_in: Any) -> None:
    assert options_in("finetune", TUNING + "precision: no").precision == "no"
    assert options_in("finetune", TUNING + "compile: no\ncpu: yes").cpu
    assert not options_in("finetune", TUNING + "compile: no").compile
    for content, expected in [("heads: false", False), ("heads: true", True), ("", True)]:
        assert options_in("train-perceiver", STAGE_1 + content).heads is expected
    assert options_in("train-perceiver", STAGE_1 + "no-heads: true").heads is False
    assert options_in("train-perceiver", STAGE_1 + "no_heads: false").heads is True
    assert options_in("train-perceiver", STAGE_1 + "heads: false", line="--heads").heads is True
    with pytest.raises(ConfigError, match=r"0\.yaml: steps is false.*Put such a word in quotes"):
        options_in("finetune", TUNING + "steps: off")


def test_of_several_files_of_options_the_later_win(options_in: Any) -> None:
    first = TUNING + "steps: 3\nbatch: 2\ncompile: true\nlearning_rate: 1e-4\nrank: 4"
    second = "steps: 5\ncompile: false\nlearning-rate: 1e-5\nrank: null\nseed: 1"
    options = options_in("finetune", first, second, line="--seed 2")
    assert (options.steps, options.batch, options.seed) == (5, 2, 2)
    assert options.compile is False
    assert options.learning_rate == 1e-5
    assert options.rank is None
    assert options_in("finetune", second, first).steps == 3


def test_an_option_that_there_is_not_is_no_option_in_a_file(options_in: Any) -> None:
    for content in ("chanels-last: false", "chanels_last: true"):
        with pytest.raises(ConfigError, match=r"names chanels-last, .*expected channels-last\."):
            options_in("finetune", TUNING + content)
    with pytest.raises(ConfigError, match=r"names zzz, .*expected backbone, data, out"):
        options_in("finetune", TUNING + "zzz: false")
    with pytest.raises(ConfigError, match="names config"):
        options_in("finetune", TUNING + "config: other.yaml")


def test_what_is_not_installed_is_told_before_anything_is_done(
    network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from perceive_adapter.cli import options

    monkeypatch.setattr(options, "find_spec", lambda name: None if name != "matplotlib" else name)
    told = ["--backbone", network, "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    for command in ("finetune", "evaluate"):
        assert main([command, *told]) == 2
        complaint = capsys.readouterr().err
        assert "torchmetrics not installed: pip install " in complaint
        assert "with its extra 'train'" in complaint
    assert not (tmp_path / "out").exists()


def test_what_finetune_does_unasked_is_the_adapter_s_recipe() -> None:
    from perceive_adapter.cli import finetune
    from perceive_adapter.cli.finetune_plan import make_recipe
    from perceive_adapter.training.stage2 import ADAPTER

    parser = argparse.ArgumentParser()
    finetune.add_arguments(parser)
    assert (
        make_recipe(parser.parse_args(["--backbone", "b", "--data", "d", "--out", "o"])) == ADAPTER
    )
