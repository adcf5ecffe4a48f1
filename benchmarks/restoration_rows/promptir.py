"""PromptIR's idea beside ours: learned prompt components, weighted by the features themselves.

Written after the paper (https://arxiv.org/abs/2306.13090, section 3). At every level a softmax of
the pooled features weights a few learned components. Their sum, resized to the features and
convolved, is joined to the features, and a block of attention between channels mixes the two. The
last convolution starts at zero, so that the trained network it is put into is what it was.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceive_adapter import AdapterConfig, plan_sites

COMPONENTS, SIDE, WIDTH = 5, 16, 32


class PromptBlock(nn.Module):
    """Prompt generation and interaction for features of ``channels``."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.components = nn.Parameter(0.02 * torch.randn(COMPONENTS, WIDTH, SIDE, SIDE))
        self.weigh = nn.Linear(channels, COMPONENTS)
        self.smooth = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.join = nn.Conv2d(channels + WIDTH, channels, 1)
        self.attend = nn.Conv2d(channels, 3 * channels, 1)
        self.heads = heads
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def hook(self, _: nn.Module, __: object, features: Tensor) -> Tensor:
        """Give the features with what the prompt adds."""
        weights = self.weigh(features.mean((2, 3))).softmax(1)
        prompt = torch.einsum("bn,nchw->bchw", weights, self.components)
        prompt = F.interpolate(prompt, features.shape[2:], mode="bilinear", align_corners=False)
        joined = self.join(torch.cat([features, self.smooth(prompt)], 1))
        query, key, value = (
            self.attend(joined).flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)
        )
        scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-1, -2)
        mixed = (scores.softmax(-1) @ value).flatten(1, 2).view_as(joined)
        return features + self.out(joined + mixed)


class Prompted(nn.Module):
    """A network with a prompt block at each level site, all of it trained."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(True)
        sites = plan_sites(backbone, config=AdapterConfig(layer=None)).of("level")
        self.blocks = nn.ModuleList(PromptBlock(site.channels) for site in sites)
        for site, block in zip(sites, self.blocks, strict=True):
            backbone.get_submodule(site.name).register_forward_hook(block.hook)

    def forward(self, image: Tensor) -> Tensor:
        """Restore images."""
        restored: Tensor = self.backbone(image)
        return restored
