"""Folding: for one perception, a gated low-rank branch is a plain weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from perceive_adapter.injection.injector import PromptInjector, PromptSite
from perceive_adapter.injection.prompts import Foldable

__all__ = ["folded_weights"]


@contextmanager
def folded_weights(injector: PromptInjector, condition: Tensor) -> Iterator[None]:
    """Run the attached backbone with the branches of one condition folded into its layers' weights.

    The layers hold other tensors inside the context and the user's own parameter objects, never
    written to, afterwards, also after an exception. A layer is swapped by its module, so layers
    that share one weight each get their own. Prompt modules that cannot fold, and layers whose
    weight is not a plain parameter (parametrized, quantised) or is set anew by the network itself,
    run by their hooks.

    Args:
        injector: attached, and armed with ``condition`` for what does not fold; the caller sees
            to it that one thread at a time runs its backbone.
        condition: (1, L, C + 1).
    """
    swapped: list[tuple[nn.Module, PromptSite, nn.Parameter]] = []
    try:
        for prompt in injector.prompt_sites:
            module = injector.module_at(prompt.site)
            original = module._parameters.get("weight") if prompt.foldable else None
            if original is None or not isinstance(prompt.prompt, Foldable):
                continue
            with torch.no_grad():
                weight = prompt.prompt.folded(original, prompt.at_depth(condition))
            module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
            prompt.folded, prompt.folded_at = True, weight.data_ptr()
            swapped.append((module, prompt, original))
        yield
    finally:
        for module, prompt, original in swapped:
            module._parameters["weight"] = original
            prompt.folded = False
