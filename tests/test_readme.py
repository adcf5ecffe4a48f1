"""README's Python runs as written, from top to bottom."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def run_snippets(file: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", file.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    namespace: dict[str, object] = {}
    for block in blocks:
        if "torch.export" in block and torch.__version__.startswith("2.6."):
            continue  # which cannot export what perceives images of any size
        exec(compile(block, str(file), "exec"), namespace)


def test_readme_snippets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_snippets(README)
    assert (tmp_path / "rain-and-haze" / "adapter_model.safetensors").exists()
    assert "level and" in capsys.readouterr().out


@pytest.mark.slow
def test_snippets_of_export_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_snippets(README.parent / "docs" / "export.md")
    assert {file.name for file in tmp_path.glob("*.onnx")} == {
        "restorer.onnx",
        "steered.onnx",
        "one-camera.onnx",
    }


def test_readme_names_make_targets_that_exist():
    makefile = (README.parent / "Makefile").read_text()
    targets = set(re.findall(r"^make (\w+)", README.read_text(), flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
