"""Feature extractors of the perceptual loss: a fixed filter pyramid, timm networks, any module."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceive_adapter.errors import ConfigError, LossInputError
from perceive_adapter.losses._frozen import Frozen
from perceive_adapter.losses._inputs import check_number
from perceive_adapter.losses._timm import build_timm
from perceive_adapter.perceiver.trunk import StatisticsTrunk, load_trunk

__all__ = [
    "FeatureExtractor",
    "FilterPyramid",
    "ModuleFeatures",
    "resolve_features",
    "timm_features",
    "tiny_features",
]


@runtime_checkable
class FeatureExtractor(Protocol):
    """What the perceptual loss calls: images (B, 3, H, W), RGB in [0, 1], to feature maps."""

    @property
    def weights(self) -> tuple[float, ...] | None:
        """One weight per level; None stands for equal weights that sum to 1."""
        ...

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Return one floating tensor (B, ...) per level."""
        ...


class FilterPyramid(nn.Module):
    """Image and its local frequencies at several scales.

    Nothing in it is learned, drawn at random or downloaded. Level 0 is the image. Level s of
    1 ... ``scales`` is the response, per colour channel, to the eight AC filters of the orthonormal
    3 x 3 DCT (edges replicated) of the image reduced s - 1 times by 2 x 2 averaging: with the
    default of four scales that is (B, 3, H, W), (B, 24, H, W), (B, 24, H/2, W/2),
    (B, 24, H/4, W/4) and (B, 24, H/8, W/8), sizes rounded up. Level 0 sees brightness and colour
    (haze, low light), the others what noise, rain, blur and JPEG change. All levels weigh the
    same, and the weights sum to 1.

    Args:
        scales: number of DCT levels, at least 1.
        weights: one per level (``scales`` + 1 of them), or None for equal ones.

    Raises:
        ConfigError: ``scales`` below 1, or weights that are negative or of another number.

    Example:
        >>> pyramid = FilterPyramid()
        >>> [tuple(level.shape) for level in pyramid(torch.rand(2, 3, 20, 12))]
        [(2, 3, 20, 12), (2, 24, 20, 12), (2, 24, 10, 6), (2, 24, 5, 3), (2, 24, 3, 2)]
        >>> pyramid.weights
        (0.2, 0.2, 0.2, 0.2, 0.2)
    """

    filters: Tensor

    @torch.inference_mode(False)  # buffers made there could not take part in a backward pass
    def __init__(self, scales: int = 4, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if scales < 1:
            raise ConfigError(f"scales must be at least 1, got {scales}")
        self.scales = scales
        self.weights = _check_weights(weights, scales + 1) or (1 / (scales + 1),) * (scales + 1)
        self.register_buffer("filters", _dct_filters().repeat(3, 1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the ``scales`` + 1 levels of ``images`` (B, 3, H, W); any size from 1 x 1 on."""
        filters = self.filters.to(images.dtype)
        levels = [images]
        for scale in range(self.scales):
            if scale:
                images = F.avg_pool2d(images, 2, ceil_mode=True)
            padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
            levels.append(F.conv2d(padded, filters, groups=3))
        return levels

    def extra_repr(self) -> str:
        """Return the settings, for ``repr``."""
        return f"scales={self.scales}, weights={self.weights}"


class ModuleFeatures(nn.Module):
    """Any module as a frozen feature extractor.

    The module is frozen in place (eval mode for good, ``requires_grad`` off), held outside the
    registry (not trained, not saved), and called in the dtype of its weights. Gradients flow
    through it to the image alone.

    Args:
        module: from (B, 3, H, W) to a tensor, a sequence or a mapping of tensors (B, C, ...).
        weights: one per level; None takes ``module.weights`` where the module has them, and else
            equal weights that sum to 1.
        mean: per channel, subtracted from the images before the module sees them.
        std: per channel, divides the images after that.

    Raises:
        ConfigError: a negative weight, or a std that is not above 0.
        LossInputError: on a call whose result is not made of floating tensors (B, C, ...), or is
            not one per weight.

    Example:
        >>> features = ModuleFeatures(nn.Conv2d(3, 4, 3))
        >>> [tuple(level.shape) for level in features(torch.rand(2, 3, 8, 8))]
        [(2, 4, 6, 6)]
        >>> list(features.parameters())
        []
    """

    mean: Tensor
    std: Tensor

    @torch.inference_mode(False)  # buffers made there could not take part in a backward pass
    def __init__(
        self,
        module: nn.Module,
        weights: Sequence[float] | None = None,
        *,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        for value in std:
            check_number("std", value, positive=True)
        if weights is None and isinstance(module, FeatureExtractor):
            weights = module.weights
        self.weights = _check_weights(weights)
        self.body = Frozen(module)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the module's levels for ``images`` (B, 3, H, W), RGB in [0, 1]."""
        # Out of place on purpose: a module that starts with an in-place operation must not
        # change the caller's image.
        levels = _as_levels(self.body((images - self.mean) / self.std))
        for index, level in enumerate(levels):
            if level.ndim < 2 or level.shape[0] != images.shape[0]:
                raise LossInputError(
                    f"feature level {index} has shape {tuple(level.shape)} for a batch of "
                    f"{images.shape[0]}: the batch dimension must come first, and features after it"
                )
        if self.weights is not None and len(levels) != len(self.weights):
            raise LossInputError(
                f"{type(self.body.module).__name__} returned {len(levels)} feature levels for "
                f"{len(self.weights)} weights: give weights=, one for each level"
            )
        return levels

    def extra_repr(self) -> str:
        """Return the settings, for ``repr``; the module itself may be long."""
        return f"{type(self.body.module).__name__}, weights={self.weights}"


def tiny_features() -> ModuleFeatures:
    """Build the default features: the image tower of the bundled perceiver, perceive-tiny.

    It was trained to tell degradations and their severity. Its four levels, at 1/2, 1/4, 1/8 and
    1/16 of the resolution with 32, 64, 128 and 192 channels, have the weights that Perceive-IR
    gives its four VGG levels: 1/12, 1/6, 1/3 and 1.

    Example:
        >>> [tuple(level.shape) for level in tiny_features()(torch.rand(2, 3, 32, 48))]
        [(2, 32, 16, 24), (2, 64, 8, 12), (2, 128, 4, 6), (2, 192, 2, 3)]
    """
    trunk = load_trunk()
    config = trunk.pretrained_cfg
    return ModuleFeatures(
        _Levels(trunk), (1 / 12, 1 / 6, 1 / 3, 1.0), mean=config["mean"], std=config["std"]
    )


class _Levels(nn.Module):
    """The feature maps of a trunk's stages."""

    def __init__(self, trunk: StatisticsTrunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.trunk.levels(image)


def timm_features(name: str, *, pretrained: bool = True) -> ModuleFeatures:
    """Build frozen features from a timm network, normalised as its pretrained weights expect.

    ``vgg16`` (also with a weight tag) gives the levels of Perceive-IR's difficulty-adaptive loss:
    relu1_2, conv2_2 (before its ReLU), relu3_1 and relu3_3 with weights 1/12, 1/6, 1/3 and 1; the
    rest of the network is dropped, and images must have at least 4 x 4 pixels. Any other name
    gives timm's ``features_only`` levels with equal weights that sum to 1; transformers among them
    may take images of one size alone.

    Args:
        name: of a timm model, such as ``vgg16``, ``resnet18`` or ``hf-hub:owner/model``.
        pretrained: load pretrained weights, downloading them the first time.

    Raises:
        ConfigError: timm does not know the name or cannot give its feature maps, or the
            weights cannot be had.
        MissingDependencyError: timm cannot be imported.

    Example:
        >>> features = timm_features("resnet10t", pretrained=False)
        >>> [level.shape[1] for level in features(torch.rand(1, 3, 32, 32))]
        [64, 64, 128, 256, 512]
        >>> features.weights
        (0.2, 0.2, 0.2, 0.2, 0.2)
    """
    network = build_timm(name, pretrained=pretrained)
    return ModuleFeatures(network.body, network.weights, mean=network.mean, std=network.std)


def resolve_features(features: str | nn.Module | None) -> FilterPyramid | ModuleFeatures:
    """Turn what a user may name as features into a frozen ``FeatureExtractor`` module.

    Args:
        features: None for ``tiny_features``, a timm name (see ``timm_features``), or a module (see
            ``ModuleFeatures``).

    Raises:
        ConfigError: another type, or a name that ``timm_features`` refuses.
        MissingDependencyError: a name is given and timm cannot be imported.

    Example:
        >>> resolve_features(None).weights[-1], resolve_features(nn.ReLU()).weights
        (1.0, None)
    """
    if features is None:
        return tiny_features()
    if isinstance(features, str):
        return timm_features(features)
    if isinstance(features, FilterPyramid | ModuleFeatures):
        return features
    if isinstance(features, nn.Module):
        return ModuleFeatures(features)
    raise ConfigError(
        "features must be None (perceive-tiny's), a timm name such as 'vgg16', or an nn.Module, "
        f"got {type(features).__name__}"
    )


def _dct_filters() -> Tensor:
    """Return the eight AC filters of the orthonormal 3 x 3 DCT, (8, 1, 3, 3)."""
    place = torch.arange(3.0)
    basis = torch.cos(math.pi * place[:, None] * (2 * place + 1) / 6)
    basis = basis / basis.norm(dim=1, keepdim=True)
    return torch.einsum("ir,jc->ijrc", basis, basis).reshape(9, 1, 3, 3)[1:]


def _check_weights(
    weights: Iterable[float] | None, levels: int | None = None
) -> tuple[float, ...] | None:
    if weights is None:
        return None
    checked = tuple(check_number("a feature weight", weight) for weight in weights)
    if levels is not None and len(checked) != levels:
        raise ConfigError(f"{len(checked)} feature weights given for {levels} levels")
    if not any(checked):
        raise ConfigError("at least one feature weight must be above 0")
    return checked


def _as_levels(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        output = [output]
    elif isinstance(output, Mapping):
        output = list(output.values())
    if not isinstance(output, Sequence) or not output:
        raise LossInputError(
            "features must be a tensor, a sequence or a mapping of tensors, not empty; got "
            f"{type(output).__name__}"
        )
    for index, level in enumerate(output):
        if not isinstance(level, Tensor) or not level.is_floating_point():
            kind = level.dtype if isinstance(level, Tensor) else type(level).__name__
            raise LossInputError(f"feature level {index} must be a floating tensor, got {kind}")
    return list(output)
