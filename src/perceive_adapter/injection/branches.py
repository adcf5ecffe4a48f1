"""All low-rank branches of an adapter at once: what they need of a condition.

A network may have hundreds of branches, and each needs a small matrix of every perception. One by
one these take longer to launch than to compute, on a GPU above all; here, branches of one shape
share their operations.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceive_adapter.injection.prompts import GatedLowRank, at_depth

__all__ = ["Branches"]


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

    def gated(self, condition: Tensor) -> dict[str, Tensor]:
        """Return :meth:`GatedLowRank.gated` of each branch, (B, channels, R).

        Args:
            condition: (B, L, C + 1).

        Returns:
            By name; nothing where parameters are sharded, which come together only in a module's
            own forward pass.
        """
        found: dict[str, Tensor] = {}
        for names, gated in self._gated(condition):
            found.update(zip(names, gated.unbind(), strict=True))
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
        for names, gated in self._gated(condition):
            down = torch.stack([self._downs[name].weight for name in names])
            products = torch.bmm(gated[:, 0], down.flatten(2)).unbind()
            for name, product in zip(names, products, strict=True):
                if name in weights:
                    found[name] = product.view_as(weights[name]).to(weights[name].dtype)
        if not found:
            return found
        own = [weights[name] for name in found]
        if torch.compiler.is_compiling():  # where writing into a part of a tensor copies all of it
            sums = torch._foreach_add(own, list(found.values()))
            return dict(zip(found, sums, strict=True))
        torch._foreach_add_(list(found.values()), own)
        return found

    def _gated(self, condition: Tensor) -> Iterator[tuple[list[str], Tensor]]:
        """Names of branches of one shape, and their matrices (S, B, channels, R)."""
        gates = [self._gates[name].weight for names in self._groups for name in names]
        if not gates or any(type(gate) not in (Tensor, nn.Parameter) for gate in gates):
            return
        of_all = F.linear(condition, torch.cat(gates))  # (B, L, sum of all R)
        ranks = [self._ups[names[0]].weight.shape[1] for names in self._groups]
        sizes = [len(names) * rank for names, rank in zip(self._groups, ranks, strict=True)]
        parts = torch.split(of_all, sizes, dim=2)
        for names, part in zip(self._groups, parts, strict=True):
            gate = self._at_depths(names, part.view(*part.shape[:2], len(names), -1))
            up = torch.stack([self._ups[name].weight for name in names]).flatten(2)
            yield names, up[:, None] * gate[:, :, None]

    def _at_depths(self, names: Sequence[str], gates: Tensor) -> Tensor:
        """Select each branch's depth of (B, L, S, R), to (S, B, R)."""
        if gates.shape[1] == 1:
            return gates[:, 0].transpose(0, 1)
        own = gates.unbind(2)
        return torch.stack([at_depth(g, self._depths[n]) for n, g in zip(names, own, strict=True)])
