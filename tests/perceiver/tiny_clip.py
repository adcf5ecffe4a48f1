"""CLIPs small enough to build in milliseconds."""

from typing import Any

import torch

from perceive_adapter.perceiver import QualityPerceiver

VIT: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"width": 16, "heads": 2, "layers": 2},
}
RESNET: dict[str, Any] = {
    **VIT,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
}


def tiny(clip: dict[str, Any] | str = VIT, **arguments: Any) -> QualityPerceiver:
    arguments = {"context_length": 4, "pretrained": None, **arguments}
    return QualityPerceiver.create(clip, **arguments)


def trained(clip: dict[str, Any] = VIT, **arguments: Any) -> QualityPerceiver:
    """A frozen perceiver whose prompts were moved, so that scoring it does not warn."""
    perceiver = tiny(clip, **arguments)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        noise = torch.randn(perceiver.prompts.context.shape, generator=generator)
        perceiver.prompts.context += 0.1 * noise
    return perceiver.requires_grad_(False)


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
