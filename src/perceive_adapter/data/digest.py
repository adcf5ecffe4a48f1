"""Tell sets of photographs apart by their content."""

from __future__ import annotations

import hashlib

from perceive_adapter.data.samples import CropSampler

__all__ = ["photos_digest"]

_LENGTH = 16  # hexadecimal digits


def photos_digest(photos: CropSampler) -> str:
    """Hash the photographs that crops are drawn from, in their order, which decides the crops.

    Example:
        >>> import torch
        >>> dark, bright = torch.zeros(3, 8, 8).byte(), torch.ones(3, 8, 8).byte()
        >>> photos_digest(CropSampler([dark])) == photos_digest(CropSampler([bright]))
        False
    """
    digest = hashlib.sha256()
    for photo, *_ in photos.pyramids:
        digest.update(str(tuple(photo.shape)).encode())
        digest.update(photo.contiguous().numpy().tobytes())
    return digest.hexdigest()[:_LENGTH]
