"""Protocols, figures against their definition, and reports."""

from __future__ import annotations

import csv
import errno
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import skimage.metrics
import torch
from PIL import Image
from torch import Tensor

from perceive_adapter.errors import BackboneError, ConfigError, ImageError
from perceive_adapter.evaluation.cases import Case, degraded_cases, noise_cases
from perceive_adapter.evaluation.measure import Measured, compare
from perceive_adapter.evaluation.protocols import PROTOCOLS
from perceive_adapter.evaluation.report import (
    draw_bars,
    draw_grid,
    stamp,
    table,
    thumbnail,
    write_csv,
)

PHOTO = skimage.data.astronaut()[100:164, 180:260]


def save(file: Path, pixels: object = PHOTO) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(file)
    return file


def array(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy().astype(np.float64)


# Figures


def test_figures_are_those_of_scikit_image() -> None:
    target = torch.from_numpy(PHOTO).permute(2, 0, 1)[None].float() / 255
    noisy = (target + 0.05 * torch.randn(target.shape)).clamp(0, 1).mul(255).round() / 255
    case = Case("noise", "a", lambda: (noisy, target))
    given, blurred = compare({"mean": lambda image: 0.5 * (image + image.roll(1, 3))}, [case])
    assert (given.network, blurred.network, blurred.group) == ("degraded", "mean", "noise")
    first, second = array(noisy[0]), array(target[0])
    psnr = skimage.metrics.peak_signal_noise_ratio(second, first, data_range=1)
    assert given.psnr == pytest.approx(psnr, abs=1e-4)
    ssim = skimage.metrics.structural_similarity(
        second,
        first,
        data_range=1,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert given.ssim == pytest.approx(ssim, abs=1e-4)


def test_restored_images_are_measured_as_files_of_8_bits_hold_them() -> None:
    target = torch.full((1, 3, 16, 16), 0.5)
    case = Case("x", "a", lambda: (target, (target * 255).round() / 255))
    for value, expected in [(0.5, 100.0), (0.5 + 1.4 / 255, 48.13), (7.0, 6.05)]:
        found = compare({"one": lambda _, v=value: torch.full_like(target, v)}, [case])[1]
        assert found.psnr == pytest.approx(expected, abs=0.02)


def test_networks_that_write_into_their_input_spoil_no_figure() -> None:
    image, target = torch.rand(2, 1, 3, 16, 16).mul(255).round() / 255
    case = Case("x", "a", lambda: (image.clone(), target))
    networks = {"writes": lambda given: given.mul_(0.5), "after": lambda given: given * 1.0}
    given, _, after = compare(networks, [case])
    assert (given.psnr, given.ssim) == (after.psnr, after.ssim)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_figures_are_of_single_precision(dtype: torch.dtype) -> None:
    image = torch.rand(1, 3, 32, 32).to(dtype)
    target = (image.float() + 0.1 * torch.rand(image.shape)).clamp(0, 1)
    case = Case("x", "a", lambda: (image.float(), target))
    found = compare({"half": lambda _: image, "single": lambda _: image.float()}, [case])
    assert (found[1].psnr, found[1].ssim) == (found[2].psnr, found[2].ssim)


# Cases


def test_noise_is_of_its_sigma_in_8_bits_and_the_same_again(tmp_path: Path) -> None:
    gray = np.full((200, 200, 3), 128, np.uint8)
    paths = [save(tmp_path / name, gray) for name in ("a.png", "b.png")]
    first, second = (list(noise_cases(paths, 25, "x")) for _ in range(2))
    degraded, target = first[0].load()
    residual = (degraded - target) * 255
    assert residual.std().item() == pytest.approx(25, rel=0.02)
    torch.testing.assert_close(degraded * 255, (degraded * 255).round())
    assert torch.equal(degraded, second[0].load()[0])
    assert not torch.equal(degraded, first[1].load()[0])


def test_every_task_at_both_severities(tmp_path: Path) -> None:
    paths = [save(tmp_path / "a.png")]
    cases = list(degraded_cases(paths, ["rain", "jpeg+haze"], tmp_path))
    assert [(case.group, case.image) for case in cases] == [
        (task, f"a.png, severity {severity}")
        for task in ("rain", "jpeg+haze")
        for severity in (0.3, 0.6)
    ]
    errors = [(degraded - target).abs().mean() for degraded, target in (c.load() for c in cases)]
    assert errors[0] < errors[1]
    assert errors[2] < errors[3]


@pytest.mark.filterwarnings("ignore:2 images below")  # of CBSD68, which are in no pairs
def test_images_of_one_name_are_told_apart_and_counted(tmp_path: Path) -> None:
    for scene in ("a", "b"):
        save(tmp_path / "rain" / "input" / scene / "0.png", PHOTO // 2)
        save(tmp_path / "rain" / "gt" / scene / "0.png")
        pairs(tmp_path / "Rain100L" / "test" / scene, "0")
        save(tmp_path / "CBSD68" / "gt" / scene / "0.png")
    pairs(tmp_path / "SOTS", "0")
    for protocol, names in (
        ("pairs", ("rain/input/a/0.png", "rain/input/b/0.png")),
        ("synthetic", ("rain/gt/a/0.png, severity 0.3", "rain/gt/b/0.png, severity 0.3")),
        ("three-tasks", ("CBSD68/gt/a/0.png", "CBSD68/gt/b/0.png")),
        ("three-tasks", ("Rain100L/test/a/input/0.png", "Rain100L/test/b/input/0.png")),
    ):
        cases = PROTOCOLS[protocol].cases(tmp_path)
        named = [(case.group, case.image) for case in cases]
        assert len(set(named)) == len(named)
        assert set(names) <= {image for _, image in named}
    rain = [case for case in PROTOCOLS["pairs"].cases(tmp_path) if case.group == "rain"]
    assert "| rain | 2 |" in table(compare({"same": lambda image: image}, rain))


def test_a_table_counts_images_whatever_their_names() -> None:
    rows = [Measured("rain", "0.png", name, 20, 0.9) for name in ("degraded", "wrapped") * 3]
    assert table(rows).splitlines()[2].startswith("| rain | 3 |")
    assert table(rows).splitlines()[3].startswith("| mean of the groups | 3 |")


def test_a_table_tells_folders_by_their_own_names() -> None:
    groups = ["gaussian_noise+rain", "a_b", "a b", "x|y", "two\nlines"]
    rows = [Measured(group, "0.png", "degraded", 20, 0.9) for group in groups]
    cells = [line.split(" | ")[0] for line in table(rows).splitlines()[2:-1]]
    assert cells == ["| gaussian noise + rain", "| a_b", "| a b", r"| x\|y", "| two lines"]


def test_what_cannot_be_measured_is_left_out_if_asked(tmp_path: Path) -> None:
    torn, tiny, whole = (save(tmp_path / name) for name in ("0.png", "1.png", "2.png"))
    torn.write_bytes(torn.read_bytes()[:2000])
    save(tiny, PHOTO[:5, :5])
    cases = list(degraded_cases([torn, tiny, whole], ["rain"], tmp_path))
    with pytest.raises(ImageError):
        compare({}, cases)
    skipped: list[str] = []
    found = compare({}, cases, skipped=skipped)
    assert [row.image for row in found] == ["2.png, severity 0.3", "2.png, severity 0.6"]
    assert len(skipped) == 4
    assert "0.png" in skipped[0]
    assert "1.png, severity 0.3 has 5 x 5 pixels" in skipped[2]


def test_images_that_a_network_fails_on_are_named() -> None:
    def fails(image: torch.Tensor) -> torch.Tensor:
        if image.shape[-1] > 20:
            raise RuntimeError("no such size")
        return image

    small, large = (torch.rand(1, 3, 16, side) for side in (16, 24))
    cases = [Case("rain", name, lambda x=x: (x, x)) for name, x in (("a", small), ("b", large))]
    with pytest.raises(
        BackboneError, match=r"b of rain, 24 x 16 .*RuntimeError: no such size.*skip"
    ):
        compare({"fails": fails}, cases)
    skipped: list[str] = []
    found = compare({"fails": fails}, cases, skipped=skipped)
    assert [row.image for row in found] == ["a", "a"]
    assert len(skipped) == 1


# Protocols


def pairs(folder: Path, *names: str) -> None:
    for name in names:
        save(folder / "input" / f"{name}.png", PHOTO // 2)
        save(folder / "gt" / f"{name}.png")


def test_named_sets_are_found_at_any_depth(tmp_path: Path) -> None:
    save(tmp_path / "denoise" / "CBSD68" / "gt" / "1.png")
    pairs(tmp_path / "derain" / "Rain100L", "1", "2")
    pairs(tmp_path / "derain" / "Rain100H", "1")
    pairs(tmp_path / "dehaze" / "SOTS_outdoor", "1")
    cases = PROTOCOLS["three-tasks"].cases(tmp_path)
    assert [case.group for case in cases] == [
        *(f"CBSD68 sigma {sigma}" for sigma in (15, 25, 50)),
        "SOTS_outdoor",
        *["Rain100L"] * 2,
    ]
    degraded, target = cases[-1].load()
    torch.testing.assert_close(target[0], torch.from_numpy(PHOTO).permute(2, 0, 1) / 255)
    assert degraded.mean() < target.mean()
    with pytest.raises(ConfigError, match=r"no folder named GoPro or GOPRO.*'five-tasks'"):
        PROTOCOLS["five-tasks"].cases(tmp_path)
    everything = PROTOCOLS["pairs"].cases(tmp_path / "derain")
    assert sorted(case.group for case in everything) == ["Rain100H", "Rain100L", "Rain100L"]


def test_the_current_folder_may_be_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "CBSD68" / "gt" / "1.png")
    pairs(tmp_path / "CBSD68" / "Rain100L", "1")
    pairs(tmp_path / "CBSD68" / "SOTS", "1")
    monkeypatch.chdir(tmp_path / "CBSD68")
    groups = [case.group for case in PROTOCOLS["three-tasks"].cases(Path())]
    assert groups[:3] == [f"CBSD68 sigma {sigma}" for sigma in (15, 25, 50)]


def test_named_sets_may_be_behind_links(tmp_path: Path) -> None:
    save(tmp_path / "disk" / "CBSD68" / "gt" / "1.png")
    pairs(tmp_path / "disk" / "Rain100L", "1")
    pairs(tmp_path / "other", "1")
    (tmp_path / "data").mkdir()
    for name, place in [("disk", "disk"), ("SOTS", "other"), ("circle", "data")]:
        (tmp_path / "data" / name).symlink_to(tmp_path / place)
    groups = [case.group for case in PROTOCOLS["three-tasks"].cases(tmp_path / "data")]
    assert groups[-2:] == ["SOTS", "Rain100L"]


def test_of_a_set_the_part_to_test_on_counts(tmp_path: Path) -> None:
    for name in ("original_png", "noisy25"):
        save(tmp_path / "CBSD68" / name / "1.png")
    pairs(tmp_path / "Rain100L", "1")
    pairs(tmp_path / "SOTS" / "indoor", "1", "2")
    pairs(tmp_path / "SOTS" / "outdoor", "1")
    groups = [case.group for case in PROTOCOLS["three-tasks"].cases(tmp_path)]
    assert groups == [*(f"CBSD68 sigma {s}" for s in (15, 25, 50)), "SOTS", "Rain100L"]
    pairs(tmp_path / "GoPro" / "train", "1", "2")
    pairs(tmp_path / "GoPro" / "test", "3")
    pairs(tmp_path / "LOL" / "our485", "1", "2")
    pairs(tmp_path / "LOL" / "eval15", "3")
    groups = [case.group for case in PROTOCOLS["five-tasks"].cases(tmp_path)]
    assert groups[-2:] == ["GoPro", "LOL"]
    (tmp_path / "GoPro" / "test").rename(tmp_path / "GoPro" / "Test")
    groups = [case.group for case in PROTOCOLS["five-tasks"].cases(tmp_path)]
    assert groups[-2:] == ["GoPro", "LOL"]


@pytest.mark.parametrize("part", ["SOTS/outdoor", "GoPro/test", "LOL/eval15", "CBSD68/gt"])
def test_no_other_part_takes_the_place_of_a_missing_one(tmp_path: Path, part: str) -> None:
    for name in ("SOTS/outdoor", "SOTS/indoor", "GoPro/test", "GoPro/train", "Rain100L"):
        pairs(tmp_path / name, "1")
    for name in ("LOL/eval15", "LOL/our485"):
        pairs(tmp_path / name, "1")
    for name in ("gt", "noisy25"):
        save(tmp_path / "CBSD68" / name / "1.png")
    PROTOCOLS["five-tasks"].cases(tmp_path)
    shutil.rmtree(tmp_path / part)
    with pytest.raises(ConfigError, match=f"{part.split('/')[0]}' has no folder named.*that part"):
        PROTOCOLS["five-tasks"].cases(tmp_path)


def test_what_lies_deeper_than_a_set_itself_is_never_measured(tmp_path: Path) -> None:
    for name in ("0", "noisy25/0"):
        save(tmp_path / "CBSD68" / f"{name}.png")
    for name in ("Rain100L", "Rain100L/train", "SOTS", "SOTS/indoor/part"):
        pairs(tmp_path / name, f"{len(name)}")
    (tmp_path / "SOTS" / "train-0.tar").touch()  # directly in it, so that it counts
    with pytest.raises(ImageError, match=r"train-0\.tar"):
        PROTOCOLS["three-tasks"].cases(tmp_path)
    (tmp_path / "SOTS" / "train-0.tar").rename(tmp_path / "SOTS" / "indoor" / "train-0.tar")
    cases = PROTOCOLS["three-tasks"].cases(tmp_path)
    assert [case.image for case in cases] == [
        *["CBSD68/0.png"] * 3,
        "SOTS/input/4.png",
        "Rain100L/input/8.png",
    ]


@pytest.mark.parametrize(
    ("name", "kind"), [("CBSD68", "images"), ("Rain100L", "pairs"), ("SOTS", "pairs")]
)
def test_deeper_folders_do_not_stand_in_for_a_set(tmp_path: Path, name: str, kind: str) -> None:
    save(tmp_path / "CBSD68" / "0.png")
    for folder in ("Rain100L", "SOTS"):
        pairs(tmp_path / folder, "1")
    (tmp_path / "more").mkdir()
    for path in (tmp_path / name).iterdir():
        path.rename(tmp_path / "more" / path.name)
    (tmp_path / "more").rename(tmp_path / name / "train")
    if kind == "pairs":
        save(tmp_path / name / "overview.png")
    with pytest.raises(ConfigError, match=f"{name}' has no .* and no {kind} directly in it"):
        PROTOCOLS["three-tasks"].cases(tmp_path)


@pytest.mark.parametrize(("target", "size"), [((3, 4), 1), ((16, 16), 2)])
def test_images_that_cannot_be_measured(target: tuple[int, int], size: int) -> None:
    image = torch.rand(1, 3, *target)
    case = Case("x", "a", lambda: (image, image))
    enlarge = torch.nn.Upsample(scale_factor=size)
    with pytest.raises(ImageError, match=r"a has 3 x 4 pixels: SSIM needs|of a, whose target"):
        compare({"one": enlarge}, [case])


def test_the_synthetic_protocol_takes_every_image(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png")
    cases = PROTOCOLS["synthetic"].cases(tmp_path)
    assert len(cases) == 2 * 11
    with pytest.raises(ConfigError, match="is no folder"):
        PROTOCOLS["synthetic"].cases(tmp_path / "b")


# Reports


def measured() -> list[Measured]:
    rows = [("rain", "1", 20.0, 24.0), ("rain", "2", 22.0, 30.0), ("low_light", "1", 10.0, 11.0)]
    return [
        Measured(group, image, network, psnr, psnr / 100)
        for group, image, before, after in rows
        for network, psnr in (("degraded", before), ("wrapped", after))
    ]


def test_tables_give_means_of_groups_and_the_mean_of_those(tmp_path: Path) -> None:
    assert table(measured()).splitlines()[2:] == [
        "| rain | 2 | 21.00 / 0.210 | 27.00 / 0.270 |",
        "| low light | 1 | 10.00 / 0.100 | 11.00 / 0.110 |",
        "| mean of the groups | 3 | 15.50 / 0.155 | 19.00 / 0.190 |",
    ]
    write_csv(measured(), tmp_path / "images.csv")
    with (tmp_path / "images.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 6
    assert rows[1] == {
        "group": "rain",
        "image": "1",
        "network": "wrapped",
        "psnr": "24.0",
        "ssim": "0.24",
    }


def test_of_a_large_image_as_much_is_kept_as_its_cell_shows() -> None:
    image = torch.rand(3, 1280, 960)
    kept = thumbnail(image)
    assert kept.shape == (3, 640, 480)
    torch.testing.assert_close(kept[:, 0, 0], image[:, :2, :2].mean((1, 2)))
    assert torch.equal(thumbnail(kept), kept)


def test_pictures_show_every_group(tmp_path: Path) -> None:
    draw_bars(measured(), tmp_path / "bars.png")
    image = torch.from_numpy(PHOTO).permute(2, 0, 1) / 255
    row = {"degraded": image / 2, "target": image}
    draw_grid({"rain": row, "haze": row}, tmp_path / "grid.png")
    for name in ("bars.png", "grid.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 10
    wide = Image.open(tmp_path / "grid.png").size
    assert math.isclose(wide[0] / wide[1], 6 / 4.8, rel_tol=0.05)
    draw_grid({r"a$\b$": row}, tmp_path / "mathematics.png")
    draw_bars([Measured(r"a$_$b", "1", "degraded", 20, 0.9)], tmp_path / "mathematics.png")
    draw_grid({f"scene {index}": row for index in range(60)}, tmp_path / "many.png")
    assert Image.open(tmp_path / "many.png").size[1] < 11 * wide[1]


@pytest.mark.parametrize(("write", "name"), [(write_csv, "a.csv"), (draw_bars, "a.png")])
def test_a_full_disk_leaves_the_report_of_before(
    write: Callable, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(measured(), tmp_path / name)
    before = (tmp_path / name).read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(measured()[:1], tmp_path / name)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {name: before}


def test_a_stamp_says_what_it_was_made_with() -> None:
    made = stamp("pairs", "cpu")
    assert made["protocol"] == "pairs"
    assert torch.__version__ in made["versions"]
    assert made["device"].startswith("cpu")
    assert len(made["date"]) == 10
    assert made["commit"]
