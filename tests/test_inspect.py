"""``perceive-adapter inspect``, run as users run it."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perceive_adapter import wrap
from perceive_adapter.cli import main
from perceive_adapter.cli.backbones import load_network
from perceive_adapter.evaluation.cost import measure_cost
from perceive_adapter.evaluation.drawing import in_order

NETWORK = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.intro = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 2, stride=2)
        self.middle = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GELU())
        self.up = nn.Sequential(nn.Conv2d(16, 32, 1), nn.PixelShuffle(2))
        self.decoder = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GELU())
        self.ending = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, image):
        x = self.intro(image)
        return image + self.ending(self.decoder(self.up(self.middle(self.down(x))) + x))


class Hidden(Net):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, image):
        x = self.intro(image)
        return image + self.ending(self.scale * self.decoder(x) + x)


class NeedsMore(Net):
    def forward(self, image, sigma):
        return super().forward(image) + sigma
"""
MULTIPLY_ADDS = 9 * 3 * 8 + 4 * 8 * 16 / 4 + 9 * 16 * 16 / 4 + 16 * 32 / 4 + 9 * 8 * 8 + 9 * 8 * 3


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def inspect(*arguments: object, backbone: str = "nets:Net") -> int:
    return main(["inspect", "--backbone", backbone, *map(str, arguments)])


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect("--size", 64) == 0
    told, steered, cost = capsys.readouterr().out.strip().split("\n\n")
    model = wrap(load_network("nets:Net"))
    header, *rows, totals = told.splitlines()
    told_of = "site role prompt channels stride layout rank parameters why"
    assert " ".join(header.split()) == told_of
    assert [tuple(row.split()[:3]) for row in rows] == [
        (site.name, site.role, "modulation" if site.role == "level" else "low_rank")
        for site in model.sites
    ]
    assert totals == str(model.sites).splitlines()[-1]
    assert "severity (6)" in steered
    assert "64 x 64" in cost
    assert [line.split()[-1] for line in cost.splitlines()[1:]] == ["%"] * 4
    assert f"network alone{MULTIPLY_ADDS:21,.0f}         100.0 %" in cost


def test_json_tells_the_plan_and_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect("--json", "--size", 256) == 0
    record = json.loads(capsys.readouterr().out)
    model = wrap(load_network("nets:Net"))
    plan = model.sites
    assert [(site["name"], site["rank"], site["stride"]) for site in record["sites"]] == [
        (site.name, site.rank, site.stride) for site in plan
    ]
    assert record["parameters"]["backbone"] == plan.backbone_parameters
    assert record["parameters"]["trainable"] == plan.parameters == record["parameters"]["adapter"]
    assert record["sources"] == dict(model.injector.config.sources or {})
    assert record["treats"] is None
    cost = record["multiply_adds_per_pixel"]
    assert cost["size"] == [256, 256]
    assert cost["bare"] == MULTIPLY_ADDS
    branches = 0.0
    for site in plan.of("layer"):
        outputs, *inputs = site.weight_shape
        branches += site.rank * (np.prod(inputs) + outputs) / (site.stride or 1) ** 2
    assert cost["unfolded"] == pytest.approx(branches, rel=0.02)
    assert 0 < cost["folded"] < 0.05 * cost["unfolded"]
    assert cost["perception"] > 1000


def test_a_saved_adapter(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = wrap(load_network("nets:Net"), sites=["middle", "layer:up.0"], perceiver=False)
    model.save_pretrained(work / "adapter")
    assert inspect("--adapter", work / "adapter", "--json", "--size", 64) == 0
    record = json.loads(capsys.readouterr().out)
    assert [site["name"] for site in record["sites"]] == ["middle", "up.0"]
    assert record["sites"][0]["reason"] == "named by 'middle'"
    assert record["sources"] == {"compact": 64}
    assert record["parameters"]["trainable"] == model.status().trainable


def test_what_an_adapter_treats(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = wrap(load_network("nets:Net"))
    model.treat("rain", "jpeg")
    model.save_pretrained(work / "adapter")
    assert "| treats | rain, jpeg |" in (work / "adapter" / "README.md").read_text()
    assert inspect("--adapter", work / "adapter", "--size", 64) == 0
    assert "works where one of these is perceived: rain, jpeg" in capsys.readouterr().out


def test_sites_that_are_hidden_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect("--size", 64, "--drawing", "d.svg", backbone="nets:Hidden") == 0
    assert "sites are hidden behind zero scales of the backbone" in capsys.readouterr().out
    assert "blocked by a zero scale" in Path("d.svg").read_text()


def test_a_drawing_has_every_site_from_input_to_output(work: Path) -> None:
    for name in ("sites.svg", "sites.png"):
        assert inspect("--size", 64, "--drawing", work / name) == 0
    plan = wrap(load_network("nets:Net")).sites
    svg = (work / "sites.svg").read_text()
    named = ["image", "intro", "middle", "up.0", "decoder", "ending", "restored"]
    assert {site.name for site in plan} >= set(named[1:-1])
    places = [svg.index(f"<!-- {name} -->") for name in named]
    assert places == sorted(places)
    for site in plan:
        assert f"<!-- {site.name} -->" in svg
    pixels = np.array(Image.open(work / "sites.png").convert("RGB")).reshape(-1, 3)
    for colour in [(178, 24, 43), (146, 197, 222)]:  # a level site's and a layer site's
        assert (pixels == colour).all(axis=1).sum() > 500


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        (["--backbone", "nets:Net", "--drawing", "d.jpg"], "ends in .png or .svg"),
        (["--backbone", "nets:Net", "--drawing", "no/d.png"], "there is no folder 'no'"),
        (["--backbone", "nets:Net", "--size", "65"], "multiples of 2; give 64"),
        (["--backbone", "nets:Net", "--adapter", "./nowhere"], "nowhere"),
        (["--backbone", "nets:NeedsMore"], "NeedsMore fails on an image"),
        (["--backbone", "nets:nothing"], "cannot be imported"),
        (["--backbone", "nowhere.pth"], "there is no checkpoint 'nowhere.pth'"),
    ],
)
def test_what_cannot_be_inspected(
    told: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *told]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert problem in captured.err
    assert not list(Path().glob("d.*"))


def test_a_drawing_needs_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from perceive_adapter.cli import options

    monkeypatch.setattr(options, "find_spec", lambda name: None)
    assert inspect("--drawing", "d.png") == 2
    assert "matplotlib not installed" in capsys.readouterr().err


def test_sizes_are_checked_while_they_are_read(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        inspect("--size", 0)
    assert "whole number from 16" in capsys.readouterr().err


def test_a_network_in_half_precision_is_counted_and_drawn(tmp_path: Path) -> None:
    network = load_network("nets:Net")
    whole, half = wrap(copy.deepcopy(network)), wrap(network.bfloat16())
    assert measure_cost(half, 64).bare == measure_cost(whole, 64).bare == MULTIPLY_ADDS
    assert [site.name for site in in_order(half)] == [site.name for site in in_order(whole)]
