"""Freezing a backbone so that it stays what it was, and giving it back."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from perceive_adapter.errors import SiteError
from perceive_adapter.injection.globs import matching

__all__ = ["FrozenBackbone", "hold_in_eval"]


class FrozenBackbone:
    """What a backbone was before it was frozen: modes, ``requires_grad``, and changed weights.

    Args:
        backbone: frozen from here on, until :meth:`release`.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        self.modes = {name: module.training for name, module in backbone.named_modules()}
        self.required = {name: p.requires_grad for name, p in backbone.named_parameters()}
        self.originals: dict[str, Tensor] = {}
        backbone.requires_grad_(False)

    def unfreeze(self, patterns: Iterable[str]) -> list[str]:
        """Let the parameters that match train; their present values come back on release.

        Returns:
            The names of the parameters that train now.

        Raises:
            SiteError: a pattern matches no parameter.
        """
        parameters = dict(self.backbone.named_parameters())
        names = list(
            dict.fromkeys(n for p in patterns for n in matching(p, parameters, "parameter"))
        )
        self.keep(names)
        for name in names:
            if not parameters[name].is_floating_point():
                raise SiteError(f"parameter {name!r} is {parameters[name].dtype}; it cannot train")
            parameters[name].requires_grad_(True)
        return names

    def keep(self, names: Iterable[str]) -> None:
        """Remember the present values of these parameters."""
        for name in names:
            if name not in self.originals:
                self.originals[name] = self.backbone.get_parameter(name).detach().clone()

    def changed(self) -> dict[str, Tensor]:
        """Return the parameters that were unfrozen, as they are now."""
        return {name: self.backbone.get_parameter(name).detach() for name in self.originals}

    def release(self) -> nn.Module:
        """Give the backbone back with weights, ``requires_grad`` and modes as they were."""
        with torch.no_grad():
            for name, value in self.originals.items():
                self.backbone.get_parameter(name).copy_(value)
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(self.required[name])
            parameter.grad = None if name in self.originals else parameter.grad
        for name, module in self.backbone.named_modules():
            module.training = self.modes[name]
        return self.backbone


def hold_in_eval(backbone: nn.Module, eval_only: Iterable[str]) -> None:
    """Keep frozen modules in eval mode that would update statistics, or run other layers.

    Args:
        backbone: in training mode.
        eval_only: names of modules, see :class:`~.plan.SitePlan`. Those of which something trains
            are left in training mode.
    """
    names = set(eval_only)
    for name, module in backbone.named_modules():
        if _updates_statistics(module):
            module.eval()
        elif name in names and not any(p.requires_grad for p in module.parameters()):
            module.training = False


def _updates_statistics(module: nn.Module) -> bool:
    """Tell batch and instance norms with running statistics, and spectral norms, old and new."""
    buffers = module._buffers
    spectral = isinstance(module, torch.nn.utils.parametrizations._SpectralNorm)
    return spectral or "weight_u" in buffers or buffers.get("running_mean") is not None
