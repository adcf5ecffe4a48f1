"""Pairs inside WebDataset shards, which its own library has written."""

import io
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import webdataset
from PIL import Image

from perceive_adapter.data.pairs import Pair, find_pairs, holds_pairs, read_mediums, read_pair
from perceive_adapter.data.restoration import PairFiles, RestorationData
from perceive_adapter.data.shards import Member, shard_members
from perceive_adapter.errors import ConfigError, ImageError


def png(value: int, size: tuple[int, int] = (40, 40)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(stream, "png")
    return stream.getvalue()


def sample(key: str, value: int = 90, **parts: bytes) -> dict[str, bytes | str]:
    fields = {"hazy": png(value // 2), "gt": png(value), **parts}
    return {"__key__": key, **{f"{name}.png": data for name, data in fields.items() if data}}


def write(file: Path, *samples: Mapping[str, bytes | str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(file)) as writer:
        for one in samples:
            writer.write(one)
    return file


def test_pairs_are_read_where_they_lie(tmp_path: Path) -> None:
    write(tmp_path / "haze-000000.tar", sample("a/1", 10), sample("a/2", 20))
    write(tmp_path / "haze-000001.tar", sample("a/1", 30))
    write(tmp_path / "indoor" / "0.tar", {**sample("1", 40), "json": b"{}"})
    found = find_pairs(tmp_path)
    assert [(pair.group, str(pair.degraded), pair.target.name) for pair in found.pairs] == [
        ("haze", f"{tmp_path}/haze-000000.tar:a/1.hazy.png", "1.gt.png"),
        ("haze", f"{tmp_path}/haze-000000.tar:a/2.hazy.png", "2.gt.png"),
        ("haze", f"{tmp_path}/haze-000001.tar:a/1.hazy.png", "1.gt.png"),
        ("indoor", f"{tmp_path}/indoor/0.tar:1.hazy.png", "1.gt.png"),
    ]
    read = [read_pair(pair) for pair in found.pairs]
    assert [int(target[0, 0, 0]) for _, target in read] == [10, 20, 30, 40]
    assert [int(degraded[0, 0, 0]) for degraded, _ in read] == [5, 10, 15, 20]
    assert read[0][0].shape == (3, 40, 40)


def test_shards_and_folders_go_together(tmp_path: Path) -> None:
    write(tmp_path / "haze-0.tar", sample("1", 40))
    assert holds_pairs(tmp_path)
    for side, value in (("input", 7), ("gt", 8)):
        (tmp_path / "rain" / side).mkdir(parents=True)
        (tmp_path / "rain" / side / "1.png").write_bytes(png(value))
    assert find_pairs(tmp_path).counts() == {"rain": 1, "haze": 1}


def test_samples_of_shards_are_drawn(tmp_path: Path) -> None:
    write(tmp_path / "haze-0.tar", sample("1", 40), sample("2", 80))
    data = RestorationData([PairFiles(find_pairs(tmp_path).pairs)], context=32, patch=24)
    assert data.tasks == ("haze",)
    drawn = {float(data[index].target.mean() * 255) for index in range(8)}
    assert {round(value) for value in drawn} == {40, 80}


def test_what_cannot_be_used_is_named_or_skipped(tmp_path: Path) -> None:
    write(tmp_path / "good.tar", sample("1"))
    write(tmp_path / "half.tar", sample("7", gt=b""))
    write(tmp_path / "twice.tar", sample("8", rain=png(3)))
    write(tmp_path / "endings.tar", {**sample("9"), "gt.jpg": png(3), "depth.png": png(1)})
    write(tmp_path / "labels.tar", {"__key__": "1", "cls": b"3"})
    write(tmp_path / "packed.tar.gz", sample("1"))
    (tmp_path / "none.tar").write_bytes(b"no tar file" * 100)
    torn = write(tmp_path / "torn.tar", sample("1"))
    last = max(shard_members(torn), key=lambda member: member.offset)
    torn.write_bytes(torn.read_bytes()[: last.offset + 3])
    problems = {
        "half": "the sample '7' of .*half.tar' has hazy, which is no pair",
        "twice": "the sample '8' of .*twice.tar' has gt, hazy, rain, which is no pair",
        "endings": r"'9' of .*endings.tar' has '9\.gt\.jpg' and '9\.gt\.png', several files",
        "labels": "labels.tar' holds no image",
        "packed": "packed.tar.gz' is compressed",
        "none": "none.tar' cannot be read as a tar file",
        "torn": "torn.tar' is cut short",
    }
    found = find_pairs(tmp_path, broken="skip")
    assert len(found.pairs) == 1
    assert len(found.skipped) == len(problems)
    with pytest.raises(ImageError, match="7 of the files"):
        find_pairs(tmp_path)
    for name, problem in problems.items():
        alone = tmp_path / "alone" / name
        alone.mkdir(parents=True)
        for file in tmp_path.glob(f"{name}.*"):
            shutil.copy(file, alone)
        with pytest.raises(ImageError, match=problem):
            find_pairs(alone)
    with pytest.raises(ConfigError, match="no pair that can be used"):
        find_pairs(tmp_path / "alone" / "half", broken="skip")


def test_an_end_that_is_not_marked(tmp_path: Path) -> None:
    """Of a header that is damaged, cut short or missing tarfile says nothing."""
    shard = write(tmp_path / "haze-0.tar", sample("1"), sample("2"), sample("3"))
    data = shard.read_bytes()
    with tarfile.open(shard) as archive:
        third = archive.getmembers()[4].offset
        end = archive.offset
    for broken, place in {
        data[:third] + b"x" * 64 + data[third + 64 :]: third,
        data[: third + 100]: third,
        data[:third]: third,
        data[:end]: end,
    }.items():
        shard.write_bytes(broken)
        with pytest.raises(ImageError, match=f"cut short or damaged: at byte {place} "):
            list(shard_members(shard))
        with pytest.raises(ImageError, match=r"haze-0\.tar' is cut short or damaged"):
            find_pairs(tmp_path)
    shard.write_bytes(data[: end + tarfile.BLOCKSIZE])
    assert len(list(shard_members(shard))) == 6


def test_what_changed_since_shows_when_it_is_read(tmp_path: Path) -> None:
    shard = write(tmp_path / "haze-0.tar", sample("1", hazy=png(5, (8, 8))), sample("2"))
    different, same = find_pairs(tmp_path).pairs
    with pytest.raises(ImageError, match=r"1\.hazy\.png' has 8 x 8 pixels and .*40 x 40"):
        read_pair(different)
    source = PairFiles([different, same], broken="skip")
    with pytest.warns(UserWarning, match="skipped a pair"):
        [source.draw("haze", 32, torch.Generator().manual_seed(seed)) for seed in range(8)]
    assert isinstance(same.degraded, Member)
    with shard.open("r+b") as stream:
        stream.truncate(same.degraded.offset + 3)
    with pytest.raises(ImageError, match=r"2\.hazy\.png' is cut short"):
        read_pair(same)
    shard.unlink()
    with pytest.raises(ImageError, match=r"2\.hazy\.png' cannot be read"):
        read_pair(same)


def test_links_and_folders_inside_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "haze-0.tar", "w") as archive:
        folder = tarfile.TarInfo("deep")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        link = tarfile.TarInfo("deep/0.gt.png")
        link.type, link.linkname = tarfile.SYMTYPE, "1.gt.png"
        archive.addfile(link)
        for name, value in (("deep/1.GT.PNG", 9), ("deep/1.low.png", 3)):
            info = tarfile.TarInfo(name)
            info.size = len(png(value))
            archive.addfile(info, io.BytesIO(png(value)))
    (pair,) = find_pairs(tmp_path).pairs
    assert [int(image[0, 0, 0]) for image in read_pair(pair)] == [3, 9]


def halves(pair: Pair) -> list[int | None]:
    images = read_mediums(pair, read_pair(pair)[1])
    return [None if image is None else int(image[0, 0, 0]) for image in images]


def test_half_restored_images_lie_beside(tmp_path: Path) -> None:
    more = {"medium": png(60), "medium-b": png(70)}
    write(tmp_path / "haze-0.tar", sample("1", **more), sample("2", **{"medium-b": png(80)}))
    assert [halves(pair) for pair in find_pairs(tmp_path).pairs] == [[60, 70], [None, 80]]
