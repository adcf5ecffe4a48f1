"""Compact feature extraction: which degradation, and how strong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceive_adapter.data.views import native_views

__all__ = ["CompactFeatures"]

VIEW_SIZE = 256
VIEW_LIMIT = 16


class CompactFeatures(nn.Module):
    """A small strided CNN, pooled to one unit vector per image.

    The last feature map is pooled to its mean and standard deviation, so that the vector does not
    depend on the image's size; a large image is read in at most 16 views of 256 px at native
    resolution, spread evenly, which bounds memory and keeps noise what it is.

    Source: Perceive-IR, IEEE TIP 2025, compact feature extraction, https://arxiv.org/abs/2408.15994.

    Args:
        in_channels: channels of the image.
        dim: width of the vector.
        widths: channels of the strided convolutions.

    Shape:
        (B, in_channels, H, W) in [0, 1] to (B, dim).

    Example:
        >>> import torch
        >>> CompactFeatures(3, dim=8)(torch.rand(2, 3, 40, 30)).norm(dim=1)
        tensor([1.0000, 1.0000], grad_fn=<LinalgVectorNormBackward0>)
    """

    def __init__(
        self, in_channels: int, dim: int = 64, widths: tuple[int, ...] = (16, 24, 32, 48)
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((in_channels, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GELU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * widths[-1], dim)

    def forward(self, image: Tensor) -> Tensor:
        """Return one unit vector (B, dim) for each image (B, C, H, W)."""
        views = native_views(image.to(self.head.weight.dtype), VIEW_SIZE, VIEW_LIMIT)
        features = self.body(views.flatten(0, 1)).flatten(2).float()
        features = features.unflatten(0, views.shape[:2])
        mean = features.mean(dim=(1, 3))
        spread = (features - mean[:, None, :, None]).square().mean(dim=(1, 3))
        pooled = torch.cat([mean, (spread + 1e-6).sqrt()], dim=1)
        return F.normalize(self.head(pooled.to(self.head.weight.dtype)).float(), dim=1)
