"""What tells files and photographs apart, whatever they are called."""

from __future__ import annotations

import hashlib

from perceive_adapter.data.matching import File
from perceive_adapter.data.samples import CropSampler
from perceive_adapter.data.shards import Member
from perceive_adapter.errors import ImageError

__all__ = ["content_digest", "photos_digest"]

_LENGTH = 16  # hexadecimal digits


def content_digest(file: File, seed: int = 0) -> str:
    """Hash a file's bytes; another seed gives other hashes, and so another order of them.

    Raises:
        ImageError: the file cannot be read.
    """
    try:
        data = file.open().getvalue() if isinstance(file, Member) else file.read_bytes()
    except OSError as error:
        raise ImageError(f"{str(file)!r} cannot be read ({error})") from error
    digest = hashlib.sha256(f"{seed} ".encode())
    digest.update(data)
    return digest.hexdigest()


def photos_digest(photos: CropSampler) -> str:
    """Hash the photographs that crops are drawn from, in their order, which decides the crops.

    Example:
        >>> import torch
        >>> dark, bright = torch.zeros(3, 8, 8).byte(), torch.ones(3, 8, 8).byte()
        >>> photos_digest(CropSampler([dark])) == photos_digest(CropSampler([bright]))
        False
    """
    digest = hashlib.sha256(f"{photos.dark:g}".encode() if photos.dark else b"")
    for photo, *_ in photos.pyramids:
        digest.update(str(tuple(photo.shape)).encode())
        digest.update(photo.contiguous().numpy().tobytes())
    return digest.hexdigest()[:_LENGTH]
