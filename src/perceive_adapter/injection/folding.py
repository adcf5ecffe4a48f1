"""Folding: for one perception, a gated low-rank branch is a plain weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from perceive_adapter.injection.injector import PromptInjector

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
    layers = {
        prompt.site.name: (injector.module_at(prompt.site), prompt)
        for prompt in injector.prompt_sites
        if prompt.foldable
    }
    originals = {
        name: weight
        for name, (module, _) in layers.items()
        if (weight := module._parameters.get("weight")) is not None
    }
    folded = injector.branches.folded(condition, originals)
    swapped: list[str] = []
    try:
        for name, together in folded.items():
            module, prompt = layers[name]
            module._parameters["weight"] = nn.Parameter(together, requires_grad=False)
            prompt.folded, prompt.folded_at = True, together.data_ptr()
            swapped.append(name)
        yield
    finally:
        for name in swapped:
            module, prompt = layers[name]
            module._parameters["weight"] = originals[name]
            prompt.folded = False
