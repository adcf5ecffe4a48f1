"""The size of an adapter: the rank of its branches, within a budget of parameters."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right

import torch

from perceive_adapter.config import AdapterConfig
from perceive_adapter.errors import SiteError
from perceive_adapter.injection.condition import ConditionEncoder
from perceive_adapter.injection.plan import Site, SitePlan
from perceive_adapter.injection.prompts import build_prompt

__all__ = ["fit_budget"]


def fit_budget(plan: SitePlan, config: AdapterConfig, *, keep_all: bool) -> SitePlan:
    """Choose the highest rank that fits, dropping the dearest layers where even rank 1 does not.

    Args:
        plan: sites without ranks.
        config: kinds of prompt modules, rank and budget.
        keep_all: whether no site may be dropped.

    Returns:
        The plan with ranks and numbers of parameters.

    Raises:
        SiteError: the smallest adapter is over the budget.
    """
    with torch.device("meta"):
        encoder = ConditionEncoder(config, plan.image_channels)
    count = sum(parameter.numel() for parameter in encoder.parameters())
    plan = dataclasses.replace(plan, encoder_parameters=count)
    budget = config.budget or max(120_000, round(0.03 * plan.backbone_parameters))
    sizes: dict[Site, int] = {}

    def parameters(rank: int) -> int:
        return _with_rank(plan, config, rank, sizes).parameters

    rank = config.rank or bisect_right(range(1, config.max_rank + 1), budget, key=parameters)
    fitted = _with_rank(plan, config, max(rank, 1), sizes)
    if config.rank and not config.budget:
        return fitted
    while not keep_all and fitted.parameters > budget and fitted.of("layer"):
        dearest = max(fitted.of("layer"), key=lambda site: site.parameters)
        fitted = dataclasses.replace(fitted, sites=tuple(s for s in fitted if s is not dearest))
    if fitted.parameters > budget:
        raise SiteError(
            f"the smallest adapter for these sites has {fitted.parameters:,} parameters and the "
            f"budget is {budget:,}; name fewer sites, or raise AdapterConfig(budget=...)"
        )
    return fitted


def _with_rank(
    plan: SitePlan, config: AdapterConfig, rank: int, sizes: dict[Site, int]
) -> SitePlan:
    sized = tuple(_sized(site, config, rank, sizes) for site in plan)
    return dataclasses.replace(plan, sites=sized)


def _sized(site: Site, config: AdapterConfig, rank: int, sizes: dict[Site, int]) -> Site:
    """Return ``site`` with its rank and size; ``sizes`` keeps those of sites that are alike."""
    if site.role == "layer":
        outputs, inputs = site.weight_shape[0], torch.Size(site.weight_shape[1:]).numel()
        site = dataclasses.replace(site, rank=min(rank, outputs, inputs))
    alike = dataclasses.replace(site, name="", reason="", stride=None, parameters=0)
    if alike not in sizes:
        with torch.device("meta"):
            prompt = build_prompt(site, config)
        sizes[alike] = sum(p.numel() for p in prompt.parameters())
    return dataclasses.replace(site, parameters=sizes[alike])
