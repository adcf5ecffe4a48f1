"""Trying a plan on the backbone: the same output at step 0, and a backward pass that works."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from perceive_adapter.config import AdapterConfig
from perceive_adapter.errors import BackboneError, SiteError
from perceive_adapter.injection.eval_only import training_mode
from perceive_adapter.injection.folding import hidden_weights
from perceive_adapter.injection.injector import PromptInjector
from perceive_adapter.injection.plan import Site, SitePlan
from perceive_adapter.injection.probe import Example, find_image

__all__ = ["verify_plan"]


def verify_plan(
    backbone: nn.Module,
    plan: SitePlan,
    config: AdapterConfig,
    example: Example,
    output: Any,
    *,
    named: bool,
) -> SitePlan:
    """Attach prompts, compare the output, run a backward pass, and take them off again.

    Sites that break the backward pass (their features are changed in place) or that the output
    does not depend on are dropped; those behind a frozen zero scale are noted in ``blocked``, and
    in ``folds`` whether branches may be folded into the weights. A network that changes features in
    place in eval mode alone is tried in training mode.

    Args:
        backbone: inside :func:`~.probe.quiet`.
        plan: with ranks.
        config: kinds of prompt modules.
        example: the dry run's arguments.
        output: what the bare backbone gave for them.
        named: whether the user named the sites, so that a broken one is an error.

    Raises:
        SiteError: no site works, or one that the user named does not.
        BackboneError: hooks alone change the output.
    """
    with torch.device(example.image.device):
        injector = PromptInjector(plan, config)
    folds = _keeps_output(backbone, injector, example, find_image(output, 1))
    gradients, failure = _working(backbone, injector, example)
    if failure is not None:
        with training_mode(backbone, plan.eval_only):
            trained, problem = _working(backbone, injector, example)
        if _count(trained) > _count(gradients):
            gradients, failure = trained, problem
    usable = [site for site in plan if gradients.get(site) is not None]
    if lost := list(dict.fromkeys(site.name for site in plan if site not in usable)):
        why = failure or "no gradient of the output reaches them"
        if named or not usable:
            remedy = "leave these sites out" if usable or failure else _NO_GRADIENT
            raise SiteError(
                f"a backward pass with prompts at {', '.join(lost[:5])} fails: {why}; {remedy}"
            ) from failure
    blocked = tuple(dict.fromkeys(site.name for site in usable if not gradients[site]))
    return dataclasses.replace(plan, sites=tuple(usable), blocked=blocked, folds=folds)


_NO_GRADIENT = (
    "the network may turn gradients off in its forward (torch.no_grad(), .detach()): take that "
    "out, or name other sites=..."
)


@torch.no_grad()
def _keeps_output(
    backbone: nn.Module, injector: PromptInjector, example: Example, bare: Tensor
) -> bool:
    """Compare the output at step 0 with the bare network's.

    Returns:
        Whether branches may be folded: not where a layer's weight is read elsewhere too.

    Raises:
        BackboneError: it is another.
    """
    with _attached(injector, backbone):
        try:
            with hidden_weights(injector):
                if torch.equal(bare, _restored(backbone, example)):
                    return True
        except Exception:  # of a network that does something else with what is hidden from it
            pass
        wrapped = _restored(backbone, example)
    if torch.equal(bare, wrapped):
        return False
    again = _restored(backbone, example)
    if torch.equal(bare, again):  # else the backbone itself is random, and nothing can be said
        error = (bare - wrapped).abs().max().item()
        raise BackboneError(
            f"hooks that change nothing change the output of this {type(backbone).__name__} by "
            f"{error:.1e}; it runs another code path when it is hooked. Name other sites=..."
        )
    return True


def _working(
    backbone: nn.Module, injector: PromptInjector, example: Example
) -> tuple[dict[Site, bool | None], Exception | None]:
    """Return which sites get a gradient, halving the set for as long as the backward fails."""
    try:
        return _gradients(backbone, injector, example), None
    except Exception as error:  # of autograd, or of a backbone's own backward
        plan, middle = injector.plan, len(injector.plan) // 2
        if not middle:
            return {}, error
        found: dict[Site, bool | None] = {}
        for half in (plan.sites[:middle], plan.sites[middle:]):
            with torch.device(example.image.device):
                part = PromptInjector(dataclasses.replace(plan, sites=half), injector.config)
            found |= _working(backbone, part, example)[0]
        return found, error


def _count(gradients: dict[Site, bool | None]) -> int:
    return sum(gradient is not None for gradient in gradients.values())


def _gradients(
    backbone: nn.Module, injector: PromptInjector, example: Example
) -> dict[Site, bool | None]:
    """Run one backward pass; per site True, False for a gradient of zero, None for no graph."""
    for parameter in injector.parameters():
        nn.init.normal_(parameter, std=0.02)
    with torch.enable_grad(), _attached(injector, backbone):
        loss = _restored(backbone, example).float().square().mean()
        if not loss.requires_grad:
            return dict.fromkeys(injector.plan.sites)
        parameters = [list(prompt.prompt.parameters()) for prompt in injector.prompt_sites]
        flat = [parameter for group in parameters for parameter in group]
        gradients = iter(torch.autograd.grad(loss, flat, allow_unused=True))
    result: dict[Site, bool | None] = {}
    for prompt, group in zip(injector.prompt_sites, parameters, strict=True):
        own = [next(gradients) for _ in group]
        known = [gradient for gradient in own if gradient is not None]
        whole = len(known) == len(own)  # branches of one shape share a graph, up to their `down`
        result[prompt.site] = any(bool(g.any()) for g in known) if whole else None
    return result


@contextmanager
def _attached(injector: PromptInjector, backbone: nn.Module) -> Iterator[None]:
    """Attach with some condition for the length of the context."""
    injector.attach(backbone)
    try:
        weight = next(injector.parameters())
        width = injector.config.condition_dim + 1
        condition = torch.linspace(-1, 1, width, dtype=weight.dtype, device=weight.device)
        injector.arm(condition.expand(1, 1, width))
        yield
    finally:
        injector.disarm()
        injector.detach()


def _restored(backbone: nn.Module, example: Example) -> Tensor:
    return find_image(example.call(backbone), example.image.shape[0])
