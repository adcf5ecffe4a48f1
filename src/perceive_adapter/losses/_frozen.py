"""A module that a loss uses and never trains."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["Frozen"]


class Frozen(nn.Module):
    """Hold a module that never trains, is never saved, and moves along with its owner.

    The module is kept out of the registry: ``parameters()``, ``state_dict()`` and ``train()`` of a
    loss do not reach it, so that no optimizer picks its weights up and no checkpoint carries them,
    while ``to()``, ``cuda()``, ``half()`` and the like do. Gradients flow through it to the image.

    Args:
        module: frozen in place: put in eval mode, ``requires_grad`` off.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # The tuple hides the module from nn.Module.__setattr__, which would register it.
        self._held = (module.eval().requires_grad_(False),)

    @property
    def module(self) -> nn.Module:
        """The held module."""
        return self._held[0]

    def forward(self, images: Tensor) -> Any:
        """Call the held module on ``images`` (B, C, H, W), cast to the dtype of its weights."""
        if self.module.training:  # somebody else owns the module too, and called train() on it
            self.module.eval()
        for weight in self.module.parameters():
            if weight.is_floating_point():
                images = images.to(weight.dtype)
                break
        return self.module(images)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Frozen":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if recurse:
            self.module._apply(fn)  # type: ignore[no-untyped-call]
        return self
