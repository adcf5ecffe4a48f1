"""What tells files apart whatever they are called."""

from __future__ import annotations

import hashlib

from perceive_adapter.data.matching import File
from perceive_adapter.data.shards import Member
from perceive_adapter.errors import ImageError

__all__ = ["content_digest"]


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
