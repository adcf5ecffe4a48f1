"""``perceive-adapter restore``, run as users run it."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import skimage.data
import torch
from PIL import Image, ImageCms

from perceive_adapter import PerceiveModel, QualityPerceiver, wrap
from perceive_adapter.cli import main
from perceive_adapter.cli.images import free_names
from perceive_adapter.data import FAMILIES

NETWORK = """
import torch
from torch import nn


def body(inputs, outputs, *more):
    torch.manual_seed(0)
    layers = [nn.Conv2d(inputs, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, outputs, 3, padding=1)]
    return nn.Sequential(*layers, *more)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = body(3, 3)

    def forward(self, image):
        if image.shape[-1] == 410:
            raise torch.OutOfMemoryError("no memory")
        if image.shape[-1] == 420:
            raise MemoryError
        if image.shape[-1] == 430:
            torch.empty(2**60, dtype=torch.uint8)
        if image.shape[-1] == 440:
            raise RuntimeError("no such size")
        if image.shape[-1] == 450:
            image = image / 0
        return image + 0.1 * self.body(image) + 0.1 * image.mean(dim=(2, 3), keepdim=True)


def twice():
    return body(3, 12, nn.PixelShuffle(2))


def five():
    return body(5, 5)
"""


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def photograph(file: str, mode: str = "RGB", side: int = 48) -> Path:
    """Another part of a photograph for every name."""
    start = sum(file.encode()) % 200
    pixels = skimage.data.astronaut()[start : start + side, start : start + side + 8]
    image = Image.fromarray(pixels).convert(mode)
    if "A" in mode:
        image.putalpha(Image.fromarray(pixels[..., 1]))
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    return Path(file)


def save_adapter(network: str = "Small") -> PerceiveModel:
    """Save an adapter that does something as ``NETWORK-adapter``, and return its model."""
    model = wrap(getattr(importlib.import_module("nets"), network)().eval())
    with torch.no_grad():
        for parameter in model.injector.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(f"{network}-adapter")
    return model


@pytest.fixture
def model(work: Path) -> PerceiveModel:
    return save_adapter()


def restore(*told: object, network: str = "Small", bare: bool = False) -> int:
    adapter = [] if bare else ["--adapter", f"{network}-adapter"]
    where = ["--backbone", f"nets:{network}", *adapter, "--device", "cpu"]
    return main(["restore", *map(str, told), *where])


def same(file: str | Path, expected: Image.Image) -> bool:
    """Whether a file is a PNG of these very pixels, and of the same mode."""
    image = Image.open(file)
    alike = (image.format, image.mode, image.size) == ("PNG", expected.mode, expected.size)
    return alike and image.tobytes() == expected.tobytes()


def files(folder: str) -> set[str]:
    return {str(file.relative_to(folder)) for file in Path(folder).rglob("*") if file.is_file()}


def test_images_of_any_kind_are_restored_as_in_python(model: PerceiveModel) -> None:
    """Below the folder that was given they have the place that they had."""
    for name, mode in [("g.png", "L"), ("deep/er/ga.png", "LA"), ("deep/ca.png", "RGBA")]:
        photograph(f"photos/{name}", mode)
    photograph("photos/p.png", "P")
    photograph("photos/deep/er/c.jpg")
    photograph("alone.bmp")
    assert restore("photos", "alone.bmp", "--out", "out/put") == 0
    inputs = {f"{Path(name).with_suffix('.png')}": name for name in files("photos")}
    assert len(inputs) == 5
    assert files("out/put") == {*inputs, "alone.png"}
    for name, source in inputs.items():
        restored = model.restore(Path("photos") / source)
        assert same(Path("out/put") / name, restored)
        assert restored.tobytes() != Image.open(Path("photos") / source).tobytes()
    assert same("out/put/alone.png", model.restore("alone.bmp"))
    alpha = Image.open("out/put/deep/ca.png").getchannel("A")
    assert alpha.tobytes() == Image.open("photos/deep/ca.png").getchannel("A").tobytes()


def test_what_a_photograph_s_colours_mean_is_kept(model: PerceiveModel) -> None:
    """Its profile is, and it is turned upright."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photograph("a.png")).save("a.jpg", exif=exif, icc_profile=profile)
    assert restore("a.jpg", "a.png", "--out", "out") == 0
    assert same("out/a.png", model.restore("a.jpg"))
    assert Image.open("out/a.png").size == Image.open("a.jpg").size[::-1]
    assert Image.open("out/a.png").info["icc_profile"] == profile
    assert "icc_profile" not in Image.open("out/a-2.png").info


def test_upscalers(work: Path) -> None:
    model = save_adapter("twice")
    photograph("a.png", "RGBA")
    assert restore("a.png", "--out", "out", network="twice") == 0
    assert Image.open("out/a.png").size == (2 * 56, 2 * 48)
    assert same("out/a.png", model.restore("a.png"))


def test_tiles(model: PerceiveModel) -> None:
    photograph("a.png", side=200)
    assert restore("a.png", "--out", "out", "--tile", 96) == 0
    assert same("out/a.png", model.restore("a.png", tile=96))
    assert not same("out/a.png", model.restore("a.png"))


def test_without_an_adapter_the_backbone_alone_restores(
    model: PerceiveModel, capsys: pytest.CaptureFixture[str]
) -> None:
    photograph("a.png")
    assert restore("a.png", "--out", "out", bare=True) == 0
    with model.disabled():
        expected = model.restore("a.png")
    assert same("out/a.png", expected)
    assert not same("out/a.png", model.restore("a.png"))
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["file", "restored"],
        ["a.png", "out/a.png"],
    ]


# What is told


def test_a_table_of_what_was_perceived(
    work: Path, model: PerceiveModel, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.jpg", "b/longer.png"):
        photograph(f"photos/{name}", side=96)
    assert restore("photos", "--out", "out") == 0
    head, *told = capsys.readouterr().out.splitlines()
    assert main(["perceive", "photos"]) == 0
    head_perceived, *perceived = capsys.readouterr().out.splitlines()
    assert head.split() == ["file", "restored", *head_perceived.split()[1:]]
    for line, alone, target in zip(told, perceived, ("a.png", "b/longer.png"), strict=True):
        file, rest = alone.split(maxsplit=1)
        assert line.split(maxsplit=2) == [file, f"out/{target}", rest]
        assert line.index(rest) == head.index("score")


def test_json_is_that_of_perceive_and_the_restored_file(
    model: PerceiveModel, capsys: pytest.CaptureFixture[str]
) -> None:
    photograph("photos/a.jpg")
    assert restore("photos", "--out", "out", "--json") == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record.pop("restored") == "out/a.png"
    assert main(["perceive", "photos", "--json"]) == 0
    assert [record] == json.loads(capsys.readouterr().out)
    assert restore("photos", "--out", "more", "--json", bare=True) == 0
    records = json.loads(capsys.readouterr().out)
    assert records == [{"file": "photos/a.jpg", "restored": "more/a.png"}]


def test_the_adapter_s_own_perceiver_tells(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    perceiver = QualityPerceiver.from_pretrained("perceive-tiny")
    with torch.no_grad():
        perceiver.heads.presence.weight.zero_()
        perceiver.heads.presence.bias.copy_(torch.tensor([-9.0, 9, 9, -9, -9, -9]))
    perceiver.save_pretrained("perceiver")
    network = importlib.import_module("nets").Small().eval()
    wrap(network, perceiver="perceiver").save_pretrained("Small-adapter")
    photograph("a.png")
    assert restore("a.png", "--out", "out", "--json") == 0
    (record,) = json.loads(capsys.readouterr().out)
    present = [name for name, value in record["degradations"].items() if value > 0.9]
    assert present == [FAMILIES[1], FAMILIES[2]]


# What cannot be done


def test_broken_images_are_named_and_the_others_restored(
    model: PerceiveModel, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = photograph("photos/whole.png").read_bytes()
    Path("photos/cut.png").write_bytes(whole[: len(whole) // 2])
    Path("photos/text.jpg").write_bytes(b"no image")
    Image.new("CMYK", (20, 20)).save("photos/cmyk.jpg")
    Path("empty").mkdir()
    assert restore("photos", "missing.png", "empty", "--out", "out", "--json") == 1
    printed = capsys.readouterr()
    assert [record["file"] for record in json.loads(printed.out)] == ["photos/whole.png"]
    complaints = printed.err.splitlines()
    for name in ("photos/cut.png", "photos/text.jpg", "photos/cmyk.jpg", "missing.png"):
        (complaint,) = (line for line in complaints if f"skipped {name}: " in line)
        assert "leave this one out" in complaint
    assert any("skipped the folder empty: it holds no image" in line for line in complaints)
    assert "Traceback" not in printed.err
    assert files("out") == {"whole.png"}
    assert same("out/whole.png", model.restore("photos/whole.png"))
    for told in ("photos/cut.png", "missing.png", "empty"):
        assert restore(told, "--out", "none") == 2
    assert not Path("none").exists()


def test_a_file_that_cannot_be_written(
    model: PerceiveModel, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/x.png", "b/x.png"):
        photograph(f"photos/{name}")
    Path("out").mkdir()
    Path("out/a").write_text("in the way of a folder")
    assert restore("photos", "--out", "out") == 1
    assert "the restored photos/a/x.png cannot be written: " in capsys.readouterr().err
    assert files("out") == {"a", "b/x.png"}
    Path("out/b/x.png").unlink()
    Path("out/b/x.png").mkdir()
    assert restore("photos/b", "--out", "out/b", "--overwrite") == 2
    assert files("out") == {"a"}  # no draft is left


def test_a_name_may_be_as_long_as_names_can_be(model: PerceiveModel) -> None:
    name = f"{'n' * 251}.png"
    photograph(name)
    assert restore(name, "--out", "out") == 0
    assert files("out") == {name}


@pytest.mark.parametrize("width", [410, 420, 430], ids=["GPU", "Python", "CPU"])
def test_an_image_that_does_not_fit_into_memory(
    width: int, model: PerceiveModel, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (width, 100)).save("large.png")
    photograph("small.png")
    assert restore("large.png", "small.png", "--out", "out") == 1
    complaint = capsys.readouterr().err
    assert f"skipped large.png: {width} x 100 pixels do not fit into memory" in complaint
    assert "Give --tile" in complaint
    assert files("out") == {"small.png"}
    assert restore("large.png", "--out", "out", "--tile", 96) == 0


def test_an_image_that_the_network_fails_on(
    model: PerceiveModel, capsys: pytest.CaptureFixture[str]
) -> None:
    for width in (440, 450):
        Image.new("RGB", (width, 100)).save(f"a{width}.png")
    photograph("small.png")
    assert restore("a440.png", "a450.png", "small.png", "--out", "out", "--json") == 1
    printed = capsys.readouterr()
    assert [record["file"] for record in json.loads(printed.out)] == ["small.png"]
    for width, kind in ((440, "RuntimeError: no such size"), (450, "BackboneError: the network")):
        told = f"{width} x 100 pixels made the network raise {kind}"
        assert f"skipped a{width}.png: {told}" in printed.err
    assert "Traceback" not in printed.err


def test_a_name_is_one_line(model: PerceiveModel, capsys: pytest.CaptureFixture[str]) -> None:
    photograph("a\nb\x1b[31m.png")
    assert restore("a\nb\x1b[31m.png", "--out", "out") == 0
    _, line = capsys.readouterr().out.splitlines()
    assert line.startswith(r"a\nb\x1b[31m.png ")


def test_folders_whose_names_differ_in_case_are_two(model: PerceiveModel) -> None:
    photograph("photos/restored/a.png")
    Path("photos/Restored").mkdir(exist_ok=True)
    if len(os.listdir("photos")) == 1:
        pytest.skip("this file system takes them for one")
    assert restore("photos", "--out", "photos/Restored") == 0
    assert files("photos/Restored") == {"restored/a.png"}


def test_a_backbone_of_other_channels(capsys: pytest.CaptureFixture[str]) -> None:
    photograph("a.png")
    assert restore("a.png", "--out", "out", network="five", bare=True) == 2
    assert "nets:five takes images of 5 channels: expected gray or RGB" in capsys.readouterr().err
    assert not Path("out").exists()


# Names


def test_names_that_are_alike_are_numbered(model: PerceiveModel) -> None:
    sources = ["photos/a.jpg", "photos/a.png", "photos/a-2.png", "photos/A.bmp", "more/a.png"]
    for file in sources:
        photograph(file)
    assert restore("photos", "more", "--out", "out") == 0
    written = {name: Image.open(f"out/{name}").tobytes() for name in files("out")}
    assert sorted(written.values()) == sorted(model.restore(file).tobytes() for file in sources)
    assert len({name.lower() for name in written}) == len(sources)


def test_names_hang_on_the_order_alone() -> None:
    wanted = [Path("o/a.png"), Path("o/a.png"), Path("o/a-2.png"), Path("p/a.png"), Path("o/b.png")]
    free = ["o/a.png", "o/a-2.png", "o/a-2-2.png", "p/a.png", "o/b-2.png"]
    assert free_names(wanted, [Path("x/../o/B.png")]) == [Path(name) for name in free]


def test_no_input_is_overwritten(model: PerceiveModel) -> None:
    before = photograph("a.png").read_bytes()
    photograph("here/b.png")
    os.symlink("../a.png", "here/a.png")
    for _ in range(2):
        assert restore("a.png", "--out", ".", "--overwrite") == 0
        assert restore("a.png", "--out", "here", "--overwrite") == 0
    assert Path("a.png").read_bytes() == before
    assert Path("here/a.png").is_symlink()
    assert same("a-2.png", model.restore("a.png"))
    assert same("here/a-2.png", model.restore("a.png"))


def test_what_is_there_is_replaced_only_if_asked(
    model: PerceiveModel, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "b/c.png"):
        photograph(f"photos/{name}")
    Path("out/b").mkdir(parents=True)
    Path("out/b/c.png").write_text("of another run")
    assert restore("photos", "--out", "out") == 2
    complaint = capsys.readouterr().err
    assert "holds files already by the names of 1 of the 2 restored" in complaint
    assert "such as 'out/b/c.png'" in complaint
    assert "or --overwrite" in complaint
    assert files("out") == {"b/c.png"}
    assert Path("out/b/c.png").read_text() == "of another run"
    assert restore("photos", "--out", "out", "--overwrite") == 0
    assert same("out/b/c.png", model.restore("photos/b/c.png"))
    assert files("out") == {"a.png", "b/c.png"}


def test_an_interrupted_run_goes_on_with_what_is_missing(
    model: PerceiveModel, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "a.jpg", "c.png"):
        photograph(f"photos/{name}")
    assert restore("photos", "--out", "out") == 0
    restored = {name: Path(f"out/{name}").read_bytes() for name in files("out")}
    Path("out/a-2.png").write_text("done")
    Path("out/c.png").unlink()
    capsys.readouterr()
    assert restore("photos", "--out", "out", "--skip-existing", "--json") == 0
    printed = capsys.readouterr()
    assert [Path(one["file"]).name for one in json.loads(printed.out)] == ["c.png"]
    assert "2 of 3 restored images are there already" in printed.err
    assert Path("out/c.png").read_bytes() == restored["c.png"]
    assert Path("out/a-2.png").read_text() == "done"
    assert restore("photos", "--out", "out", "--skip-existing", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []


def test_what_an_interrupted_run_has_told_is_json(
    model: PerceiveModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png"):
        photograph(f"photos/{name}")
    whole = PerceiveModel.restore

    def interrupted(self: PerceiveModel, image: Any, **options: Any) -> Any:
        if files("out"):
            raise KeyboardInterrupt
        return whole(self, image, **options)

    monkeypatch.setattr(PerceiveModel, "restore", interrupted)
    assert restore("photos", "--out", "out", "--json") == 130
    (one,) = json.loads(capsys.readouterr().out)
    assert one["restored"] == "out/a.png"


def test_warnings_are_told_without_lines_of_code(model: PerceiveModel) -> None:
    photograph("photos/a.png")
    with torch.no_grad():
        model.backbone.body[0].weight.mul_(1.01)
    model.save_pretrained("of-another")
    told = [sys.executable, "-m", "perceive_adapter", "restore", "photos", "--out", "out"]
    told += ["--backbone", "nets:Small", "--adapter", "of-another", "--device", "cpu"]
    done = subprocess.run(told, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.startswith("perceive-adapter: note: of-another was trained on a Small with ")
    assert "it loads, since the shapes agree, and may restore badly" in done.stderr
    assert "__main__" not in done.stderr


def test_of_animations_it_is_said_that_the_first_frame_is_taken(
    model: PerceiveModel, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("photos/.hidden").mkdir(parents=True)
    first, second = (Image.new("RGB", (20, 20), color) for color in ("red", "blue"))
    for name in ("photos/a.webp", "photos/b.gif"):
        first.save(name, save_all=True, append_images=[second])
    for name in ("photos/._a.webp", "photos/.hidden/c.png"):  # as macOS and file managers have them
        Path(name).write_text("no image")
    assert restore("photos", "--out", "out") == 0
    told = capsys.readouterr().err
    assert "of the 2 frames or pages of photos/a.webp the first is taken" in told
    assert (
        "1 images of kinds that are not searched for are passed over, such as photos/b.gif" in told
    )
    assert files("out") == {"a.png"}


def test_restored_images_are_not_restored_again(model: PerceiveModel) -> None:
    photograph("photos/a.png")
    for _ in range(2):
        assert restore("photos", "--out", "photos/out", "--overwrite") == 0
        assert files("photos") == {"a.png", "out/a.png"}
    assert restore("photos/out", "--out", "again") == 0  # they are what is asked for
    assert same("again/a.png", model.restore("photos/out/a.png"))
    photograph("photos/out/first/b.png")
    assert restore("photos/out/first", "--out", "photos/out") == 0
    assert same("photos/out/b.png", model.restore("photos/out/first/b.png"))


def test_a_folder_that_holds_restored_images_alone(
    model: PerceiveModel, capsys: pytest.CaptureFixture[str]
) -> None:
    photograph("photos/out/a.png")
    assert restore("photos", "--out", "photos/out") == 2
    assert "skipped the folder photos: it holds no image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("photos/../photos/", "is a folder that is searched for images"),
        ("photos/a.png", "is a file: give the name of a folder"),
    ],
)
def test_folders_that_restored_images_cannot_go_to(
    model: PerceiveModel, capsys: pytest.CaptureFixture[str], out: str, message: str
) -> None:
    photograph("photos/a.png")
    assert restore("photos", "--out", out, "--overwrite") == 2
    assert message in capsys.readouterr().err
    assert files("photos") == {"a.png"}


def test_a_killed_run_leaves_whole_files(
    model: PerceiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is written beside its place, and put there when it is whole."""
    photograph("a.png")
    Path("out").mkdir()
    shutil.copy("a.png", "out/a.png")
    before = Path("out/a.png").read_bytes()

    def killed(draft: Path, target: Path) -> None:
        assert Image.open(draft).tobytes() == model.restore("a.png").tobytes()
        assert Path(target).read_bytes() == before
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    assert restore("a.png", "--out", "out", "--overwrite") == 130
    assert files("out") == {"a.png"}
    assert Path("out/a.png").read_bytes() == before
