"""What a perceiver says about a batch of images."""

from dataclasses import dataclass

from torch import Tensor

from perceive_adapter.pytrees import register_pytree

__all__ = ["Perceived"]


@dataclass(frozen=True, eq=False)
class Perceived:
    """What a perceiver says about a batch of B images.

    The perceiver names the columns: ``perceiver.tiers`` (K of them, from worst to best) and
    ``perceiver.degradations`` (D of them, none where it has no degradation heads).

    Attributes:
        score: (B,), quality in [0, 1], higher is better.
        tiers: (B, K), probabilities that sum to 1.
        degradations: (B, D), presence in [0, 1].
        severity: (B, D), in [0, 1].
        embedding: (B, E), of unit length.
    """

    score: Tensor
    tiers: Tensor
    degradations: Tensor
    severity: Tensor
    embedding: Tensor


register_pytree(Perceived)
