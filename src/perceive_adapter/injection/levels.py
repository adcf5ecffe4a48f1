"""Choosing level sites: the stages of a network that nobody has prepared."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise

from torch import nn

from perceive_adapter.injection.layouts import Feature, Traces, level_feature
from perceive_adapter.injection.probe import find_image
from perceive_adapter.injection.prompts import is_dense

__all__ = ["Stage", "choose_levels"]

MAX_GROUPS = 8
FEW = 3
CLEARLY = 1.25  # strides of networks that pad to whole windows are not exact


@dataclass(frozen=True)
class Stage:
    """One step of the backbone's forward pass, the unit that levels are chosen from."""

    name: str
    feature: Feature
    kind: str
    dense: int
    end: int


def choose_levels(backbone: nn.Module, traces: Traces) -> list[tuple[Stage, str]]:
    """Choose level sites and say why, in the order of execution.

    In a network that changes resolution these are the last features before every upsampling, that
    is the bottleneck and each decoder level, and the last features of all. A body that keeps one
    resolution gives evenly spaced members of its longest run of equal blocks.
    """
    stages = _spine(backbone, traces)
    if not stages:
        return []
    chosen: dict[str, tuple[Stage, str]] = {}
    deepest = max(stage.feature.stride for stage in stages)
    for stage, following in pairwise(stages):
        if CLEARLY * following.feature.stride < stage.feature.stride:
            bottom = stage.feature.stride == deepest
            chosen[stage.name] = (stage, "bottleneck" if bottom else "decoder level")
    last = stages[-2] if _gives_image(stages[-1], traces) and len(stages) > 1 else stages[-1]
    chosen.setdefault(last.name, (last, "last features"))
    if len(chosen) < FEW:
        for stage in _groups(stages):
            chosen.setdefault(stage.name, (stage, "group of an isotropic body"))
    return sorted(chosen.values(), key=lambda pair: pair[0].end)


def _gives_image(stage: Stage, traces: Traces) -> bool:
    """Tell whether a stage gives the restored image itself, however many channels that has."""
    restored = find_image(traces.base.output, 1)
    scale = traces.image_size[0] / restored.shape[-2]
    return (stage.feature.channels, stage.feature.stride) == (restored.shape[1], scale)


def _groups(stages: list[Stage]) -> list[Stage]:
    """Return at most eight members, evenly spaced, of the longest run of equal stages."""
    bodies = [stage for stage in stages if stage.dense]
    runs = [list(run) for _, run in groupby(bodies, key=lambda s: (s.kind, s.feature.stride))]
    run = max(runs, key=lambda run: (len(run) > 1, sum(s.dense for s in run)), default=[])
    if len(run) < 2:
        return []
    count = min(MAX_GROUPS, len(run))
    return [run[round((i + 1) * len(run) / count) - 1] for i in range(count)]


def _spine(backbone: nn.Module, traces: Traces) -> list[Stage]:
    """Cut the forward pass into stages that follow each other, each one feature map."""
    modules = dict(backbone.named_modules())
    ran = {name for name, m in modules.items() if is_dense(m) and traces.base.calls.get(name)}
    total = len(ran) or 1
    stages: list[Stage] = []

    def walk(name: str) -> None:
        module = modules[name]
        calls = traces.base.calls.get(name, [])
        children = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        children = [child for child in children if child in modules]
        feature = level_feature(name, traces) if name else "the root"
        below = _below(name, modules)
        dense = len(ran.intersection((name, *below)))
        fires_below = any(traces.base.calls.get(n) for n in below)
        if fires_below and (
            isinstance(feature, str)
            or 2 * dense > total
            or (4 * dense >= total and _hides_scales(name, feature, modules, traces))
        ):
            before = len(stages)
            for child in children:
                walk(child)
            if len(stages) > before or isinstance(feature, str):
                return
        if not isinstance(feature, str) and CLEARLY * feature.stride > 1:
            stages.append(Stage(name, feature, type(module).__name__, dense, calls[0].end))

    walk("")
    return sorted(stages, key=lambda stage: stage.end)


def _below(name: str, modules: dict[str, nn.Module]) -> list[str]:
    prefix = f"{name}." if name else ""
    return [other for other in modules if other.startswith(prefix) and other != name]


def _hides_scales(
    name: str, feature: Feature, modules: dict[str, nn.Module], traces: Traces
) -> bool:
    """Tell whether a module goes down to a coarser grid inside and comes back."""
    own = max(feature.stride, feature.input_stride)
    inside = (level_feature(other, traces) for other in _below(name, modules))
    return any(f.stride > 1.5 * own for f in inside if not isinstance(f, str))
