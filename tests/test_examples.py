"""The examples run as they stand, at small size, and what they save loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import save_file
from spandrel.architectures.NAFNet import NAFNet
from spandrel_extra_arches.architectures.Restormer import Restormer

from perceive_adapter import wrap

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "coffee"):
        Image.fromarray(getattr(skimage.data, name)()[:160, :160]).save(folder / f"{name}.png")
    return folder


def test_examples_are_short() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert len(scripts) == 3
    assert all(len(script.read_text().splitlines()) < 80 for script in scripts)


def test_finetune_nafnet(tmp_path: Path, photos: Path) -> None:
    network = NAFNet(width=16, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1])
    save_file(network.state_dict(), tmp_path / "nafnet.safetensors")
    out = tmp_path / "out"
    told = ["--data", photos, "--out", out, "--steps", 2, "--side", 64]
    assert "layer sites" in run(
        "finetune_nafnet.py", "--weights", tmp_path / "nafnet.safetensors", *told
    )
    assert wrap(network, out).status().trainable == 0


def test_finetune_restormer(tmp_path: Path, photos: Path) -> None:
    network = Restormer(
        dim=16, num_blocks=[1, 1, 1, 1], num_refinement_blocks=1, heads=[1, 2, 4, 8]
    )
    torch.save({"params": network.state_dict()}, tmp_path / "restormer.pth")
    for name in ("astronaut", "coffee"):
        pixels = Image.open(photos / f"{name}.png")
        for folder, shown in (("gt", pixels), ("input", pixels.point(lambda value: value // 3))):
            (tmp_path / "dark" / folder).mkdir(parents=True, exist_ok=True)
            shown.save(tmp_path / "dark" / folder / f"{name}.png")
    (tmp_path / "dark" / "input" / "alone.png").touch()
    out = tmp_path / "out"
    told = ["--data", tmp_path / "dark", "--out", out, "--steps", 2, "--side", 64]
    printed = run("finetune_restormer.py", "--weights", tmp_path / "restormer.pth", *told)
    assert "{'': 2}, skipped 1" in printed
    assert wrap(network, out).status().levels


def test_finetune_your_own(tmp_path: Path) -> None:
    printed = run("finetune_your_own.py", "--out", tmp_path, "--steps", 3, "--side", 48)
    assert "haze: 0." in printed
    assert (tmp_path / "adapter_model.safetensors").exists()
