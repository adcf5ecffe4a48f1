"""CLIP-aware loss: how far the perceiver is from calling the restored image good."""

import torch
from torch import Tensor, nn

from perceive_adapter.errors import ConfigError, LossInputError
from perceive_adapter.losses._frozen import Frozen
from perceive_adapter.losses._inputs import check_image
from perceive_adapter.precision import full_precision

__all__ = ["ClipAwareLoss"]


class ClipAwareLoss(nn.Module):
    """1 - P(highest tier | restored), mean over the batch.

    The tier probabilities come from the perceiver as they are, with the one logit scale that it
    was trained with, so that the loss uses its whole range [0, 1].

    The perceiver is frozen in place (eval mode for good, ``requires_grad`` off) and held outside
    the registry: the loss has no parameters and an empty ``state_dict``. Gradients flow through
    it to the image.

    Source: Perceive-IR, IEEE TIP 2025, arXiv 2408.15994, restoration stage (CLIP-aware loss).

    Args:
        perceiver: module from (B, 3, H, W), RGB in [0, 1], to an object whose ``tiers`` (B, K) are
            probabilities, worst tier first: a ``QualityPerceiver``.

    Raises:
        ConfigError: ``perceiver`` is not a module.

    Example:
        >>> from types import SimpleNamespace
        >>> class Brightness(nn.Module):  # calls a bright image good
        ...     def forward(self, images):
        ...         high = images.mean((1, 2, 3))
        ...         return SimpleNamespace(tiers=torch.stack([1 - high, high], 1))
        >>> loss = ClipAwareLoss(Brightness())
        >>> round(loss(torch.full((2, 3, 8, 8), 0.75)).item(), 4)
        0.25
    """

    def __init__(self, perceiver: nn.Module) -> None:
        super().__init__()
        if not isinstance(perceiver, nn.Module):
            raise ConfigError(
                f"perceiver must be an nn.Module such as QualityPerceiver, got {perceiver!r}"
            )
        self.perceiver = Frozen(perceiver)

    def forward(self, restored: Tensor) -> Tensor:
        """Return the loss of ``restored`` (B, 3, H, W) or (B, 1, H, W), a scalar in [0, 1].

        Raises:
            LossInputError: ``restored`` is not such an image, the perceiver gives no tier
                probabilities (B, K) with K of at least 2, or it stops the gradient.
        """
        image = full_precision(check_image("restored", restored))
        with torch.autocast(image.device.type, enabled=False):
            tiers = self._checked_tiers(self.perceiver(image), image)
        return (1 - full_precision(tiers[:, -1])).mean()

    def _checked_tiers(self, perceived: object, image: Tensor) -> Tensor:
        name = type(self.perceiver.module).__name__
        tiers = getattr(perceived, "tiers", None)
        if not isinstance(tiers, Tensor):
            raise LossInputError(f"{name} returned no tensor named tiers")
        if tiers.ndim != 2 or tiers.shape[0] != image.shape[0] or tiers.shape[1] < 2:
            raise LossInputError(
                f"{name}.tiers must have shape ({image.shape[0]}, K) with K of at least 2, got "
                f"{tuple(tiers.shape)}"
            )
        if torch.is_grad_enabled() and image.requires_grad and not tiers.requires_grad:
            raise LossInputError(
                f"{name} stops the gradient, so that this loss could not train anything; its "
                "forward must not run under no_grad or detach"
            )
        return tiers
