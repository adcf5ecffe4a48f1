"""Compact feature extraction: which degradation, and how strong."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceive_adapter.data.views import native_views

__all__ = ["CompactFeatures"]

VIEW_SIZE = 256
VIEW_LIMIT = 16
_WIDTHS = (16, 24, 32, 32)  # channels of the strided convolutions


class CompactFeatures(nn.Module):
    """A small strided CNN, pooled at every stage to one unit vector per image.

    Each stage, the image itself among them, gives the mean and standard deviation of its channels:
    colour cast and contrast show at the image, noise at the first stages, streaks and veils at
    the later ones. Statistics do not depend on the image's size. A large image is read in at most
    16 views of 256 px at native resolution, spread evenly, which bounds memory and keeps noise
    what it is; of a smaller one, the middle is read whose sides the stride divides, since other
    sizes look another way at their borders.

    Source: Perceive-IR, IEEE TIP 2025, compact feature extraction, https://arxiv.org/abs/2408.15994;
    pooling at every stage is ours.

    Args:
        in_channels: channels of the image.
        dim: width of the vector.

    Shape:
        (B, in_channels, H, W) in [0, 1] to (B, dim).

    Example:
        >>> features = CompactFeatures(3, dim=8)(torch.rand(2, 3, 40, 30))
        >>> torch.allclose(features.norm(dim=1), torch.ones(2))
        True
    """

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        channels = (in_channels, *_WIDTHS)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GELU())
            for before, after in pairwise(channels)
        )
        self.head = nn.Sequential(
            nn.LayerNorm(2 * sum(channels)), nn.Linear(2 * sum(channels), dim)
        )

    def forward(self, image: Tensor) -> Tensor:
        """Return one unit vector (B, dim) for each image (B, C, H, W)."""
        like = next(self.parameters())
        views = native_views(image.to(like.dtype), VIEW_SIZE, VIEW_LIMIT, 2 ** len(self.stages))
        batch, count = views.shape[:2]
        features = views.flatten(0, 1)
        statistics = _statistics(features, batch, count)
        for stage in self.stages:
            features = stage(features)
            statistics += _statistics(features, batch, count)
        pooled = torch.cat(statistics, dim=1).to(like.dtype)
        return F.normalize(self.head(pooled).float(), dim=1)


def _statistics(features: Tensor, batch: int, count: int) -> list[Tensor]:
    """Return mean and standard deviation (B, C) over all views of an image, in float32."""
    features = features.float()
    mean = _over_views(features, batch, count)
    centred = features - mean[:, None].expand(-1, count, -1).flatten(0, 1)[..., None, None]
    return [mean, (_over_views(centred.square(), batch, count) + 1e-6).sqrt()]


def _over_views(features: Tensor, batch: int, count: int) -> Tensor:
    return features.mean(dim=(2, 3)).view(batch, count, -1).mean(dim=1)
