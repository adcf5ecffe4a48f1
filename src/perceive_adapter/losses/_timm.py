"""Networks from timm, cut down to the levels that the perceptual loss compares."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perceive_adapter.errors import ConfigError, LossInputError, MissingDependencyError

__all__ = ["TimmNetwork", "build_timm"]

# Level name, its place in timm's ``vgg16().features``, and its weight in the paper's loss.
_VGG16_LEVELS = (
    ("relu1_2", 3, 1 / 12),
    ("conv2_2", 7, 1 / 6),
    ("relu3_1", 11, 1 / 3),
    ("relu3_3", 15, 1.0),
)
_VGG16_MIN_SIZE = 4  # two poolings precede the last level


@dataclass(frozen=True)
class TimmNetwork:
    """A module that returns feature levels, their weights, and its input's normalization."""

    body: nn.Module
    weights: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def build_timm(name: str, *, pretrained: bool) -> TimmNetwork:
    """Build the network that ``timm_features`` documents.

    Raises:
        ConfigError: unknown name, no feature maps, or no weights.
        MissingDependencyError: timm cannot be imported.
    """
    is_vgg16 = name.split(".")[0] == "vgg16"
    model: Any = _create(name, pretrained, {} if is_vgg16 else {"features_only": True})
    for module in model.modules():
        # A level that the next layer overwrites would silently become another level.
        if getattr(module, "inplace", False):
            module.inplace = False
    if is_vgg16:
        body: nn.Module = _Vgg16Levels(model.features)
        weights = tuple(weight for _, _, weight in _VGG16_LEVELS)
    else:
        body = model
        weights = (1 / len(model.feature_info),) * len(model.feature_info)
    cfg = model.pretrained_cfg
    return TimmNetwork(body, weights, tuple(cfg["mean"]), tuple(cfg["std"]))


class _Vgg16Levels(nn.Module):
    """The front of timm's VGG-16, ending with the last level of the paper's loss."""

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        layers = features[: _VGG16_LEVELS[-1][1] + 1]
        self.layers = layers.to(memory_format=torch.channels_last)  # a sixth faster on a CPU
        self.taps = frozenset(index for _, index, _ in _VGG16_LEVELS)

    def forward(self, images: Tensor) -> list[Tensor]:
        if min(images.shape[-2:]) < _VGG16_MIN_SIZE:
            raise LossInputError(
                f"vgg16 features need images of at least {_VGG16_MIN_SIZE} x {_VGG16_MIN_SIZE} "
                f"pixels, got shape {tuple(images.shape)}; use FilterPyramid for smaller ones"
            )
        levels = []
        for index, layer in enumerate(self.layers):
            images = layer(images)
            if index in self.taps:
                levels.append(images)
        return levels


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a mismatched torchvision raises RuntimeError
        raise MissingDependencyError(
            f"features={name!r} needs timm, which cannot be imported ({error}); install timm and "
            "a torchvision that fits torch, or pass an nn.Module"
        ) from error
    if ":" not in name and not timm.is_model(name):
        raise ConfigError(
            f"timm {timm.__version__} has no model {name!r}; use 'vgg16', another name of "
            "timm.list_models(), or an nn.Module"
        )
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # downloads fail in as many ways as there are HTTP clients
        remedy = (
            "if its weights cannot be downloaded here, fill timm's cache on a machine that can, "
            "or build the network yourself and pass it as an nn.Module"
            if pretrained
            else "pass an nn.Module that returns feature maps"
        )
        cause = f"{type(error).__name__}: {error}"
        raise ConfigError(f"timm cannot give features of {name!r} ({cause}); {remedy}") from error
    return model
