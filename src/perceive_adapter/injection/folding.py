"""Folding: for one perception, a gated low-rank branch is a plain weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from perceive_adapter.injection.injector import PromptInjector

__all__ = ["folded_weights", "hidden_weights"]


@contextmanager
def folded_weights(injector: PromptInjector, condition: Tensor) -> Iterator[None]:
    """Run the attached backbone with the branches of one condition folded into its layers' weights.

    The layers hold other tensors inside the context and the user's own parameter objects, never
    written to, afterwards, also after an exception. A layer is swapped by its module, so layers
    that share one weight each get their own. Prompt modules that cannot fold, layers of which the
    weight is not a plain parameter (parametrized, quantised) or is set anew by the network itself,
    those that do something else with it (standardise it, say), and all layers where the plan says
    so, run by their hooks.

    Args:
        injector: attached, and armed with ``condition`` for what does not fold; the caller sees
            to it that one thread at a time runs its backbone.
        condition: (1, L, C + 1).
    """
    foldable = injector.foldable() if injector.plan.folds else []
    layers = {prompt.site.name: (module, prompt) for module, prompt, _ in foldable}
    originals = {prompt.site.name: weight for _, prompt, weight in foldable}
    folded = injector.branches.folded(condition, originals)
    swapped: list[str] = []
    try:
        for name, together in folded.items():
            module, prompt = layers[name]
            module._parameters["weight"] = nn.Parameter(together, requires_grad=False)
            prompt.fold.under_way, prompt.fold.address = True, together.data_ptr()
            swapped.append(name)
        yield
    finally:
        for name in swapped:
            module, prompt = layers[name]
            module._parameters["weight"] = originals[name]
            prompt.fold.under_way = False


@contextmanager
def hidden_weights(injector: PromptInjector) -> Iterator[None]:
    """Show the weights that would be folded to their own layers alone; for others they are NaN.

    Args:
        injector: attached.
    """
    with ExitStack() as stack:
        for module, _, weight in injector.foldable():
            blank = weight.new_full((), torch.nan).expand(weight.shape)
            _hide(module, weight, nn.Parameter(blank, requires_grad=False), stack)
        yield


def _hide(module: nn.Module, weight: nn.Parameter, blank: nn.Parameter, stack: ExitStack) -> None:
    def hold(what: nn.Parameter) -> None:
        module._parameters["weight"] = what

    def show(*_: Any) -> None:
        hold(weight)

    def hide(*_: Any) -> None:
        hold(blank)

    stack.callback(show)
    stack.callback(module.register_forward_pre_hook(show).remove)
    stack.callback(module.register_forward_hook(hide).remove)
    hide()
