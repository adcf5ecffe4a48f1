"""All low-rank branches of an adapter at once: what they need of a condition.

A network may have hundreds of branches, and each needs a small matrix of every perception. One by
one these take longer to launch than to compute, on a GPU above all; here, branches of one shape
share their operations.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceive_adapter.injection.prompts import GatedLowRank, at_depth

__all__ = ["Branches", "Ready"]


class Ready(NamedTuple):
    """What a branch needs of a condition.

    Args:
        gated: (B, channels, R), as :meth:`GatedLowRank.gated`.
        down: the weight of its first layer in another dtype, that of ``gated``; None for its own.
    """

    gated: Tensor
    down: Tensor | None


class Branches:
    """Low-rank branches by name.

    Args:
        modules: the prompt modules, and the depth in [0, 1) that each sees the condition of.
    """

    def __init__(self, modules: Mapping[str, tuple[GatedLowRank, float]]) -> None:
        alike: dict[Hashable, list[str]] = {}
        for name, (module, _) in modules.items():
            shapes = module.up.weight.shape, module.down.weight.shape
            alike.setdefault(shapes, []).append(name)
        self._depths = {name: depth for name, (_, depth) in modules.items()}
        # The layers, since to find one in its module takes as long as a small operation.
        self._ups = {name: module.up for name, (module, _) in modules.items()}
        self._downs = {name: module.down for name, (module, _) in modules.items()}
        self._gates = {name: module.gate for name, (module, _) in modules.items()}
        self._groups = list(alike.values())

    def ready(self, condition: Tensor, dtype: torch.dtype) -> dict[str, Ready]:
        """Return what each branch needs of a condition.

        Args:
            condition: (B, L, C + 1).
            dtype: of the layers; if it is bfloat16, branches in a wider one run in it without
                gradients. (In float16, their features may exceed its range.)

        Returns:
            By name; nothing where parameters are sharded, which come together only in a module's
            own forward pass.
        """
        found: dict[str, Ready] = {}
        gated = self._gated(condition)
        if not gated:
            return found
        downs: Sequence[Tensor | None] = [None] * len(gated)
        narrow = dtype == torch.bfloat16 and gated[0].dtype != dtype
        if narrow and not torch.is_grad_enabled():
            gated = [matrices.to(dtype) for matrices in gated]
            downs = [down.to(dtype) for down in self._stacked(self._downs)]
        for names, matrices, down in zip(self._groups, gated, downs, strict=True):
            own = down if down is not None else [None] * len(names)
            for name, of_branch, weight in zip(names, matrices.unbind(), own, strict=True):
                found[name] = Ready(of_branch, weight)
        return found

    @torch.no_grad()
    def folded(self, condition: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``weight + up diag(gate) down`` of each layer that is given, in its own memory.

        Args:
            condition: (1, L, C + 1).
            weights: of layers, by the names of their branches.

        Returns:
            By name, in the weights' dtypes; nothing where parameters are sharded.
        """
        found: dict[str, Tensor] = {}
        gated = self._gated(condition) if weights else []
        if not gated:
            return found
        for names, matrices, down in zip(
            self._groups, gated, self._stacked(self._downs), strict=True
        ):
            products = torch.bmm(matrices[:, 0], down.flatten(2))
            dtypes = {weights[name].dtype for name in names if name in weights}
            if len(dtypes) == 1:  # all of them in one launch
                products = products.to(dtypes.pop())
            products = products.view(*products.shape[:2], *down.shape[2:])
            for name, product in zip(names, products.unbind(), strict=True):
                if name in weights:
                    found[name] = product.to(weights[name].dtype)
        own = [weights[name] for name in found]
        if torch.compiler.is_compiling():  # where writing into a part of a tensor copies all of it
            sums = torch._foreach_add(own, list(found.values()))
            return dict(zip(found, sums, strict=True))
        torch._foreach_add_(list(found.values()), own)
        return found

    def _gated(self, condition: Tensor) -> list[Tensor]:
        """Matrices (S, B, channels, R) of each group; none where parameters are sharded."""
        gates = [self._gates[name].weight for names in self._groups for name in names]
        if not gates or any(type(gate) not in (Tensor, nn.Parameter) for gate in gates):
            return []
        of_all = F.linear(condition, torch.cat(gates))  # (B, L, sum of all R)
        ups = self._stacked(self._ups)
        parts = torch.split(of_all, [len(up) * up.shape[2] for up in ups], dim=2)
        found = []
        for names, part, up in zip(self._groups, parts, ups, strict=True):
            gate = self._at_depths(names, part.view(*part.shape[:2], len(names), -1))
            found.append(up.flatten(2)[:, None] * gate[:, :, None])
        return found

    def _stacked(self, layers: Mapping[str, nn.Conv2d | nn.Linear]) -> list[Tensor]:
        """Weights of each group's layers, (S, ...), in one go for all groups if they lie so."""
        groups = [[layers[name].weight for name in names] for names in self._groups]
        if not all(weight.is_contiguous() for weights in groups for weight in weights):
            return [torch.stack(weights) for weights in groups]  # channels last: to flatten copies
        flat = torch.cat([weight.flatten() for weights in groups for weight in weights])
        parts = torch.split(flat, [len(weights) * weights[0].numel() for weights in groups])
        return [
            part.view(len(weights), *weights[0].shape)
            for part, weights in zip(parts, groups, strict=True)
        ]

    def _at_depths(self, names: Sequence[str], gates: Tensor) -> Tensor:
        """Select each branch's depth of (B, L, S, R), to (S, B, R)."""
        if gates.shape[1] == 1:
            return gates[:, 0].transpose(0, 1)
        own = gates.unbind(2)
        return torch.stack([at_depth(g, self._depths[n]) for n, g in zip(names, own, strict=True)])
