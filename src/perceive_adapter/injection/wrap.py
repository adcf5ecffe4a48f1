"""``wrap``: from a trained restoration network to one that perceives."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, Union

import torch
from torch import nn
from typing_extensions import Unpack

from perceive_adapter.config import AdapterConfig
from perceive_adapter.errors import (
    AdapterMismatchError,
    BackboneError,
    CheckpointError,
    ConfigError,
)
from perceive_adapter.hub import HubOptions, check_options
from perceive_adapter.injection.checkpoint import (
    AdapterFile,
    load_unfrozen,
    read_adapter,
    resolve_saved,
)
from perceive_adapter.injection.discovery import plan_sites
from perceive_adapter.injection.injector import PromptInjector, check_backbone, release_lost
from perceive_adapter.injection.model import PerceiveModel
from perceive_adapter.injection.perception import ValueRange, ValueRangeLike
from perceive_adapter.injection.probe import image_argument
from perceive_adapter.injection.semantic import SemanticGuidance
from perceive_adapter.injection.steering import Steering, check_sources, widths
from perceive_adapter.perceiver.bundled import BUNDLED, PERCEIVE_TINY
from perceive_adapter.perceiver.quality import QualityPerceiver
from perceive_adapter.weights import fingerprint

__all__ = ["wrap"]

PerceiverLike: TypeAlias = Union[QualityPerceiver, str, "os.PathLike[str]", Literal[False], None]


@torch.inference_mode(False)  # what is made there could not be trained, nor tried by a backward
def wrap(
    backbone: nn.Module,
    pretrained: str | os.PathLike[str] | None = None,
    *,
    sites: str | Sequence[str] | None = None,
    config: AdapterConfig | None = None,
    perceiver: PerceiverLike = None,
    example: Any = None,
    image_arg: int | str | None = None,
    value_range: ValueRangeLike | None = None,
    semantic_weights: str | os.PathLike[str] | None = None,
    is_trainable: bool | None = None,
    **hub_options: Unpack[HubOptions],
) -> PerceiveModel:
    """Plug perception into a trained restoration network.

    The backbone is frozen and hooked, not changed: until it is trained, the result gives what the
    backbone gives, bit for bit. Everything is validated before the backbone is touched.

    Args:
        backbone: any module from degraded to restored image.
        pretrained: folder of a saved adapter, or its Hub repository, ``user/repo`` or
            ``user/repo@revision``; None makes a new one. A saved one may be put around a backbone
            on the meta device, which gets its weights afterwards:
            ``model.backbone.load_state_dict(weights, assign=True)``.
        sites: dotted module names or globs, see :func:`~perceive_adapter.plan_sites`; None
            discovers them within the parameter budget.
        config: kinds of prompt modules, rank, sources, budget. Only for a new adapter.
        perceiver: what steers the prompts besides the compact features: a
            :class:`~perceive_adapter.QualityPerceiver`, which is frozen and becomes a part of the
            model, moved and cast with it, a folder or a Hub repository; False for none. None is the
            bundled ``perceive-tiny`` where ``config`` names no sources and the backbone's images
            are RGB or gray, and for a saved adapter the one that it was trained with.
        example: input for the dry run, where (1, C, 64, 64) does not fit: an image (1, C, H, W),
            or a tuple or mapping of all arguments. A saved adapter needs none.
        image_arg: position or keyword of the image among the backbone's arguments; None is the
            first, or that of the saved adapter.
        value_range: of the backbone's images: ``(low, high)``, or ``(mean, std)`` as two
            sequences; None is (0, 1), or that of the saved adapter.
        semantic_weights: where the weights of a saved adapter's semantic model are, if not where
            they were when it was trained.
        is_trainable: whether the adapter trains; None: a new one does, a saved one does not.
        **hub_options: of the Hub repository of a saved adapter, or else of ``perceiver``:
            ``revision``, ``token``, ``cache_dir``, ``local_files_only``. The perceiver that a saved
            adapter names is read by them too, but for the revision.

    Returns:
        The wrapped model, on the backbone's device and in its mode.

    Raises:
        BackboneError: the backbone cannot be run, is compiled, is wrapped already, or has an
            argument that the wrapped model takes for itself.
        SiteError: no site matches, the layout of a named one is ambiguous, or the smallest adapter
            is over the budget.
        ConfigError: arguments that contradict each other.
        ImageError: the example is no floating-point image.
        CheckpointError: the saved adapter is missing, damaged, of another backbone, or steered by
            something else than is here.

    Example:
        >>> body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1)]
        >>> model = wrap(nn.Sequential(*body))
        >>> model.print_trainable_parameters()
        trainable: ... level and 2 layer sites
    """
    release_lost(backbone)
    check_backbone(backbone, without_weights=pretrained is not None)
    _check_arguments(backbone)
    named = perceiver if isinstance(perceiver, (str, os.PathLike)) else None
    check_options(hub_options, "wrap", pretrained or named)
    values = None if value_range is None else ValueRange.of(value_range)
    argument = None if image_arg is None else image_argument(backbone, image_arg)
    if pretrained is not None:
        if sites is not None or config is not None:
            raise ConfigError(
                "a saved adapter brings its own sites and config; leave out sites= and config=, "
                "or leave out the adapter"
            )
        file = read_adapter(pretrained, backbone, **hub_options)
        steering = _saved_steering(file, perceiver, semantic_weights, hub_options)
        return _load(backbone, file, argument, values, bool(is_trainable), steering)
    if semantic_weights is not None:
        raise ConfigError(
            "semantic_weights= is for a saved adapter; name those of a new one in "
            "config=AdapterConfig(semantic=..., semantic_weights=...)"
        )
    if config is not None and not isinstance(config, AdapterConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}; expected an AdapterConfig, such as "
            "AdapterConfig(rank=4)"
        )
    config = config or AdapterConfig()
    if config.semantic_weights is not None:  # to be found from another folder too
        config = dataclasses.replace(
            config, semantic_weights=os.path.abspath(config.semantic_weights)
        )
    by_default = perceiver is None and config.sources is None
    if by_default:
        perceiver = PERCEIVE_TINY
    found = _load_perceiver(perceiver, hub_options)
    semantic = _build_semantic(config)
    given, config = config, _with_sources(config, widths(found, semantic))
    position = 0 if image_arg is None else image_arg
    plan_with = functools.partial(
        plan_sites, backbone, sites=sites, example=example, image_arg=position
    )
    plan = plan_with(config=config)
    if by_default and plan.image_channels not in (1, 3):  # which the perceiver cannot see
        found = perceiver = None
        config = _with_sources(given, widths(found, semantic))
        plan = plan_with(config=config)
    if plan.image_channels not in (1, 3) and (found is not None or semantic is not None):
        raise ConfigError(
            f"the backbone's images have {plan.image_channels} channels, and a perceiver or a "
            "semantic model sees gray and RGB images alone; leave it out, or name sources that you "
            "will give with each image: perceiver=False, config=AdapterConfig(sources=...)"
        )
    with torch.device("cpu"):  # whatever torch's default device is
        injector = PromptInjector(plan, config)
    return _assemble(
        backbone,
        injector,
        is_trainable is not False,
        Steering(found, _name_of(perceiver, hub_options.get("revision")), semantic),
        argument or image_argument(backbone, 0),
        values or ValueRange(),
    )


def _check_arguments(backbone: nn.Module) -> None:
    """Raise if the model takes for itself what the backbone's own arguments are called.

    Raises:
        BackboneError: an argument has one of these names.
    """
    names = inspect.signature(backbone.forward).parameters
    if taken := [name for name in ("perception", "adapter_names") if name in names]:
        raise BackboneError(
            f"the backbone has an argument {taken[0]!r} of its own, and the wrapped model one of "
            "that name, which tells what is perceived; wrap a module that takes it by another name "
            "and passes it on"
        )


def _load(
    backbone: nn.Module,
    file: AdapterFile,
    image_arg: tuple[int | None, str | None] | None,
    value_range: ValueRange | None,
    is_trainable: bool,
    steering: Steering,
) -> PerceiveModel:
    """Build the model of a saved adapter, which knows what is not given."""
    saved = file.record
    model = _assemble(
        backbone,
        file.injector,
        is_trainable,
        steering,
        resolve_saved("image_arg", image_arg, (saved.image_position, saved.image_name)),
        resolve_saved("value_range", value_range, saved.value_range),
    )
    try:
        load_unfrozen(model, file, is_trainable=is_trainable)
    except BaseException:
        model.unwrap()
        raise
    return model


def _saved_steering(
    file: AdapterFile,
    perceiver: PerceiverLike,
    semantic_weights: str | os.PathLike[str] | None,
    options: HubOptions,
) -> Steering:
    """Load the perceiver and the semantic model that a saved adapter was trained with."""
    found, name = _saved_perceiver(file, perceiver, options)
    semantic, semantic_print = _saved_semantic(file, semantic_weights)
    saved = file.record.perceiver
    own = None if saved is None else saved.fingerprint
    return Steering(found, name, semantic, own, semantic_print)


def _saved_perceiver(
    file: AdapterFile, given: PerceiverLike, options: HubOptions
) -> tuple[QualityPerceiver | None, str | None]:
    """Load the perceiver of the saved fingerprint, and give its name."""
    saved = file.record.perceiver
    if saved is None:
        if given is not None and given is not False:
            raise ConfigError(
                f"{file.where} was trained without a perceiver, so perceiver= would steer nothing; "
                "leave it out"
            )
        return None, None
    state = "it is not here" if given is None else "another one was given"
    state = "perceiver=False leaves it out" if given is False else state
    if given is None and saved.name and not _is_lost(saved.name):
        given, state = saved.name, "another one is there now"
    own: Any = {name: value for name, value in options.items() if name != "revision"}
    found = _load_perceiver(given, own)
    if found is None or found.fingerprint() != saved.fingerprint:
        raise AdapterMismatchError(
            f"{file.where} is steered by the perceiver {f'{saved.name} ' if saved.name else ''}with"
            f" fingerprint {saved.fingerprint[:16]}, and {state}; give that one as perceiver=..."
        )
    return found, _name_of(given)


def _is_lost(name: str) -> bool:
    """Whether a perceiver was in a folder that is not there."""
    return os.path.isabs(name) and not os.path.isdir(name)


def _assemble(
    backbone: nn.Module,
    injector: PromptInjector,
    is_trainable: bool,
    steering: Steering,
    image_arg: tuple[int | None, str | None],
    value_range: ValueRange,
) -> PerceiveModel:
    """Build the model; nothing of the backbone has been touched before this."""
    channels = injector.plan.image_channels
    if len(value_range.mean) not in (1, channels):
        raise ConfigError(
            f"value_range has {len(value_range.mean)} means and stds, and the backbone's images "
            f"have {channels} channels: give one for each channel, or one for all"
        )
    like = next(backbone.parameters(), None)
    if like is not None and not like.is_meta:
        for module in (injector, steering.perceiver, steering.semantic):
            if module is not None:
                module.to(like.device)
    injector.requires_grad_(is_trainable)
    return PerceiveModel(backbone, injector, steering, image_arg=image_arg, value_range=value_range)


def _load_perceiver(perceiver: PerceiverLike, options: HubOptions) -> QualityPerceiver | None:
    """Return the perceiver that ``wrap`` was given, loaded where it is a name."""
    if perceiver is None or perceiver is False:
        return None
    if isinstance(perceiver, QualityPerceiver):
        return perceiver
    if perceiver == PERCEIVE_TINY:
        return copy.deepcopy(_default_perceiver())  # models may live on different devices
    if isinstance(perceiver, (str, os.PathLike)):
        return QualityPerceiver.from_pretrained(perceiver, **options)
    raise ConfigError(
        f"perceiver is a {type(perceiver).__name__}; expected a QualityPerceiver, a folder, a Hub "
        "repository, None or False"
    )


@functools.lru_cache(maxsize=1)
def _default_perceiver() -> QualityPerceiver:
    return QualityPerceiver.from_pretrained(PERCEIVE_TINY)


def _name_of(perceiver: PerceiverLike, revision: str | None = None) -> str | None:
    """By what to find a perceiver again, from whatever folder."""
    if not isinstance(perceiver, (str, os.PathLike)):
        return None
    name = os.fspath(perceiver)
    if perceiver in BUNDLED:
        return name
    if os.path.isdir(name):
        return os.path.abspath(name)
    return name if revision is None or "@" in name else f"{name}@{revision}"


def _build_semantic(config: AdapterConfig) -> SemanticGuidance | None:
    if config.semantic is None:
        return None
    return SemanticGuidance(config.semantic, config.semantic_weights)


def _saved_semantic(
    file: AdapterFile, weights: str | os.PathLike[str] | None
) -> tuple[SemanticGuidance | None, str | None]:
    """Load the semantic model that a saved adapter was trained with, and give its fingerprint.

    Args:
        file: the adapter; its config takes over ``weights``.
        weights: file in place of the one that was there when it was trained.
    """
    injector, saved = file.injector, file.record.semantic
    if weights is not None:
        if injector.config.semantic is None:
            raise ConfigError(
                f"{file.where} was trained without a semantic model, so semantic_weights= would "
                "steer nothing; leave it out"
            )
        injector.config = dataclasses.replace(
            injector.config, semantic_weights=os.path.abspath(weights)
        )
    try:
        semantic = _build_semantic(injector.config)
    except ConfigError as error:
        raise CheckpointError(f"{file.where}: {error}") from error
    here = None if semantic is None else fingerprint(semantic.tower)
    if saved is not None and here not in (None, saved):
        raise AdapterMismatchError(
            f"{file.where} is steered by {injector.config.semantic} with weights of the "
            f"fingerprint {saved[:16]}, and others are here; give the safetensors file that they "
            "are in as semantic_weights="
        )
    return semantic, here


def _with_sources(config: AdapterConfig, told: Mapping[str, int]) -> AdapterConfig:
    """Name what steers the prompts, where the config does not.

    The perceiver's embedding is named where nothing else tells what is wrong with an image. Where
    presence and severity are told, it adds little on images like those of the training and
    misleads on others (`benchmarks/quality.py`, row "with the embedding").
    """
    if config.sources is not None:
        check_sources(config.sources, told)
        return config
    sources = {"compact": config.compact_dim} if config.compact_dim else {}
    sources |= {
        name: width
        for name, width in told.items()
        if name != "embedding" or "degradations" not in told
    }
    if not sources:
        raise ConfigError(
            "nothing steers the prompts: compact_dim=0, no perceiver and no semantic model; name "
            "the sources of the perceptions that you will give, AdapterConfig(sources=...)"
        )
    return dataclasses.replace(config, sources=sources)
