"""The wheel, installed by itself: what users get."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USE = """
import pathlib, sys
import torch
import perceive_adapter
from perceive_adapter import wrap

target, folder = sys.argv[1:]
assert pathlib.Path(perceive_adapter.__file__).is_relative_to(target), perceive_adapter.__file__
conv = torch.nn.Conv2d
net = torch.nn.Sequential(conv(3, 8, 3, padding=1), torch.nn.GELU(), conv(8, 3, 3, padding=1))
image = torch.rand(1, 3, 20, 30)
expected = net(image)
model = wrap(net)
assert torch.equal(model(image), expected)
torch.nn.init.normal_(model.injector.prompt_sites[0].prompt.to_scale_shift.weight)
restored = model(image)
assert not torch.equal(restored, expected)
model.save_pretrained(folder)
loaded = wrap(model.unwrap(), folder)
assert torch.equal(loaded(image), restored)
print("works", perceive_adapter.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    _run("-m", "build", *options)
    (built,) = folder.glob("*.whl")
    return built


def _run(*arguments: str, **options: object) -> str:
    command = [sys.executable, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "perceive_adapter/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"perceive_adapter"}
    sources = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_it_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    install = ["--no-deps", "--no-index", "--quiet", "--target", str(target), str(wheel)]
    _run("-m", "pip", "install", *install)
    env = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    output = _run("-c", USE, str(target), str(tmp_path / "adapter"), cwd=tmp_path, env=env)
    assert output.startswith("works")
