"""What restoration is trained on: the same samples in every run, in the shares that are asked."""

import math
import shutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from perceive_adapter.data import FAMILIES
from perceive_adapter.data.pairs import Pair, find_pairs
from perceive_adapter.data.restoration import (
    CleanPhotos,
    Drawn,
    PairFiles,
    RestorationData,
    RestorationSample,
)
from perceive_adapter.data.samples import CropSampler
from perceive_adapter.errors import ConfigError, ImageError


def photos(count: int = 2, side: int = 80) -> CropSampler:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.rand(3, side // 8, side // 8, generator=generator) for _ in range(count)]
    scaled = [torch.nn.functional.interpolate(one[None], side, mode="bicubic") for one in drawn]
    return CropSampler([one[0].mul(255).clamp(0, 255).byte() for one in scaled])


def data(*tasks: str, **options: object) -> RestorationData:
    settings = {"context": 48, "patch": 32, **options}
    return RestorationData([CleanPhotos(photos(), tasks)], **settings)  # type: ignore[arg-type]


def test_settings_hold_what_each_source_adds(tmp_path: Path) -> None:
    settings = data("rain").settings()
    assert settings == data("rain").settings()
    assert settings["sources"]["0"]["severity"] == [0.0, 1.0]
    narrow = RestorationData([CleanPhotos(photos(), ["rain"], (0.2, 0.4))], context=48, patch=32)
    assert {**narrow.settings(), "sources": None} == {**settings, "sources": None}
    assert narrow.settings()["sources"]["0"]["severity"] == [0.2, 0.4]
    file = write(tmp_path, "1.png", scene())
    pairs = PairFiles([Pair(file, file, "haze"), Pair(file, file, "blur")] * 2)
    assert pairs.settings() == {"pairs": {"haze": 2, "blur": 2}}


def write(folder: Path, name: str, pixels: Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    Image.fromarray(pixels.permute(1, 2, 0).byte().numpy()).save(file)
    return file


def scene(side: int = 60) -> Tensor:
    """An image that shows where it is, and which way round."""
    rows, columns = torch.arange(side).view(-1, 1), torch.arange(side)
    return (3 * rows + columns).expand(3, -1, -1)


def pair(folder: Path, name: str, side: int = 60, suffix: str = ".png") -> Pair:
    """A pair whose degraded image is half as bright."""
    target = scene(side)
    return Pair(
        write(folder / "input", name + suffix, target // 2),
        write(folder / "gt", f"{name}.png", target),
        folder.name,
    )


def same(first: RestorationSample, second: RestorationSample) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# An endless row of samples


def test_a_sample_hangs_on_its_index_alone() -> None:
    first, second = data("rain", "haze"), data("rain", "haze")
    later = [first[index] for index in (9, 3, 500_000 * 8)]
    assert all(
        same(one, second[index])
        for one, index in zip(later[::-1], (500_000 * 8, 3, 9), strict=True)
    )
    assert not torch.equal(later[0].target, later[1].target)
    assert not torch.equal(later[0].target, data("rain", "haze", seed=1)[9].target)


def test_loaders_of_any_number_of_workers_draw_the_same() -> None:
    here, there = (
        list(DataLoader(data("rain", "jpeg"), batch_sampler=[[0, 1], [4, 5]], num_workers=workers))
        for workers in (0, 2)
    )
    assert all(same(a, b) for a, b in zip(here, there, strict=True))
    assert isinstance(here[0], RestorationSample)
    assert here[0].degraded.shape == (2, 3, 32, 32)


def test_samples_are_the_same_whatever_torch_s_default_dtype_is() -> None:
    samples = data("rain", "haze+gaussian_noise", "low_light", "motion_blur+jpeg")
    expected = [samples[index] for index in range(8)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        drawn = [samples[index] for index in range(8)]
    finally:
        torch.set_default_dtype(before)
    for pair in zip(drawn, expected, strict=True):
        for one, other in zip(*pair, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1 / 255, equal_nan=True)


def test_the_restored_part_is_a_window_of_what_is_perceived() -> None:
    sample = data("low_light")[0]
    assert sample.context.shape == (3, 48, 48)
    windows = sample.context.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
    assert (windows == sample.degraded).flatten(2).all(dim=2).any()
    assert sample.degraded.mean() < sample.target.mean()


@pytest.mark.parametrize(
    ("ratios", "shares"),
    [
        ({}, (1 / 3, 1 / 3, 1 / 3)),
        ({"rain": 2}, (0.5, 0.25, 0.25)),
        ({"haze": 0, "jpeg": 3}, (0.25, 0, 0.75)),
    ],
)
def test_tasks_are_drawn_by_their_ratios(
    ratios: dict[str, float], shares: tuple[float, ...]
) -> None:
    drawn = data("rain", "haze", "jpeg", ratios=ratios, context=16, patch=16)
    counts = Counter(int(drawn[index].task) for index in range(60))
    assert [counts[column] / 60 for column in range(3)] == pytest.approx(shares, abs=0.05)
    probe = drawn.probe(3)
    assert probe.task.tolist() == [c for c, share in enumerate(shares) if share for _ in range(3)]
    assert same(probe, drawn.probe(3))


def test_arguments_that_cannot_be_drawn() -> None:
    cases = [
        ({"context": 16, "patch": 32}, "patch=32 and context=16"),
        ({"ratios": {"snow": 1}}, r"ratios of snow.*tasks are rain"),
        ({"ratios": {"rain": -1}}, "cannot be drawn by"),
        ({"ratios": {"rain": 0}}, "cannot be drawn by"),
        ({"ratios": {"rain": math.inf}}, "cannot be drawn by"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            data("rain", **options)
    with pytest.raises(ConfigError, match="two sources have a task 'rain'"):
        RestorationData([CleanPhotos(photos(), ["rain"])] * 2, context=16, patch=16)


# Clean photographs


def test_severities_are_known_by_family() -> None:
    source = CleanPhotos(photos(), ["motion_blur+rain", "jpeg"], severity=(0.4, 0.6))
    drawn = source.draw("motion_blur+rain", 32, torch.Generator().manual_seed(0))
    present = [name for name, value in zip(FAMILIES, drawn.severity, strict=True) if value > 0]
    assert set(present) == {"blur", "rain"}
    assert ((drawn.severity == 0) | ((drawn.severity > 0.4) & (drawn.severity < 0.6))).all()
    assert not torch.equal(drawn.degraded, drawn.target)
    torch.testing.assert_close(drawn.degraded * 255, (drawn.degraded * 255).round())


def test_tasks_and_severities_that_are_none() -> None:
    with pytest.raises(ConfigError, match=r"'rain\+fog' names no degradation.*joined by \+"):
        CleanPhotos(photos(), ["rain+fog"])
    for severity in [(-0.1, 1), (0.5, 0.4), (0, 1.1)]:
        with pytest.raises(ConfigError, match="severity="):
            CleanPhotos(photos(), ["rain"], severity=severity)


# Pairs


def draw(source: PairFiles, side: int = 40, seed: int = 0) -> Drawn:
    return source.draw(source.tasks[0], side, torch.Generator().manual_seed(seed))


def draw_often(source: PairFiles) -> list[Drawn]:
    return [draw(source, seed=seed) for seed in range(8)]


def test_crops_of_a_pair_are_of_one_place(tmp_path: Path) -> None:
    source = PairFiles([pair(tmp_path / "derain", "a")])
    assert source.tasks == ("derain",)
    tops = set()
    for seed in range(8):
        drawn = draw(source, seed=seed)
        torch.testing.assert_close(drawn.degraded, (drawn.target * 255 // 2) / 255)
        assert drawn.severity.isnan().all()
        tops.add(float(drawn.target[0, 0, 0]))
    assert len(tops) > 2
    large = draw(source, side=100)
    assert large.target.shape == (3, 100, 100)


def test_groups_of_a_folder_are_tasks(tmp_path: Path) -> None:
    pair(tmp_path / "one", "a")
    assert PairFiles(find_pairs(tmp_path / "one").pairs).tasks == ("pairs",)
    shutil.rmtree(tmp_path / "one")
    for group in ("derain", "dehaze"):
        pair(tmp_path / group, "a")
    drawn = RestorationData(
        [PairFiles(find_pairs(tmp_path).pairs), CleanPhotos(photos(), ["jpeg"])],
        context=32,
        patch=32,
    )
    assert drawn.tasks == ("dehaze", "derain", "jpeg")


def test_half_restored_images_are_cut_alike(tmp_path: Path) -> None:
    for index, name in enumerate(("a", "b")):
        one = pair(tmp_path / "derain", name)
        if index == 0:
            write(tmp_path / "derain" / "medium", "a.png", scene() * 3 // 4)
    source = PairFiles(find_pairs(tmp_path).pairs, mediums=True)
    other = CleanPhotos(photos(), ["jpeg"])
    drawn = RestorationData([source, other], context=40, patch=32)
    seen = Counter()
    for index in range(24):
        sample = drawn[index]
        assert sample.mediums.shape == (1, 3, 32, 32)
        there = bool(sample.mediums.isfinite().all())
        seen[drawn.tasks[sample.task], there] += 1
        if there:
            expected = (sample.target * 255 * 3 // 4) / 255
            torch.testing.assert_close(sample.mediums[0], expected)
        else:
            assert sample.mediums.isnan().all()
    assert set(seen) == {("derain", True), ("derain", False), ("jpeg", False)}
    unasked = RestorationData([PairFiles([one])], context=40, patch=32)
    assert unasked[0].mediums.shape == (0, 3, 32, 32)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-60])


def test_a_file_that_is_cut_short_is_named_or_skipped(tmp_path: Path) -> None:
    pairs = [pair(tmp_path / "set", name, suffix=".jpg") for name in ("a", "b")]
    cut_short(pairs[0].degraded)
    assert len(find_pairs(tmp_path).pairs) == 2  # heads are whole
    with pytest.raises(ImageError, match=r'a\.jpg.*broken="skip"'):
        draw_often(PairFiles(pairs))
    source = PairFiles(pairs, broken="skip")
    with pytest.warns(UserWarning, match=r"skipped a pair: .*a\.jpg"):
        draw_often(source)
    assert source.skipped == {pairs[0]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_often(source)
    with (
        pytest.warns(UserWarning, match="skipped a pair"),
        pytest.raises(ImageError, match="none of the 1 pairs"),
    ):
        draw(PairFiles(pairs[:1], broken="skip"))
    with pytest.raises(ConfigError, match="no pairs"):
        PairFiles([])


def test_pairs_that_fit_into_memory_are_read_once(tmp_path: Path) -> None:
    one = pair(tmp_path / "set", "a")
    source = PairFiles([one])
    before = draw(source)
    one.degraded.unlink()
    assert torch.equal(draw(source).degraded, before.degraded)


def test_indices_of_numpy_draw_the_same_and_tasks_are_named_once() -> None:
    same = zip(data("rain")[7], data("rain")[np.int64(7)], strict=True)
    assert all(torch.equal(one, other) for one, other in same)
    with pytest.raises(ConfigError, match="has rain more than once"):
        data("rain", "haze", "rain")
