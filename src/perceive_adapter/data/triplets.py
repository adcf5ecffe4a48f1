"""Triplets of one scene in three qualities: degraded, half restored, clean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from perceive_adapter.data.degradations import mix
from perceive_adapter.errors import ConfigError

__all__ = ["Blend", "Medium", "Milder", "Mixed", "Restored", "Scene"]


@dataclass(frozen=True, eq=False)
class Scene:
    """One clean image and what is done to it; the same seed does the same again.

    Args:
        clean: (1, 3, H, W) in [0, 1].
        severities: of each degradation, in [0, 1].
        seed: of whatever is random in the degradations, so that a milder version of a scene has
            its depths and grain in the same places; streaks partly, since heavier rain has more
            of them, and shot noise not, of which other images draw other numbers.
        fold: 0 or 1, the half of the photographs that it comes from.
    """

    clean: Tensor
    severities: dict[str, float]
    seed: int
    fold: int = 0

    def degraded(self, share: float = 1.0) -> Tensor:
        """Return the degraded image (1, 3, H, W), its severities scaled by ``share``."""
        scaled = {name: share * severity for name, severity in self.severities.items()}
        return mix(self.clean, scaled, torch.Generator().manual_seed(self.seed))


class Medium(Protocol):
    """Makes the half-restored image (1, 3, H, W) in [0, 1] of a scene from the degraded one."""

    def __call__(self, scene: Scene, degraded: Tensor) -> Tensor:
        """Return the half-restored image of ``scene``, whose degraded one is given."""
        ...


@dataclass(frozen=True)
class Blend:
    """The cheapest medium: part of the way from the degraded to the clean image.

    Args:
        remains: share of the damage that remains, in (0, 1).

    Raises:
        ConfigError: ``remains`` is no such share.
    """

    remains: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.remains < 1:
            raise ConfigError(_not_between("remains", self.remains))

    def __call__(self, scene: Scene, degraded: Tensor) -> Tensor:
        """Return the blend."""
        return scene.clean + self.remains * (degraded - scene.clean)


@dataclass(frozen=True)
class Milder:
    """The same damage, less severe.

    Args:
        share: of the severity, in (0, 1).

    Raises:
        ConfigError: ``share`` is no such share.
    """

    share: float = 0.4

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(_not_between("share", self.share))

    def __call__(self, scene: Scene, degraded: Tensor) -> Tensor:
        """Return the milder image."""
        return scene.degraded(self.share)


class Restored:
    """Outputs of half-trained restorers, each of which never saw the photographs it restores.

    What a half-trained restorer leaves undone differs from task to task, so its output is blended
    with the clean image: its traces stay, and the result lies between degraded and clean.

    Source: stage 1 of Perceive-IR (IEEE TIP 2025, https://arxiv.org/abs/2408.15994); the blend is
    ours.

    Args:
        restorers: two modules from (B, 3, H, W) to (B, 3, H, W); the one at index i was trained on
            the photographs of fold i. They are put in eval mode.
        remains: share of the damage that the restorer left that is kept, in (0, 1].

    Raises:
        ConfigError: there are not two restorers, or ``remains`` is no such share.
    """

    def __init__(self, restorers: Sequence[torch.nn.Module], remains: float = 0.5) -> None:
        if len(restorers) != 2:
            raise ConfigError(f"got {len(restorers)} restorers: expected one for each of 2 folds.")
        if not 0 < remains <= 1:
            raise ConfigError(_not_between("remains", remains))
        self.restorers = tuple(restorer.eval() for restorer in restorers)
        self.remains = remains

    @torch.no_grad()
    def __call__(self, scene: Scene, degraded: Tensor) -> Tensor:
        """Restore with the restorer of the other fold."""
        restorer = self.restorers[1 - scene.fold]
        device = next(restorer.parameters(), degraded).device
        restored: Tensor = restorer(degraded.to(device)).to(degraded).clamp(0, 1)
        return scene.clean + self.remains * (restored - scene.clean)


class Mixed:
    """Each scene's medium by one of several sources; the scene's seed decides by which.

    Args:
        mediums: the sources, at least one.

    Raises:
        ConfigError: there is none.
    """

    def __init__(self, mediums: Sequence[Medium]) -> None:
        if not mediums:
            raise ConfigError("got no mediums to mix: expected one source at least.")
        self.mediums = tuple(mediums)

    def __call__(self, scene: Scene, degraded: Tensor) -> Tensor:
        """Return the half-restored image by the source whose turn it is."""
        return self.mediums[scene.seed % len(self.mediums)](scene, degraded)


def _not_between(name: str, value: float) -> str:
    return (
        f"{name}={value} makes an image that does not lie between the degraded and the clean one: "
        "expected a share between 0 and 1."
    )
