"""Which degradations an image has and how severe each is, told from its embedding."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DegradationHeads"]

_HIDDEN = 128


class DegradationHeads(nn.Module):
    """A two-layer perceptron from an embedding to presence and severity.

    Several degradations may be present at once, or none, so each has a probability of its own.

    Args:
        embedding_dim: width E of the embedding.
        names: of the D degradations.

    Shape:
        Unit vectors (B, E) to presence logits (B, D) and severity logits (B, D).
    """

    def __init__(self, embedding_dim: int, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.hidden = nn.Linear(embedding_dim, _HIDDEN)
        self.presence = nn.Linear(_HIDDEN, len(self.names))
        self.severity = nn.Linear(_HIDDEN, len(self.names))

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Return presence and severity logits, in single precision or better."""
        weight = self.hidden.weight
        scaled = embedding * embedding.shape[-1] ** 0.5  # entries of the order of one
        with torch.autocast(weight.device.type, enabled=False):
            hidden = F.relu(self.hidden(scaled.to(weight.dtype)))
            presence, severity = self.presence(hidden), self.severity(hidden)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return presence.to(wide), severity.to(wide)

    def loss(self, embedding: Tensor, severity: Tensor) -> Tensor:
        """Return the loss of telling presence and severity, a scalar.

        Presence is a binary cross entropy. A degradation counts as present from a severity of 0.2
        on, as absent below 0.05, where it is hardly visible, and in proportion between. Severity
        is a smooth L1 distance.

        Args:
            embedding: (B, E), unit vectors.
            severity: (B, D) in [0, 1], 0 where a degradation is absent.
        """
        presence_logits, severity_logits = self(embedding)
        present = ((severity - 0.05) / 0.15).clamp(0, 1)
        presence = F.binary_cross_entropy_with_logits(presence_logits, present)
        distance = F.smooth_l1_loss(severity_logits.sigmoid(), severity, beta=0.05)
        return presence + 4 * distance
