"""Half-restored images for the difficulty-adaptive loss, made while stage 2 trains."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor, nn

from perceive_adapter.errors import ConfigError
from perceive_adapter.injection.perception import Perception
from perceive_adapter.modes import keeping_modes
from perceive_adapter.training.calling import restored_by
from perceive_adapter.weights import is_sharded

__all__ = ["EARLIER", "EarlierSelf", "MediumSource", "Mediums"]

EARLIER: Final = "earlier"
"""Names the model's own earlier state among the sources."""

MediumSource: TypeAlias = nn.Module | Literal["earlier"]


class EarlierSelf(nn.Module):
    """The model as it was some time ago: its medium images get better as it does.

    It restores in evaluation mode, by its own batch statistics, and leaves the model's alone.

    Args:
        model: whose trainable parameters and buffers are remembered; it is not registered here.

    Raises:
        ConfigError: the model is sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if any(map(is_sharded, model.parameters())):
            raise ConfigError(
                'a model that FSDP has sharded cannot be its own medium, "earlier"; give a restorer'
            )
        saved = model.state_dict().keys()  # what else is a buffer is computed anew, at any size
        self.names = [name for name, value in model.named_parameters() if value.requires_grad]
        self.names += [name for name, _ in model.named_buffers() if name in saved]
        for index, name in enumerate(self.names):
            self.register_buffer(str(index), attrgetter(name)(model).detach().clone())

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> None:
        """Remember the model as it is now."""
        for index, name in enumerate(self.names):
            self.get_buffer(str(index)).copy_(attrgetter(name)(model))

    def forward(self, model: nn.Module, degraded: Tensor, perception: Perception | None) -> Tensor:
        """Restore with what is remembered."""
        remembered = {name: self.get_buffer(str(i)) for i, name in enumerate(self.names)}
        with keeping_modes(model):
            model.eval()
            return restored_by(model, degraded, perception, weights=remembered)


class Mediums(nn.Module):
    """The medium images of a batch, one for each source.

    Args:
        model: that is trained; it is not registered here.
        sources: modules from degraded to half-restored image in [0, 1], which are frozen, and
            ``"earlier"`` for the model's own earlier state.

    Raises:
        ConfigError: a source is something else, or the model is sharded and to be its own medium.
    """

    def __init__(self, model: nn.Module, sources: Sequence[MediumSource]) -> None:
        super().__init__()
        if isinstance(sources, str):
            raise ConfigError(f"mediums={sources!r}: expected several sources, as [{sources!r}].")
        for source in sources:
            if source != EARLIER and not isinstance(source, nn.Module):
                raise ConfigError(
                    f"{source!r} makes no medium images: expected a restorer, as a torch.nn.Module "
                    f"from degraded to half-restored image, or {EARLIER!r}."
                )
        self.sources = nn.ModuleList(
            EarlierSelf(model) if source == EARLIER else source.requires_grad_(False).eval()
            for source in sources
        )

    def refresh(self, model: nn.Module) -> None:
        """Remember the model as it is now, where its earlier state is a source."""
        for source in self.sources:
            if isinstance(source, EarlierSelf):
                source.refresh(model)

    def train(self, mode: bool = True) -> Mediums:
        """Keep the sources in evaluation mode."""
        return self

    @torch.no_grad()
    def forward(
        self, model: nn.Module, degraded: Tensor, perception: Perception | None
    ) -> list[Tensor]:
        """Return one tensor (B, 3, H, W) in [0, 1] for each source."""
        if perception is not None:
            perception = perception.detach()
        return [
            (
                source(model, degraded, perception)
                if isinstance(source, EarlierSelf)
                else restored_by(source, degraded)
            ).clamp(0, 1)
            for source in self.sources
        ]
