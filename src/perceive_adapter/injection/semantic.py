"""Semantic guidance: what is in the image, from a frozen vision model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceive_adapter.errors import ConfigError
from perceive_adapter.perceiver.bundled import PERCEIVE_TINY
from perceive_adapter.perceiver.trunk import load_trunk

__all__ = ["SemanticGuidance"]

DEPTHS = (1 / 12, 4 / 12, 8 / 12, 1.0)


class SemanticGuidance(nn.Module):
    """Class tokens of a frozen vision transformer at four depths, one for each part of a network.

    Source: Perceive-IR, IEEE TIP 2025, semantic guidance module (DINOv2-B, blocks 1, 4, 8 and 12),
    https://arxiv.org/abs/2408.15994.

    Args:
        model: timm name, such as ``"vit_small_patch14_dinov2.lvd142m"``, or ``"perceive-tiny"``,
            whose image tower is bundled and needs no download. A model without class tokens gives
            the mean of its last feature map, one depth.
        weights: weight file; None downloads timm's pretrained weights.

    Shape:
        RGB (B, 3, H, W) in [0, 1] to unit vectors (B, L, S). The image is resized to the model's
        input size.

    Raises:
        ConfigError: timm does not know the model, or its weights cannot be had.
    """

    def __init__(self, model: str, weights: str | None = None) -> None:
        super().__init__()
        self.tower = _load(model, weights).float()  # timm builds in torch's default dtype
        self.tower.requires_grad_(False).eval()
        config: dict[str, Any] = self.tower.pretrained_cfg
        self.size = int(config["input_size"][-1])
        blocks = len(getattr(self.tower, "blocks", ()))
        self.depths = [max(1, round(blocks * depth)) - 1 for depth in DEPTHS]
        self.prefixed = bool(getattr(self.tower, "num_prefix_tokens", 0)) and blocks >= len(DEPTHS)
        for name in ("mean", "std"):
            values = torch.tensor(config[name], dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.levels = len(DEPTHS) if self.prefixed else 1
        self.channel_axis = 3 if str(getattr(self.tower, "output_fmt", "")) == "NHWC" else 1
        self.dim = self._measured_dim()

    def forward(self, image: Tensor) -> Tensor:
        """Return (B, L, S)."""
        image = F.interpolate(image.float(), (self.size, self.size), mode="bicubic", antialias=True)
        image = (image.clamp(0, 1).to(self.mean) - self.mean) / self.std
        if not self.prefixed:
            features = self.tower.forward_features(image)
            if features.ndim == 4:
                features = features.movedim(self.channel_axis, -1).flatten(1, 2)
            return F.normalize(features.mean(dim=1)[:, None], dim=-1)
        outputs = self.tower.forward_intermediates(
            image, indices=self.depths, return_prefix_tokens=True, intermediates_only=True
        )
        return F.normalize(torch.stack([prefix[:, 0] for _, prefix in outputs], dim=1), dim=-1)

    @torch.no_grad()
    def _measured_dim(self) -> int:
        """Width of the vectors: a model's last feature map need not have ``num_features``."""
        return int(self(torch.zeros(1, 3, self.size, self.size)).shape[-1])


def _load(model: str, weights: str | None) -> Any:
    if model == PERCEIVE_TINY:
        return load_trunk()
    import timm

    if weights is not None and not weights.endswith(".safetensors"):
        raise ConfigError(
            f"semantic_weights={weights!r}; expected a .safetensors file, other formats are "
            "unpickled"
        )
    if not timm.is_model(model):
        near = ", ".join(timm.list_models(f"*{model.split('_')[0]}*")[:5])
        hint = f"it has {near}" if near else "timm.list_models() names all"
        raise ConfigError(f"semantic={model!r} is no model of timm; {hint}")
    try:
        return timm.create_model(
            model, pretrained=weights is None, num_classes=0, checkpoint_path=weights or ""
        )
    except Exception as error:  # a hub, a file system and torch may all refuse
        raise ConfigError(
            f"the weights of semantic={model!r} cannot be loaded from "
            f"{weights or 'the Hugging Face Hub'}: {error}; give the safetensors file "
            "that they are in as semantic_weights="
        ) from error
