"""The demo runs as a stranger would run it, and ships only what it may."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from perceive_adapter.data import degrade

DEMO = Path(__file__).parents[1] / "examples" / "demo"
NAMES = ("gaussian noise", "rain", "haze", "low light")


@pytest.mark.parametrize("options", [[], ["--difficulty-adaptive", "0.1"]])
def test_small_demo_reports_saves_and_reloads(tmp_path: Path, options: list[str]) -> None:
    command = [sys.executable, str(DEMO / "run.py"), "--size", "small", "--out", str(tmp_path)]
    command += options
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        row = rf"^{name} +(\d+\.\d\d +){{3}}[+-]\d+\.\d\d "
        assert re.search(row, done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"Told apart .*: \d of 8 with gaussian noise", done.stdout), done.stdout
    assert "Loaded in a fresh process" in done.stdout
    assert (tmp_path / "grid.png").stat().st_size > 10_000
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_reload_fails_where_the_outputs_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(DEMO))
    from denoiser import load_denoiser
    from safetensors.torch import save_file

    from perceive_adapter import wrap

    wrap(load_denoiser()).save_pretrained(tmp_path / "adapter")
    image = torch.rand(1, 3, 32, 32)
    example = tmp_path / "example.safetensors"
    save_file({"degraded": image, "restored": image + 0.5}, example)
    command = [sys.executable, str(DEMO / "reload.py"), str(tmp_path / "adapter"), str(example)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "DIFFERS" in done.stderr


def test_the_denoiser_removes_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEMO))
    from denoiser import WEIGHTS, load_denoiser
    from images import load_held_out

    assert WEIGHTS.stat().st_size < 3e6
    clean = load_held_out(longest_side=192)[0][None]
    noisy = degrade(clean, "gaussian_noise", 0.5, torch.Generator().manual_seed(0))
    with torch.no_grad():
        denoised = load_denoiser()(noisy)
    assert (denoised - clean).square().mean() < 0.25 * (noisy - clean).square().mean()


def test_every_photograph_has_its_licence() -> None:
    photos = sorted(path.name for path in (DEMO / "photos").glob("*.jpg"))
    licences = (DEMO / "photos" / "LICENSES.md").read_text()
    assert photos
    assert sorted(re.findall(r"`(\S+\.jpg)` \| .+ \| \[CC", licences)) == photos
    assert sum((DEMO / "photos" / name).stat().st_size for name in photos) < 700_000
