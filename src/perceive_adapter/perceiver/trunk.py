"""The image network of ``perceive-tiny``: a plain CNN, read through statistics of every stage."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from perceive_adapter.errors import ConfigError
from perceive_adapter.folders import load_folder
from perceive_adapter.perceiver.bundled import ASSETS, CONFIG_NAME, PERCEIVE_TINY, TENSORS_NAME
from perceive_adapter.precision import full_precision

__all__ = ["TRUNK_NAME", "StatisticsTrunk", "load_trunk", "perceive_tiny", "register_trunk"]

TRUNK_NAME = "perceive_tiny"
WIDTHS = (32, 64, 128, 192)
FEATURES = 256


class StatisticsTrunk(nn.Module):
    """Strided convolutions whose every stage gives mean and standard deviation of its channels.

    What ails an image shows at different depths: a colour cast in the pixels, noise and JPEG's
    grid in the first stage, streaks and veils in the later ones. There are as many statistics
    whatever the image's size, so images of any size from 1 x 1 on are taken as they are; those
    whose sides are multiples of ``side_multiple`` are read alike at their borders, and training
    takes no others. Black and white level of the 4 x 4 averaged image, where haze and darkness
    show, are read too.

    It has timm's interface: ``forward_features`` gives the last feature map, ``num_features`` is
    the width of what ``forward`` gives, and open_clip builds it by the name that
    :func:`register_trunk` gives it.

    Args:
        widths: channels of the stages, each of half the resolution of the one before.
        features: width of the result.
        normalised: with batch normalisation, for training; :meth:`fused` folds it away.

    Shape:
        (B, 3, H, W), normalised as CLIP's input, to (B, features).
    """

    default_cfg: ClassVar[dict[str, Any]] = {
        "input_size": (3, 256, 256),
        "pool_size": None,
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
    }
    pretrained_cfg: ClassVar[dict[str, Any]] = default_cfg

    def __init__(
        self, widths: Sequence[int] = WIDTHS, features: int = FEATURES, *, normalised: bool = False
    ) -> None:
        super().__init__()
        self.widths, self.num_features = tuple(widths), features
        self.side_multiple = 2 ** len(self.widths)
        channels = (3, *widths)
        self.stages = nn.ModuleList(
            _stage(channels[i], channels[i + 1], i == 0, i + 1 == len(widths), normalised)
            for i in range(len(widths))
        )
        pooled = 2 * sum(channels) + 6
        self.norm = nn.LayerNorm(pooled)
        self.head = nn.Sequential(nn.Linear(pooled, features), nn.ReLU())

    def levels(self, image: Tensor) -> list[Tensor]:
        """Return the feature map of every stage, at 1/2, 1/4, 1/8 and 1/16 of the resolution."""
        maps = []
        for stage in self.stages:
            image = stage(image)
            maps.append(image)
        return maps

    def forward_features(self, image: Tensor) -> Tensor:
        """Return the last stage's feature map."""
        return self.levels(image)[-1]

    def forward(self, image: Tensor) -> Tensor:
        """Return the features (B, features) of images (B, 3, H, W)."""
        for side in image.shape[-2:]:  # torch.export is told that the last window has a pixel
            torch._check(4 * ((side - 1) // 4) < side)
        coarse = F.avg_pool2d(image, 4, ceil_mode=True)
        parts = [coarse.amin((2, 3)), coarse.amax((2, 3)), *_statistics(image)]
        for level in self.levels(image):
            parts += _statistics(level)
        pooled = torch.cat(parts, dim=1).to(self.norm.weight.dtype)
        features: Tensor = self.head(self.norm(pooled))
        return features

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Do nothing: there is no classifier. open_clip asks every timm model to drop it."""

    @torch.no_grad()
    def fused(self) -> StatisticsTrunk:
        """Return a copy whose batch normalisations are folded into the convolutions before them.

        The copy is in eval mode, and has the layout of a trunk that is not ``normalised``.
        """
        copy = deepcopy(self).eval()
        copy.stages = nn.ModuleList(_fuse(stage) for stage in copy.stages)
        return copy.eval()


def perceive_tiny(pretrained: bool = False, **options: Any) -> StatisticsTrunk:
    """Build the trunk as timm does; its weights come with a perceiver, not with timm.

    Args:
        pretrained: must be False.
        **options: ignored: timm and open_clip pass those of a classifier, which this is not.

    Raises:
        ConfigError: ``pretrained``.
    """
    if pretrained:
        raise ConfigError(
            f"timm has no weights of {TRUNK_NAME!r}: they come with a perceiver. "
            "Use QualityPerceiver.from_pretrained('perceive-tiny')."
        )
    return StatisticsTrunk()


@torch.inference_mode(False)  # what is made there could not take part in a backward pass
def load_trunk() -> StatisticsTrunk:
    """Return the bundled perceiver's trunk with its weights, without building the perceiver."""
    _, tensors = load_folder(ASSETS / PERCEIVE_TINY, CONFIG_NAME, TENSORS_NAME)
    prefix = "towers.visual.trunk."
    weights = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    with torch.device("meta"):
        trunk = StatisticsTrunk()
    trunk.load_state_dict(weights, assign=True)
    default = torch.empty(0).device  # torch 2.6 tells of no device context otherwise
    return trunk.to(default).requires_grad_(False).eval()


def register_trunk() -> None:
    """Let timm, and so open_clip, build the trunk by its name; doing it again is harmless."""
    from timm.models import is_model, register_model

    if not is_model(TRUNK_NAME):
        register_model(perceive_tiny)


def _stage(before: int, after: int, first: bool, last: bool, normalised: bool) -> nn.Sequential:
    convolutions = [(before, 5 if first else 3, 2)]
    if last:  # at higher resolutions, a second convolution would cost more than all others
        convolutions.append((after, 3, 1))
    layers: list[nn.Module] = []
    for inputs, kernel, stride in convolutions:
        layers.append(nn.Conv2d(inputs, after, kernel, stride, kernel // 2, bias=not normalised))
        if normalised:
            layers.append(nn.BatchNorm2d(after))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _fuse(stage: nn.Module) -> nn.Sequential:
    layers: list[nn.Module] = []
    for layer in stage.children():
        if isinstance(layer, nn.BatchNorm2d):
            convolution = layers.pop()
            assert isinstance(convolution, nn.Conv2d)
            layer = fuse_conv_bn_eval(convolution, layer)
        layers.append(layer)
    return nn.Sequential(*layers)


def _statistics(maps: Tensor) -> list[Tensor]:
    """Mean and standard deviation (B, C), in single precision or better."""
    maps = full_precision(maps)
    # Sums over the pixels of (B, H W, C) are several times as fast as var_mean on a CPU.
    pixels = maps.permute(0, 2, 3, 1).flatten(1, 2)
    mean = pixels.mean(dim=1)
    variance = (pixels - mean.unsqueeze(1)).square().mean(dim=1)
    return [mean, (variance + 1e-6).sqrt()]
