"""Pairs of images on disk."""

import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from perceive_adapter.data.pairs import (
    Pair,
    find_pairs,
    find_photos,
    holds_pairs,
    read_mediums,
    read_pair,
)
from perceive_adapter.errors import ConfigError, ImageError


def write(
    root: Path, *names: str, mode: str = "RGB", size: tuple[int, int] = (9, 6), value: int = 90
) -> None:
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, value).convert(mode).save(file)


def found(root: Path, **options: str) -> list[tuple[str, str, str]]:
    pairs = find_pairs(root, **options).pairs  # type: ignore[arg-type]
    relative = [(p.degraded.relative_to(root), p.target.relative_to(root), p.group) for p in pairs]
    return [(str(degraded), str(target), group) for degraded, target, group in relative]


def test_all_in_one_layout(tmp_path: Path) -> None:
    for task in ("denoise", "derain", "enhance"):
        write(tmp_path, f"{task}/input/b.png", f"{task}/gt/b.jpg")
        write(tmp_path, f"{task}/input/a.png", f"{task}/gt/a.png")
    assert found(tmp_path) == [
        (f"{task}/input/{name}.png", f"{task}/gt/{name}.{suffix}", task)
        for task in ("denoise", "derain", "enhance")
        for name, suffix in (("a", "png"), ("b", "jpg"))
    ]
    assert find_pairs(tmp_path).counts() == {"denoise": 2, "derain": 2, "enhance": 2}
    assert found(tmp_path / "derain")[0] == ("input/a.png", "gt/a.png", "")


@pytest.mark.parametrize(
    ("degraded", "target"),
    [
        ("hazy/0001_0.8_0.2.jpg", "clear/0001.png"),  # RESIDE, outdoor
        ("hazy/1400_3.png", "gt/1400.png"),  # RESIDE, SOTS
        ("rain/rain-001.png", "norain/norain-001.png"),  # Rain100L
        ("Low/low00690.png", "Normal/normal00690.png"),  # LOL, version 2
        ("blur/000047.png", "sharp/000047.png"),  # GoPro
        ("input/scene/7.png", "gt/scene/7.png"),
        ("lq/a_b.png", "hq/a_b.png"),
        ("inputs/1.png", "targets/1.png"),
        ("LR/1.png", "HR/1.png"),
        ("degraded/1.png", "reference/1.png"),
        ("degraded/1.png", "references/1.png"),
        ("Blurred/1.png", "GroundTruth/1.png"),
        ("foggy/1.png", "ground_truth/1.png"),
        ("snowy/1.png", "clean/1.png"),
    ],
)
def test_naming_rules(tmp_path: Path, degraded: str, target: str) -> None:
    write(tmp_path, degraded, target)
    assert found(tmp_path) == [(degraded, target, "")]


def test_a_target_may_have_several_degraded_images(tmp_path: Path) -> None:
    write(tmp_path, "hazy/1_1.png", "hazy/1_2.png", "hazy/10_1.png", "gt/1.png", "gt/10.png")
    assert [target for _, target, _ in found(tmp_path)] == ["gt/10.png", "gt/1.png", "gt/1.png"]


def test_a_target_of_the_same_name_comes_first(tmp_path: Path) -> None:
    write(tmp_path, "input/1.png", "input/1_2.png", "gt/1.png", "gt/1_2.png")
    assert found(tmp_path) == [
        ("input/1.png", "gt/1.png", ""),
        ("input/1_2.png", "gt/1_2.png", ""),
    ]


def test_of_two_files_of_one_name_those_with_one_ending_belong_together(tmp_path: Path) -> None:
    write(tmp_path, "input/1.bmp", "input/1.png", "gt/1.bmp", "gt/1.png")
    write(tmp_path, "input/2.png", "gt/2.jpg", "gt/2.png")
    write(tmp_path, "input/3.bmp", "input/3.png", "gt/3.png")
    write(tmp_path, "medium/1.png", "medium/3.png")
    assert found(tmp_path, broken="skip") == [
        (f"input/{name}", f"gt/{name}", "") for name in ("1.bmp", "1.png", "2.png", "3.png")
    ]
    listed = find_pairs(tmp_path, broken="skip")
    halves = [[file and file.name for file in pair.mediums] for pair in listed.pairs]
    assert halves == [[None], ["1.png"], [None], ["3.png"]]
    assert len(listed.skipped) == 2
    with pytest.raises(
        ImageError,
        match=r"input/3\.bmp' has no partner of its own: '3\.bmp' and '3\.png' are several files .*"
        r"gt/2\.jpg' has no partner of its own: '2\.jpg' and '2\.png' are",
    ):
        find_pairs(tmp_path)


def test_two_files_of_one_name_are_no_partners_of_a_third(tmp_path: Path) -> None:
    write(tmp_path, "input/1.jpg", "gt/1.bmp", "gt/1.png")
    write(tmp_path, "input/2_1.png", "gt/2.bmp", "gt/2.png")
    write(tmp_path, "input/3.png", "gt/3.png", "medium/3.bmp", "medium/3.jpg")
    write(tmp_path, "input/4_1.png", "gt/4.png", "medium/4.png")
    listed = find_pairs(tmp_path, broken="skip")
    used = [(pair.degraded.name, pair.mediums) for pair in listed.pairs]
    assert used == [("3.png", (None,)), ("4_1.png", (None,))]
    *several, alone = listed.skipped
    assert len(several) == 8
    assert all("several files of one name" in problem for problem in several)
    assert "medium/4.png' has no partner in" in alone


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write(tmp_path / "disk", "input/scene/1.png", "clean/1.png")
    root = tmp_path / "root"
    (root / "derain").mkdir(parents=True)
    (root / "derain" / "input").symlink_to(tmp_path / "disk" / "input")
    (root / "derain" / "gt").mkdir()
    (root / "derain" / "gt" / "scene").symlink_to(tmp_path / "disk" / "clean")
    (root / "dehaze").mkdir()
    (root / "dehaze" / "input").symlink_to(tmp_path / "disk" / "clean")
    (root / "dehaze" / "gt").symlink_to(tmp_path / "disk" / "clean")
    for circle in (root, root / "derain", tmp_path / "disk" / "clean"):
        (circle / "circle").symlink_to(circle)
    assert holds_pairs(root)
    assert found(root) == [
        ("dehaze/input/1.png", "dehaze/gt/1.png", "dehaze"),
        ("derain/input/scene/1.png", "derain/gt/scene/1.png", "derain"),
    ]


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a/input/1.png", "a/gt/1.png", "locked/input/1.png", "locked/gt/1.png")
    listed = os.scandir

    def scandir(path: str) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    said = f"the folder '{tmp_path}/locked' cannot be listed (Permission denied)"
    with pytest.raises(ImageError, match=rf"{re.escape(said)}\. Mend, rename or remove"):
        find_pairs(tmp_path)
    skipping = find_pairs(tmp_path, broken="skip")
    assert skipping.counts() == {"a": 1}
    assert skipping.skipped == (said,)
    assert find_pairs(tmp_path / "a").skipped == ()
    with pytest.raises(ConfigError, match=rf"{re.escape(said)}: .*Change who may read"):
        find_photos(tmp_path)


def broken_folder(root: Path) -> None:
    write(root, "input/good.png", "gt/good.png")
    write(root, "input/alone.png", "gt/left.png")
    write(root, "input/good_2.png")  # no other photograph's target may stand in for its own
    write(root, "input/small.png", size=(5, 6))
    write(root, "gt/small.png")
    write(root, "gt/torn.png")
    (root / "input" / "torn.png").write_bytes(b"no image")
    write(root, "input/deep.png", "gt/deep.png", mode="I;16")


BROKEN = (
    r"alone\.png' has no partner in .*gt'",
    r"good_2\.png' has no partner in .*gt'",
    r"left\.png' has no partner in .*input'",
    r"deep\.png' has mode I;16",
    r"small\.png' has 6 x 5 pixels and .*small\.png' 6 x 9",
    r"torn\.png' cannot be read as an image",
)


def test_everything_that_is_broken_is_named_first(tmp_path: Path) -> None:
    broken_folder(tmp_path)
    with pytest.raises(ImageError, match="6 of the files") as caught:
        find_pairs(tmp_path)
    remedy = 'or leave them out (broken="skip", or --broken skip).'
    assert f"and 1 more. Mend, rename or remove them, {remedy}" in str(caught.value)


def test_what_is_broken_may_be_skipped_with_a_count(tmp_path: Path) -> None:
    broken_folder(tmp_path)
    assert found(tmp_path, broken="skip") == [("input/good.png", "gt/good.png", "")]
    skipped = find_pairs(tmp_path, broken="skip").skipped
    assert len(skipped) == len(BROKEN)
    for pattern in BROKEN:
        assert sum(re.search(pattern, problem) is not None for problem in skipped) == 1


def test_turned_photographs_fit_upright_ones(tmp_path: Path) -> None:
    write(tmp_path, "gt/a.jpg", size=(6, 9))
    (tmp_path / "input").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (9, 6)).save(tmp_path / "input" / "a.jpg", exif=exif)
    (pair,) = find_pairs(tmp_path).pairs
    assert [image.shape for image in read_pair(pair)] == [(3, 9, 6)] * 2


def test_of_a_png_only_the_head_is_read_also_where_it_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "input").mkdir()
    for name in ("plain", "turned", "turned_late"):
        size = (90, 60) if name == "plain" else (60, 90)
        write(tmp_path, f"gt/{name}.png", size=size)
        file = tmp_path / "input" / f"{name}.png"
        noise = Image.effect_noise((90, 60), 50)
        noise.save(file, exif=exif if name == "turned" else b"")
        if name == "turned_late":
            data = exif.tobytes().removeprefix(b"Exif\0\0")
            late = struct.pack(">I", len(data)) + b"eXIf" + data
            late += struct.pack(">I", zlib.crc32(b"eXIf" + data))
            file.write_bytes(file.read_bytes()[:-12] + late + file.read_bytes()[-12:])
        else:
            file.write_bytes(file.read_bytes()[:-500])  # in the middle of the pixels
    pairs = find_pairs(tmp_path).pairs
    assert [pair.degraded.name for pair in pairs] == ["plain.png", "turned.png", "turned_late.png"]
    for pair in pairs[:2]:
        with pytest.raises(ImageError, match="cannot be read"):
            read_pair(pair)
    assert read_pair(pairs[2])[0].shape == (3, 90, 60)


def test_reading_gray_and_alpha(tmp_path: Path) -> None:
    write(tmp_path, "input/a.png", mode="RGBA", value=7)
    write(tmp_path, "gt/a.png", mode="L", value=200)
    degraded, target = read_pair(find_pairs(tmp_path).pairs[0])
    assert torch.equal(degraded, torch.full((3, 6, 9), 7, dtype=torch.uint8))
    assert torch.equal(target, torch.full((3, 6, 9), 200, dtype=torch.uint8))


def test_reading_what_was_cut_short_or_changed(tmp_path: Path) -> None:
    write(tmp_path, "input/a.bmp", "gt/a.bmp")
    (pair,) = find_pairs(tmp_path).pairs
    file = tmp_path / "gt" / "a.bmp"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ImageError, match=r"gt/a\.bmp' cannot be read"):
        read_pair(find_pairs(tmp_path).pairs[0])
    write(tmp_path, "gt/a.bmp", size=(4, 4))
    with pytest.raises(ImageError, match=r"6 x 9 pixels and .*gt/a\.bmp' 4 x 4"):
        read_pair(Pair(pair.degraded, pair.target, ""))


def test_folders_without_pairs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder: expected folders of degraded images"):
        find_pairs(tmp_path / "missing")
    write(tmp_path, "gt/a.png")
    with pytest.raises(ConfigError, match="holds no set of pairs"):
        find_pairs(tmp_path)
    write(tmp_path, "input/b.png")
    with pytest.raises(ConfigError, match="holds no pair that can be used"):
        find_pairs(tmp_path, broken="skip")
    write(tmp_path, "input/a.png", "hazy/a.png")
    with pytest.raises(ConfigError, match=r"several folders .*\['hazy', 'input'\]"):
        find_pairs(tmp_path)


def test_half_restored_images_may_lie_beside(tmp_path: Path) -> None:
    write(tmp_path, "input/a.png", "input/b.png", "gt/a.png", "gt/b.png")
    write(tmp_path, "Medium/a.png", value=50)
    write(tmp_path, "medium-2/a.jpg", "medium-2/b.png", value=60)
    one, two = find_pairs(tmp_path).pairs
    values = [
        [
            None if image is None else int(image[0, 0, 0])
            for image in read_mediums(pair, read_pair(pair)[1])
        ]
        for pair in (one, two)
    ]
    assert values == [[50, 60], [None, 60]]
    write(tmp_path, "Medium/c.png")
    write(tmp_path, "medium-2/b.png", size=(4, 4))
    found = find_pairs(tmp_path, broken="skip")
    assert [pair.degraded.name for pair in found.pairs] == ["a.png"]
    assert len(found.skipped) == 2
    with pytest.raises(ImageError, match=r"Medium/c\.png' has no partner.*b\.png' has 4 x 4"):
        find_pairs(tmp_path)
    with pytest.raises(ImageError, match=r"medium-2/b\.png' has 4 x 4 pixels"):
        read_mediums(two, read_pair(two)[1])


def names(count: int, *folders: str) -> list[str]:
    return [f"{folder}/{index}.png" for folder in folders for index in range(count)]


def found_photos(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_photos(root)]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["sunny/1.png", "Hazy/1.png"], r"Hazy' has 1 images and the name of a folder of degraded"),
        (names(3, "city/degraded/a", "city/a"), r"city/degraded' has 3 images"),
        (names(3, "A", "B"), r"/A' and .*/B' hold images of the same names and sizes"),
        (names(3, "gt", "more"), r"/gt' and .*/more' hold images of the same names and sizes"),
        ([*names(5, "x/A/1", "x/B/1"), "x/A/2/0.png"], r"x/A' and .*x/B' hold images of the same"),
        ([*names(3, "A", "B"), "overview.png"], r"/A' and .*/B' hold"),
    ],
)
def test_what_looks_like_pairs_is_not_taken_for_photographs(
    tmp_path: Path, files: list[str], said: str
) -> None:
    write(tmp_path, *files)
    assert not holds_pairs(tmp_path)
    with pytest.raises(ConfigError, match=f"{said}.* expected folders of degraded .*give each"):
        find_photos(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        ["a.png", "deep/b.png", "deep/er/c.png"],
        names(3, "scene1", "scene2", "scene3"),
        names(1, "rome", "oslo"),
        [*names(3, "scene1"), *names(9, "scene2")],
        names(3, "gt"),
    ],
)
def test_photographs_in_folders_are_photographs(tmp_path: Path, files: list[str]) -> None:
    write(tmp_path / "input", *files)
    assert found_photos(tmp_path / "input") == sorted(files)


def test_two_folders_of_other_sizes_or_without_heads_are_photographs(tmp_path: Path) -> None:
    write(tmp_path, *names(3, "rome"))
    write(tmp_path, *names(3, "oslo"), size=(6, 9))
    assert len(find_photos(tmp_path)) == 6
    for path in (tmp_path / "oslo").iterdir():
        path.write_bytes(b"no image")
    assert len(find_photos(tmp_path)) == 6
    write(tmp_path, "oslo/2.png")  # the only one that can be compared
    with pytest.raises(ConfigError, match="hold images of the same names"):
        find_photos(tmp_path)


@pytest.mark.parametrize("folders", [["A", "B"], ["degraded"], ["deep/A", "deep/B"]])
def test_what_looks_like_pairs_does_not_vanish_beside_others(
    tmp_path: Path, folders: list[str]
) -> None:
    write(tmp_path, *names(3, "fog/input", "fog/gt", *(f"other/{folder}" for folder in folders)))
    count = 3 * len(folders)
    warned = f"{count} images below .* are in no set of pairs, and are left out, such as .*other/"
    with (
        pytest.warns(UserWarning, match=warned),
        pytest.raises(
            ImageError, match=f"1 of the files and folders .*other/{folders[0]}' .*named input, "
        ),
    ):
        find_pairs(tmp_path)
    with pytest.warns(UserWarning, match=warned):
        listed = find_pairs(tmp_path, broken="skip")
    assert (listed.counts(), len(listed.skipped)) == ({"fog": 3}, 1)


def test_other_images_beside_pairs_are_left_out_with_a_warning(tmp_path: Path) -> None:
    sides = ("rain/blur", "rain/sharp", "rain/medium-1")
    write(tmp_path, *names(3, *sides, "rain/depth", "rain/mask", "photos"), "rain/overview.png")
    with pytest.warns(
        UserWarning, match=r"10 images below .* such as .*photos/0\.png'.*folder of their own"
    ):
        assert find_pairs(tmp_path).counts() == {"rain": 3}
    (tmp_path / "rain" / "more").symlink_to(tmp_path / "rain" / "blur")
    with pytest.warns(UserWarning, match="10 images"):
        find_pairs(tmp_path)


def test_pairs_alone_are_found_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    write(tmp_path, *names(3, "a/input/x", "a/gt/x", "a/Medium/x"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "lq").symlink_to(tmp_path / "a" / "gt")
    (tmp_path / "b" / "hq").symlink_to(tmp_path / "a" / "gt")
    assert find_pairs(tmp_path).counts() == {"a": 3, "b": 3}
    assert not recwarn.list
