"""Networks that run other layers in training mode than in eval mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from perceive_adapter.injection.freezing import hold_in_eval
from perceive_adapter.injection.plan import SitePlan
from perceive_adapter.injection.probe import Example, trace

__all__ = ["find_eval_only", "training_mode"]


def find_eval_only(backbone: nn.Module, plan: SitePlan, example: Example) -> tuple[str, ...]:
    """Find the modules that leave sites out in training mode.

    A convolution that is merged from several runs in eval mode, and its parts do in training mode:
    a prompt at the merged one would never train. Of a frozen network both give the same, so the
    module that decides can stay in eval mode.

    Args:
        backbone: inside :func:`~.probe.quiet`.
        plan: its sites.
        example: what it is called with.

    Returns:
        Names of modules whose own mode has to be eval; "" is the backbone itself.
    """
    try:
        with training_mode(backbone):
            calls = trace(backbone, example, fingerprints=False).calls
    except Exception:  # whatever a network asks for in training mode, such as a target
        return ()
    held: dict[str, None] = {}
    for site in plan:
        name = site.name
        while name and name not in calls:
            name = name.rpartition(".")[0]
            held[name] = None
    return tuple(held)


@contextmanager
def training_mode(backbone: nn.Module, eval_only: Iterable[str] = ()) -> Iterator[None]:
    """Put a quiet backbone into the mode in which a wrapped one trains, inside the context."""
    modules = list(backbone.modules())
    try:
        for module in modules:
            module.training = True
        hold_in_eval(backbone, eval_only)
        yield
    finally:
        for module in modules:
            module.training = False
