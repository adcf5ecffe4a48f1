"""Freezing a backbone so that it stays what it was, and giving it back."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from perceive_adapter.errors import ConfigError, SiteError
from perceive_adapter.injection.globs import matching
from perceive_adapter.warning import warn
from perceive_adapter.weights import is_sharded

__all__ = ["FrozenBackbone", "hold_in_eval"]


class FrozenBackbone:
    """What a backbone was before it was frozen: modes, ``requires_grad``, and changed weights.

    It does not keep the backbone alive, whose hooks have it.

    Args:
        backbone: frozen from here on, until :meth:`release`.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self._backbone = weakref.ref(backbone)
        self._modes = WeakKeyDictionary({module: module.training for module in backbone.modules()})
        self.required = {name: p.requires_grad for name, p in backbone.named_parameters()}
        self.originals: dict[str, Tensor] = {}
        self._names = self._find_names()
        backbone.requires_grad_(False)

    @property
    def backbone(self) -> nn.Module:
        """The backbone."""
        backbone = self._backbone()
        assert backbone is not None, "the backbone is gone"
        return backbone

    def unfreeze(self, patterns: Iterable[str]) -> list[str]:
        """Let the parameters that match train; their present values come back on release.

        Returns:
            The names of the parameters that train now.

        Raises:
            SiteError: a pattern matches no parameter.
        """
        patterns = tuple(patterns)
        if odd := [pattern for pattern in patterns if not isinstance(pattern, str)]:
            raise SiteError(
                f"unfreeze() got a {type(odd[0]).__name__}, {odd[0]!r}; expected names or globs "
                'one by one, as in unfreeze("head.*", "body.3.weight")'
            )
        parameters = dict(self.backbone.named_parameters())
        names = list(
            dict.fromkeys(n for p in patterns for n in matching(p, parameters, "parameter"))
        )
        for name in names:
            parameter = parameters[name]
            if not (parameter.is_floating_point() or parameter.is_complex()):
                raise SiteError(f"parameter {name!r} is {parameter.dtype}; it cannot train")
        self.keep(names)
        for name in names:
            parameters[name].requires_grad_(True)
        return names

    def keep(self, names: Iterable[str]) -> None:
        """Remember the present values of these parameters."""
        for name in names:
            if name not in self.originals:
                self.originals[name] = self.backbone.get_parameter(name).detach().clone()

    def changed(self) -> dict[str, Tensor]:
        """Return the parameters that were unfrozen, as they are now."""
        return {name: p.detach() for name, p in self._parameters() if name in self.originals}

    def requires_grad_(self, requires_grad: bool) -> None:
        """Let the parameters that were unfrozen train, or not; the others stay frozen."""
        for name, parameter in self._parameters():
            if name in self.originals:
                parameter.requires_grad_(requires_grad)

    def check_kept(self) -> None:
        """Raise where parameters may have trained that nobody has asked to keep.

        Raises:
            ConfigError: there are such parameters.
        """
        own = ((name, p) for name, p in self._parameters() if name in self.required)
        lost = [name for name, p in own if p.requires_grad and name not in self.originals]
        if lost:
            raise ConfigError(
                f"{len(lost)} parameters of the backbone require a gradient, such as {lost[0]!r}, "
                "and would not be saved, since unfreeze() does not know of them: call "
                f"model.unfreeze({lost[0]!r}, ...) where they are to train and to be saved, or "
                "requires_grad_(False) of them"
            )

    def warn_of_others(self, weights: Mapping[str, Tensor]) -> None:
        """Warn where weights that are loaded are of another network than the one that was wrapped.

        Args:
            weights: of the backbone, by its names.
        """
        if not self.originals:
            return
        others = [
            name
            for name, parameter in self._parameters()
            if name in weights and name not in self.originals
            if not (parameter.is_meta or is_sharded(parameter))
            if not torch.equal(parameter, weights[name].to(parameter))
        ]
        if others:
            warn(
                f"the state dict has other values for {len(others)} frozen parameters than the "
                f"network that was wrapped, such as {others[0]!r}: unwrap() will put back values "
                f"of that network for the {len(self.originals)} that are unfrozen, and a saved "
                "adapter will name it as its own. Load the network's own weights before wrap()"
            )

    def release(self) -> nn.Module:
        """Give the backbone back with weights, ``requires_grad`` and modes as they were.

        What others have added since, such as the layers of another adapter, is left as it is.
        """
        for name, parameter in self._parameters():
            if name in self.originals:
                parameter.grad = None
                with torch.no_grad():
                    parameter.copy_(self.originals[name])
            if name in self.required:
                parameter.requires_grad_(self.required[name])
        for module, mode in self._modes.items():
            module.training = mode
        return self.backbone

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The backbone's parameters, by the names that they had when it was frozen."""
        for name, parameter in self.backbone.named_parameters():
            yield self._names.get(parameter, name), parameter  # type: ignore[no-untyped-call]

    def _find_names(self) -> WeakTensorKeyDictionary:
        """Names by parameter; weakly, since sharding puts others in their place to save memory."""
        return WeakTensorKeyDictionary({p: name for name, p in self.backbone.named_parameters()})

    def __getstate__(self) -> dict[str, Any]:
        strong = {"_backbone": self.backbone, "_modes": list(self._modes.items())}
        return {k: v for k, v in {**self.__dict__, **strong}.items() if k != "_names"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        weak = {
            "_backbone": weakref.ref(state["_backbone"]),
            "_modes": WeakKeyDictionary(state["_modes"]),
        }
        self.__dict__.update({**state, **weak})
        self._names = self._find_names()


def hold_in_eval(backbone: nn.Module, eval_only: Iterable[str], *, training: bool = True) -> None:
    """Keep frozen modules in eval mode that would update statistics, or run other layers.

    Args:
        backbone: in the mode that ``training`` says, but for these modules.
        eval_only: names of modules, see :class:`~.plan.SitePlan`. Those of which something trains
            follow ``training``.
        training: whether the model trains.
    """
    names = set(eval_only)
    for name, module in backbone.named_modules():
        if _updates_statistics(module):
            module.eval()
        elif name in names:
            module.training = training and any(p.requires_grad for p in module.parameters())


def _updates_statistics(module: nn.Module) -> bool:
    """Tell batch and instance norms with running statistics, and spectral norms, old and new."""
    buffers = module._buffers
    spectral = "weight_u" in buffers or {"_u", "_v"} <= buffers.keys()
    return spectral or buffers.get("running_mean") is not None
