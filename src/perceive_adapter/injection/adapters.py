"""Several adapters on one backbone: one is active, or each image of a batch has its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from perceive_adapter.errors import ConfigError
from perceive_adapter.injection.injector import PromptInjector
from perceive_adapter.injection.state import ForwardPass, Lock, Passes

__all__ = ["AdapterSet"]


class AdapterSet(nn.ModuleDict):
    """Injectors by name, all attached to one backbone; the active one works and trains.

    Args:
        backbone: what the injectors are attached to. It is not registered here.
        name: of the first injector, which is active.
        injector: the first injector.
    """

    def __init__(self, backbone: nn.Module, name: str, injector: PromptInjector) -> None:
        super().__init__()
        injector.attach(backbone)
        # What trains of the others once they are active; None for all of it.
        self._trains: dict[str, set[str] | None] = {}
        self.active = name
        self[name] = injector

    @property
    def lock(self) -> Lock:
        """What those hold who run the backbone or change its adapters; all injectors share it."""
        return self.injector.lock

    @property
    def injector(self) -> PromptInjector:
        """The active injector."""
        return self.named(self.active)

    @property
    def trains(self) -> bool:
        """Whether the active injector trains."""
        return any(parameter.requires_grad for parameter in self.injector.parameters())

    def named(self, name: str) -> PromptInjector:
        """Return an injector.

        Raises:
            ConfigError: there is none of that name.
        """
        if name not in self:
            raise ConfigError(f"there is no adapter {name!r}; the adapters are {', '.join(self)}")
        return cast(PromptInjector, self[name])

    def check_new(self, name: str) -> None:
        """Raise if there cannot be another adapter of this name.

        Raises:
            ConfigError: the name is taken or cannot be one.
        """
        if not isinstance(name, str) or not name or "." in name:
            raise ConfigError(f"adapter name {name!r}: expected some text without a dot")
        if name in self:
            raise ConfigError(
                f"there is an adapter {name!r} already, of {', '.join(self)}; choose another name, "
                "delete_adapter() it, or put other weights into it with hotswap_adapter()"
            )
        if hasattr(self, name):
            raise ConfigError(f"adapter name {name!r} is one that torch needs; choose another name")

    def add(
        self, backbone: nn.Module, name: str, injector: PromptInjector, *, trains: bool
    ) -> None:
        """Attach another injector, frozen and inactive.

        Args:
            backbone: that of the others.
            name: a new one.
            injector: not attached.
            trains: whether it trains once it is active.

        Raises:
            ConfigError: the name is taken or cannot be one.
            SiteError: its sites do not fit the backbone.
        """
        self.check_new(name)
        injector.attach(backbone, beside_others=True)
        injector.lock = self.lock
        injector.state.passes = self.injector.state.passes
        injector.requires_grad_(False)
        injector.enabled = False
        self[name] = injector
        self._trains[name] = None if trains else set()

    def activate(self, name: str) -> None:
        """Make an adapter the one that works, and trains if it was added or left so.

        Raises:
            ConfigError: there is none of that name.
        """
        new, old = self.named(name), self.injector
        if new is old:
            return
        self._trains[self.active] = {
            part for part, parameter in old.named_parameters() if parameter.requires_grad
        }
        old.requires_grad_(False)
        _set_trained(new, self._trains[name])
        new.enabled, old.enabled = old.enabled, False
        self.active = name

    def remove(self, name: str) -> None:
        """Detach and forget an adapter that is not active.

        Raises:
            ConfigError: there is none of that name, or it is active.
        """
        injector = self.named(name)
        if name == self.active:
            raise ConfigError(f"adapter {name!r} is active; set_adapter() another one first")
        injector.detach()
        del self[name]
        # It is its owner's again, who may attach it elsewhere.
        injector.lock, injector.state.passes = Lock(), Passes()
        injector.enabled = True
        _set_trained(injector, self._trains.pop(name))

    def check_names(self, names: Sequence[str | None], batch: int) -> None:
        """Raise if ``names`` do not name an adapter, or None, for each image of a batch.

        Raises:
            ConfigError: a name is unknown, or there are more or fewer than images.
        """
        if isinstance(names, str) or len(names) != batch:
            raise ConfigError(
                f"adapter_names={names!r} for {batch} images: expected a list with a name for each "
                "image, or None for the bare backbone"
            )
        self.check_known(names)

    def check_known(self, names: Iterable[str | None]) -> None:
        """Raise if one of ``names`` is no adapter's, nor None.

        Raises:
            ConfigError: a name is unknown.
        """
        for name in names:
            if name is not None:
                self.named(name)

    def arm(
        self, conditions: Mapping[str, Tensor], names: Sequence[str | None]
    ) -> ForwardPass | None:
        """Give each image of the forward pass that follows to the adapter that is named for it.

        Args:
            conditions: (B or 1, L, C + 1) of every adapter that is named.
            names: for each of B images.

        Returns:
            That pass; None under torch.compile.
        """
        this = None if torch.compiler.is_compiling() else self.injector.state.passes.begin()
        for name in self:
            injector = self.named(name)
            injector.state.enabled = name in conditions  # torch 2.6 traces no property's setter
            if name in conditions:
                # At a condition of zeros a prompt leaves features as they are.
                own = [[[float(name == other)]] for other in names]
                injector.arm(conditions[name] * conditions[name].new_tensor(own), this)
        return this

    def disarm(self) -> None:
        """End that forward pass: the active adapter alone is at work again."""
        for name in self:
            injector = self.named(name)
            injector.disarm()
            injector.state.enabled = name == self.active

    @contextmanager
    def mixed(
        self, conditions: Mapping[str, Tensor], names: Sequence[str | None]
    ) -> Iterator[ForwardPass | None]:
        """See :meth:`arm`; for one forward pass inside the context, which is given."""
        self.injector.check_idle()
        try:
            yield self.arm(conditions, names)
        finally:
            self.disarm()

    def detach(self) -> None:
        """Take the hooks of all injectors off the backbone."""
        for name in self:
            self.named(name).detach()


def _set_trained(injector: PromptInjector, parts: set[str] | None) -> None:
    """Let these parameters train, None for all, and no others."""
    for part, parameter in injector.named_parameters():
        parameter.requires_grad_(parts is None or part in parts)
