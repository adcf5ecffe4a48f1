"""Put a module into another mode for a while, and each of its parts back into its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["keeping_modes"]


@contextmanager
def keeping_modes(module: nn.Module) -> Iterator[None]:
    """Give every part of a module its own mode back at the end, training or evaluation.

    Example:
        >>> network = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3).eval())
        >>> with keeping_modes(network):
        ...     _ = network.eval()
        >>> network[0].training, network[1].training
        (True, False)
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
