"""Prompt modules: (features, condition) to features, the identity at step 0.

A prompt module is built for one site and called by that site's hook::

    module(features, condition, source) -> features

``features`` is the output of the hooked module, in any layout; ``condition`` (B, C + 1) is what the
condition encoder made of the perception, B = 1 where all images share one; ``source`` is the
input of the hooked module. The result has the shape and the dtype of ``features``.

A condition is ``strength * [c, 1]``: the last entry takes the place of a bias, and everything that
a prompt module adds is linear in the condition. So the strength scales what it adds, and at 0 the
features stay as they are, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from perceive_adapter.config import AdapterConfig
from perceive_adapter.injection.plan import Site
from perceive_adapter.ops import add_low_rank
from perceive_adapter.precision import full_precision

__all__ = [
    "ChannelCrossAttention",
    "GatedLowRank",
    "Modulation",
    "at_depth",
    "build_prompt",
    "is_dense",
    "is_plain",
    "weight_shape",
    "with_weight",
]


M = TypeVar("M", bound=nn.Module)


class Modulation(nn.Module):
    """Prompt guidance: ``x * (1 + gamma) + beta``, per channel.

    Source: Perceive-IR, IEEE TIP 2025, prompt guidance module; FiLM,
    https://arxiv.org/abs/1709.07871.

    Args:
        site: the level site.
        config: gives the width of the condition.
    """

    def __init__(self, site: Site, config: AdapterConfig) -> None:
        super().__init__()
        self.layout = site.layout
        self.to_scale_shift = _zeroed(_linear_in_condition(config, 2 * site.channels))

    def forward(self, features: Tensor, condition: Tensor, source: Tensor) -> Tensor:
        """Modulate ``features``."""
        gamma, beta = self.to_scale_shift(condition).chunk(2, dim=1)
        scale = self.layout.spread(1 + gamma, features)
        shift = self.layout.spread(beta, features)
        return torch.addcmul(shift, features, scale).to(features.dtype)


class ChannelCrossAttention(nn.Module):
    """Prompt-guided cross-attention between channels, after prompt guidance.

    Queries come from the guided features, keys and values from the features. Queries and keys are
    L2-normalised along space, the softmax runs over channels, so the cost is linear in H * W.
    The attention works in ``attention_dim`` channels to keep within an adapter's budget; the
    strength of the condition scales what it adds.

    Source: Perceive-IR, IEEE TIP 2025, prompt-guided cross attention; transposed attention,
    Restormer, https://arxiv.org/abs/2111.09881.

    Args:
        site: the level site.
        config: gives the widths.
    """

    def __init__(self, site: Site, config: AdapterConfig) -> None:
        super().__init__()
        inner, self.heads = config.attention_dim, config.attention_heads
        self.channel_axis = site.layout.channel_axis
        self.guide = Modulation(site, config)
        self.to_query = nn.Linear(site.channels, inner, bias=False)
        self.to_key_value = nn.Linear(site.channels, 2 * inner, bias=False)
        self.temperature = nn.Parameter(torch.ones(self.heads, 1, 1))
        self.to_out = _zeroed(nn.Linear(inner, site.channels, bias=False))

    def forward(self, features: Tensor, condition: Tensor, source: Tensor) -> Tensor:
        """Guide ``features``, then attend from the guided to the given ones."""
        guided: Tensor = self.guide(features, condition, source)
        dtype = self.to_query.weight.dtype
        tokens = features.movedim(self.channel_axis, -1).to(dtype)
        query = self._split(self.to_query(guided.movedim(self.channel_axis, -1).to(dtype)))
        key, value = map(self._split, self.to_key_value(tokens).chunk(2, dim=-1))
        scores = _unit(query) @ _unit(key).transpose(-1, -2)
        mixed = (scores * self.temperature).softmax(dim=-1).to(value.dtype) @ value
        mixed = rearrange(mixed, "b h c n -> b n (h c)").reshape(*tokens.shape[:-1], -1)
        attended: Tensor = self.to_out(mixed).movedim(-1, self.channel_axis).to(guided.dtype)
        strength = self.guide.layout.spread(condition[:, -1:], attended).to(attended.dtype)
        return guided + attended * strength

    def _split(self, tokens: Tensor) -> Tensor:
        return rearrange(tokens.flatten(1, -2), "b n (h c) -> b h c n", h=self.heads)


class GatedLowRank(nn.Module):
    """A low-rank branch beside a dense layer, its rank channels scaled by the perception.

    ``out + up(gate(condition) * down(x))``: ``down`` has the layer's kernel, stride and padding,
    ``up`` is 1 x 1 and starts at zero, the gate is linear and starts near one. With one condition
    the branch is the weight ``up diag(gate) down``, which
    :meth:`~.branches.Branches.folded` adds to the layer's.

    Source: LoRA, https://arxiv.org/abs/2106.09685, gated by the perception of Perceive-IR,
    https://arxiv.org/abs/2408.15994.

    Args:
        site: the layer site.
        config: gives the width of the condition.
    """

    def __init__(self, site: Site, config: AdapterConfig) -> None:
        super().__init__()
        self.layout = site.layout
        outputs, inputs, *kernel = site.weight_shape
        self.down: nn.Conv2d | nn.Linear
        self.up: nn.Conv2d | nn.Linear
        if site.geometry is None:
            self.down = nn.Linear(inputs, site.rank, bias=False)
            self.up = nn.Linear(site.rank, outputs, bias=False)
        else:
            walk = dataclasses.asdict(site.geometry)
            self.down = nn.Conv2d(inputs, site.rank, (kernel[0], kernel[1]), bias=False, **walk)
            self.up = nn.Conv2d(site.rank, outputs, 1, bias=False)
        _zeroed(self.up)
        self.gate = _linear_in_condition(config, site.rank)
        nn.init.ones_(self.gate.weight[:, -1])

    def forward(
        self,
        features: Tensor,
        condition: Tensor,
        source: Tensor,
        *,
        gated: Tensor | None = None,
        down: Tensor | None = None,
        in_place: bool = False,
    ) -> Tensor:
        """Add the branch's output to the layer's.

        Args:
            features: the layer's output.
            condition: (B, C + 1), of which the gate is made.
            source: the layer's input.
            gated: (B, channels, R), what :meth:`gated` gives for the condition, where it is known.
            down: what stands in for the weight of ``down``, of the dtype of ``source``.
            in_place: the features may be written over; not where gradients are wanted.
        """
        low: Tensor
        if down is None:
            low = self.down(source.to(self.down.weight.dtype))
        else:
            low = with_weight(self.down, source, down)
        wide, narrow = (self.layout.rows(x, condition.shape[0]) for x in (features, low))
        rows = wide.shape[0]
        if wide.shape[2] == 1 or (self.layout.batch_axis == 1 and rows > 1):
            # Only a sum by elements has the strides that the features have.
            matrices = self.layout.per_row(self.gated(condition) if gated is None else gated, rows)
            raised = torch.matmul(matrices.to(narrow.dtype), narrow)
            return features + self.layout.from_rows(raised, features).to(features.dtype)
        if gated is None:
            up, gate = self.up.weight.flatten(1), self.layout.per_row(self.gate(condition), rows)
        else:
            up, gate = self.layout.per_row(gated, rows), None
        added = add_low_rank(wide, narrow, up, gate, in_place=in_place)
        return self.layout.from_rows(added, features)

    def gated(self, condition: Tensor) -> Tensor:
        """Return ``up diag(gate)`` for each image, (B, channels, R)."""
        gated: Tensor = self.up.weight.flatten(1) * self.gate(condition)[:, None]
        return gated


def at_depth(condition: Tensor, depth: float) -> Tensor:
    """Select of (B, L, ...) the depth, in [0, 1), that a prompt module is at."""
    if condition.shape[1] == 1:  # blocks that are compiled alone can then share their code
        return condition[:, 0]
    return condition[:, int(depth * condition.shape[1])]


def build_prompt(site: Site, config: AdapterConfig) -> nn.Module:
    """Build the prompt module that ``config`` names for the role of ``site``."""
    kind = getattr(config, site.role)
    return _KINDS[kind](site, config)


def is_dense(module: nn.Module) -> bool:
    """Tell whether a low-rank branch can run beside ``module``."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1
    return isinstance(module, nn.Linear)


def is_plain(module: nn.Module) -> bool:
    """Tell whether a dense layer does what torch's own does, with the weight that it holds."""
    kind = type(module)
    own = module.__dict__
    if "forward" in own or "_conv_forward" in own:  # patched on this one alone
        return False
    if isinstance(module, nn.Conv2d):
        plain = nn.Conv2d.forward, nn.Conv2d._conv_forward
        return (kind.forward, kind._conv_forward) == plain  # type: ignore[attr-defined]
    return kind.forward is nn.Linear.forward


def with_weight(module: nn.Module, source: Tensor, weight: Tensor) -> Tensor:
    """Run a plain layer with another weight."""
    if isinstance(module, nn.Conv2d):
        output: Tensor = module._conv_forward(source, weight, module.bias)
        return output
    assert isinstance(module, nn.Linear)
    return F.linear(source, weight, module.bias)


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of a dense layer's weight, empty for others, without computing the weight.

    Reading ``weight`` runs parametrizations, and a spectral norm counts that as a training step.
    """
    if isinstance(module, nn.Conv2d):
        return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else ()


def _linear_in_condition(config: AdapterConfig, outputs: int) -> nn.Linear:
    """A linear map of a condition, whose last column is the bias, scaled by the strength."""
    return nn.Linear(config.condition_dim + 1, outputs, bias=False)


def _unit(vectors: Tensor) -> Tensor:
    """Normalise the last dimension, whose norm half precision can neither hold nor tell from 0."""
    return F.normalize(full_precision(vectors), dim=-1)


def _zeroed(layer: M) -> M:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


_KINDS: dict[str, Callable[[Site, AdapterConfig], nn.Module]] = {
    "modulation": Modulation,
    "cross_attention": ChannelCrossAttention,
    "low_rank": GatedLowRank,
}
