"""Planning the sites of a backbone: by discovery within a budget, or as the user names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perceive_adapter.config import AdapterConfig
from perceive_adapter.errors import BackboneError, SiteError
from perceive_adapter.injection.budget import fit_budget
from perceive_adapter.injection.eval_only import find_eval_only
from perceive_adapter.injection.globs import matching
from perceive_adapter.injection.injector import check_backbone
from perceive_adapter.injection.layouts import Traces, layer_layout, level_feature
from perceive_adapter.injection.levels import choose_levels
from perceive_adapter.injection.plan import MAX_SCALE_PARTS, Geometry, Site, SitePlan
from perceive_adapter.injection.probe import (
    Example,
    Trace,
    check_image,
    find_image,
    image_argument,
    quiet,
    trace,
    weight_like_images,
)
from perceive_adapter.injection.prompts import is_dense, weight_shape
from perceive_adapter.injection.verify import verify_plan

__all__ = ["plan_sites"]

PROBE_SIZE = 64


@torch.inference_mode(False)  # a backward pass is tried
def plan_sites(
    backbone: nn.Module,
    *,
    sites: str | Sequence[str] | None = None,
    config: AdapterConfig | None = None,
    example: Any = None,
    image_arg: int | str = 0,
) -> SitePlan:
    """Find where prompts can go into a backbone that nobody prepared, and change nothing.

    Dry runs, of which one has another size, one two images, and one is in training mode, tell
    which module's output is a feature map, on which axes, which dense layers see the images of a
    batch, and which would not train.

    Args:
        backbone: network from degraded to restored image.
        sites: dotted module names or globs (``*`` stays within one level, ``**`` does not), with
            an optional prefix ``level:`` or ``layer:``; None discovers within the budget.
        config: kinds of prompt modules, rank and budget.
        example: input of the dry run, an image (1, C, H, W) or a tuple of arguments or a mapping
            of keyword arguments; None tries (1, C, 64, 64).
        image_arg: position or keyword of the image among the arguments.

    Returns:
        The plan; ``print(plan)`` shows it as a table.

    Raises:
        SiteError: nothing matches, the layout of a named site is ambiguous, or the smallest adapter
            is over the budget.
        BackboneError: the dry run fails, or gives no image.
        ConfigError: a bad configuration.
        ImageError: the example is no floating-point image.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1))
        >>> [site.name for site in plan_sites(net).of("layer")]
        ['0', '1']
    """
    config = config or AdapterConfig()
    check_backbone(backbone)
    before = [(name, t, t.detach(), _version(t)) for name, t in _weights(backbone).items()]
    with quiet(backbone):
        given, base = dry_run(backbone, example, image_arg)
        traces, scale = _traces(backbone, given, base)
        plan = SitePlan(
            sites=tuple(_find(backbone, sites, traces, config)),
            image_channels=given.image.shape[1],
            scale=scale,
            probe_size=(given.image.shape[2], given.image.shape[3]),
            backbone_parameters=sum(p.numel() for p in backbone.parameters()),
        )
        named = sites is not None
        plan = fit_budget(plan, config, keep_all=named)
        small = _smallest(given, traces)
        output = base.output if traces.size is None or small is given else traces.size.output
        plan = dataclasses.replace(plan, eval_only=find_eval_only(backbone, plan, small))
        plan = verify_plan(backbone, plan, config, small, output, named=named)
        now = _weights(backbone)
        rewritten = tuple(
            name
            for name, weight, data, version in before
            if now.get(name) is not weight
            or weight.data_ptr() != data.data_ptr()
            or _version(weight) != version
        )
    return dataclasses.replace(plan, rewritten=rewritten)


def _weights(backbone: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}


def _version(weight: Tensor) -> int:
    """How often a weight has been written to, as far as torch counts it."""
    return 0 if weight.is_inference() else weight._version


def _find(
    backbone: nn.Module, sites: str | Sequence[str] | None, traces: Traces, config: AdapterConfig
) -> list[Site]:
    modules = dict(backbone.named_modules())
    if sites is None:
        found = _discover(backbone, modules, traces)
        found = [site for site in found if getattr(config, site.role) is not None]
    else:
        patterns = [sites] if isinstance(sites, str) else list(sites)
        if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
            raise SiteError(
                f"sites={sites!r}: expected dotted names of modules, or globs, as in "
                'sites=["encoder.*"]; None finds the sites'
            )
        found = _named(patterns, modules, traces, config)
    if not found:
        raise SiteError(
            f"no injection site was found in {type(backbone).__name__}: of its {len(modules)} "
            "modules none gives a feature map or is a dense layer that sees each image of a "
            "batch; name modules with sites=[...]"
        )
    return found


def dry_run(backbone: nn.Module, example: Any, image_arg: int | str) -> tuple[Example, Trace]:
    """Run ``backbone`` on the example, or on the first guess that it takes.

    Raises:
        BackboneError: the backbone refuses the example, or every guess where none is given.
    """
    if example is not None:
        given = _as_example(backbone, example, image_arg)
        check_image(given.image, None, "the example's image")
        return given, _traced(backbone, given)
    problem: BackboneError | None = None
    for guess in _guesses(backbone, image_arg):
        try:
            return guess, _traced(backbone, guess)
        except BackboneError as error:
            problem = problem or error
    failure = "" if problem is None else f" The first failure: {problem}"
    raise BackboneError(
        f"{type(backbone).__name__} runs on none of the guessed inputs (1, C, {PROBE_SIZE}, "
        f"{PROBE_SIZE}); give wrap() one that works, example=..., an image (1, C, H, W) or a tuple "
        "or mapping of all arguments, or wrap a module that takes the image alone and passes the "
        f"other arguments on.{failure}"
    ) from problem


def _guesses(backbone: nn.Module, image_arg: int | str) -> Iterator[Example]:
    like = weight_like_images(backbone)
    first = [m.in_channels for m in backbone.modules() if isinstance(m, nn.Conv2d)][:1]
    for channels in dict.fromkeys([*(c for c in first if c <= 16), 3, 1, 4]):
        generator = torch.Generator("cpu").manual_seed(0)  # whatever torch's default device is
        size = (1, channels, PROBE_SIZE, PROBE_SIZE)
        image = torch.rand(size, generator=generator, device="cpu").to(like)
        if isinstance(image_arg, str):
            yield Example((), {image_arg: image}, image_arg)
        elif image_arg == 0:
            yield Example((image,), {}, image_arg)


def _as_example(backbone: nn.Module, example: Any, image_arg: int | str) -> Example:
    if isinstance(example, Tensor):
        if isinstance(image_arg, str):
            return Example((), {image_arg: example}, image_arg)
        example = (example,)
    position, name = image_argument(backbone, image_arg)
    if isinstance(example, Mapping):
        return Example((), dict(example), image_arg if name is None else name)
    return Example(tuple(example), {}, image_arg if position is None else position)


def _traced(backbone: nn.Module, example: Example) -> Trace:
    try:
        return trace(backbone, example)
    except Exception as error:  # whatever a network raises for an input that it was not made for
        raise BackboneError(
            f"{type(backbone).__name__} fails on an image {tuple(example.image.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _traces(backbone: nn.Module, example: Example, base: Trace) -> tuple[Traces, float]:
    """Add another size and a doubled batch to the base case; the backbone may refuse them."""
    image = example.image
    if image.shape[0] != 1:
        raise BackboneError(f"the example's image has batch {image.shape[0]}; give a batch of one")
    height, width = image.shape[2:]
    widths = [(width, find_image(base.output, 1).shape[-1])]
    for other in ((height // 2, width // 2), (2 * height, 2 * width)):
        size = _try_trace(backbone, example.resized(*other))
        if size is not None:
            widths.append((other[1], find_image(size.output, 1).shape[-1]))
            break
    traces = Traces(base, size, base, None, (height, width), other)
    small = _smallest(example, traces)
    if size is not None and small is not example and not _folds_windows(base):
        example, traces = small, dataclasses.replace(traces, single=size)
    batch = _try_trace(backbone, example.doubled())
    return dataclasses.replace(traces, batch=batch), _scale(widths)


def _scale(widths: Sequence[tuple[int, int]]) -> float:
    """Return output size / input size: the simplest fraction to which outputs were rounded.

    Example:
        >>> _scale([(64, 85), (32, 43)]) == 4 / 3
        True
    """
    before, after = widths[0]
    for denominator in range(1, MAX_SCALE_PARTS + 1):
        numerator = round(denominator * after / before)
        if all(abs(numerator * b / denominator - a) < 1 for b, a in widths) and numerator:
            return numerator / denominator
    return after / before


def _folds_windows(base: Trace) -> bool:
    """Tell whether any module sees more rows than the one image: windows, or tokens first.

    Their order is told at the full size only, where there is more than one of them.
    """
    calls = (call for calls in base.calls.values() for call in calls)
    return any(call.input_shape is not None and call.input_shape[:1] != (1,) for call in calls)


def _smallest(example: Example, traces: Traces) -> Example:
    """Return the example at the smallest size that is known to work.

    As it is where it has other tensors too: a part of a mask may mask nothing.
    """
    values = (*example.args, *example.kwargs.values())
    alone = sum(isinstance(value, Tensor) for value in values) == 1
    fits = traces.size is not None and traces.other_size < traces.image_size
    return example.resized(*traces.other_size) if alone and fits else example


def _try_trace(backbone: nn.Module, example: Example) -> Trace | None:
    try:
        return trace(backbone, example)
    except Exception:  # whatever a network raises for a size that it was not made for
        return None


def _discover(backbone: nn.Module, modules: Mapping[str, nn.Module], traces: Traces) -> list[Site]:
    levels = [
        Site(
            stage.name,
            "level",
            stage.feature.channels,
            stage.feature.stride,
            stage.feature.layout,
            reason=why,
        )
        for stage, why in choose_levels(backbone, traces)
    ]
    layers = [
        site
        for name in modules
        if isinstance(site := _layer_site(name, modules, traces, "dense layer"), Site)
    ]
    return levels + sorted(layers, key=lambda site: traces.base.calls[site.name][0].end)


def _layer_site(
    name: str, modules: Mapping[str, nn.Module], traces: Traces, reason: str
) -> Site | str:
    module = modules[name]
    if not is_dense(module):
        return f"a {type(module).__name__} is no ungrouped Conv2d and no Linear"
    layout = layer_layout(name, module, traces)
    if isinstance(layout, str):
        return layout
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape != weight_shape(module):
        return "it has no weight tensor of its channels and kernel"
    feature = level_feature(name, traces)
    stride = None if isinstance(feature, str) else feature.stride
    return Site(
        name,
        "layer",
        weight.shape[0],
        stride,
        layout,
        weight_shape=tuple(weight.shape),
        geometry=Geometry.of(module) if isinstance(module, nn.Conv2d) else None,
        reason=reason,
    )


def _level_site(name: str, traces: Traces, reason: str) -> Site | str:
    feature = level_feature(name, traces)
    if isinstance(feature, str):
        return feature
    return Site(name, "level", feature.channels, feature.stride, feature.layout, reason=reason)


def _named(
    patterns: Sequence[str],
    modules: Mapping[str, nn.Module],
    traces: Traces,
    config: AdapterConfig,
) -> list[Site]:
    """Turn names and globs into sites; every pattern has to match something usable."""
    chosen: dict[tuple[str, str], Site] = {}
    for pattern in patterns:
        role, _, glob = pattern.rpartition(":")
        if role not in ("", "level", "layer"):
            raise SiteError(f"site {pattern!r}: prefix {role!r} is unknown; use level: or layer:")
        names = matching(glob, modules, "module")
        found, problems = [], []
        for name in names:
            kind = role or ("layer" if is_dense(modules[name]) else "level")
            if getattr(config, kind) is None:
                problems.append(f"{name}: AdapterConfig({kind}=None) puts no prompts at {kind}s")
                continue
            site = (
                _layer_site(name, modules, traces, f"named by {pattern!r}")
                if kind == "layer"
                else _level_site(name, traces, f"named by {pattern!r}")
            )
            if isinstance(site, str):
                problems.append(f"{name}: {site}")
            else:
                found.append(site)
        if not found:
            raise SiteError(
                f"site {pattern!r} matches {len(names)} modules and none can be used: "
                + "; ".join(problems[:5])
            )
        chosen.update({(site.role, site.name): site for site in found})
    order = {"level": 0, "layer": 1}
    return sorted(chosen.values(), key=lambda s: (order[s.role], traces.base.calls[s.name][0].end))
