"""Images inside WebDataset shards: tar files, whose members are read where they lie."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Final

from perceive_adapter.data.walking import walk
from perceive_adapter.errors import ImageError

__all__ = ["COMPRESSED", "SHARD_SUFFIX", "Member", "shard_group", "shard_members", "shards_below"]

SHARD_SUFFIX: Final = ".tar"
COMPRESSED: Final = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""Endings of shards whose members cannot be read one by one."""


@dataclass(frozen=True)
class Member:
    """A file inside an uncompressed tar file.

    Args:
        shard: the tar file.
        path: of the file inside it.
        offset: of its first byte in the tar file.
        size: in bytes.
    """

    shard: Path
    path: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        """Name without its folder, as of a path."""
        return PurePosixPath(self.path).name

    @property
    def sample(self) -> str:
        """What the members of one sample share: folder and name up to the first dot."""
        return self.path[: len(self.path) - len(self.name)] + self.name.partition(".")[0]

    @property
    def field(self) -> str:
        """What the member is of its sample: its name from the first dot on, ``gt.png``."""
        return self.name.partition(".")[2]

    def __str__(self) -> str:
        return f"{self.shard}:{self.path}"

    def open(self) -> BytesIO:
        """Read the file.

        Raises:
            ImageError: the shard is gone, or shorter than it was.
        """
        try:
            with self.shard.open("rb") as stream:
                stream.seek(self.offset)
                data = stream.read(self.size)
        except OSError as error:
            raise ImageError(f"{str(self)!r} cannot be read ({error})") from error
        if len(data) < self.size:
            raise ImageError(f"{str(self)!r} is cut short: the shard has changed")
        return BytesIO(data)


def shards_below(folder: Path, *, deep: bool = True) -> list[Path]:
    """Return the shards below a folder, or in it, compressed too, in the order of their paths."""
    return sorted(
        parent / name
        for parent, _, names in walk(folder, deep=deep)
        for name in names
        if name.endswith((SHARD_SUFFIX, *COMPRESSED))
    )


def shard_group(shard: Path, root: Path) -> str:
    """Return the set that a shard is a part of: its folder, or what comes before its number.

    Example:
        >>> root = Path("data")
        >>> shard_group(root / "derain" / "0007.tar", root), shard_group(root / "haze-07.tar", root)
        ('derain', 'haze')
    """
    parent = shard.parent.relative_to(root).as_posix()
    return re.sub(r"[-_.]*\d*$", "", shard.stem) if parent == "." else parent


def shard_members(shard: Path) -> Iterator[Member]:
    """Yield the files of a shard, after one pass over its headers; nothing is unpacked.

    Raises:
        ImageError: it is compressed, cut short, or no tar file.
    """
    if shard.name.endswith(COMPRESSED):
        raise ImageError(f"{str(shard)!r} is compressed, so that it cannot be read in places")
    try:
        end = shard.stat().st_size
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                if not info.isreg() or info.issparse():
                    continue
                if info.offset_data + info.size > end:
                    raise ImageError(f"{str(shard)!r} is cut short, in {info.name!r}")
                yield Member(shard, info.name, info.offset_data, info.size)
            _check_end(shard, archive.offset)
    except (OSError, tarfile.TarError) as error:
        raise ImageError(f"{str(shard)!r} cannot be read as a tar file ({error})") from error


def _check_end(shard: Path, offset: int) -> None:
    """Raise where no end is marked; tarfile takes a header that it cannot read for the end."""
    with shard.open("rb") as stream:
        stream.seek(offset)
        block = stream.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        raise ImageError(
            f"{str(shard)!r} is cut short or damaged: at byte {offset} it has neither a member nor "
            "the end that tar files are marked with. Copy or write it again"
        )
