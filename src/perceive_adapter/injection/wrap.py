"""``wrap``: from a trained restoration network to one that perceives."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, Union

import torch
from torch import nn

from perceive_adapter.config import AdapterConfig
from perceive_adapter.errors import AdapterMismatchError, CheckpointError, ConfigError
from perceive_adapter.injection.checkpoint import agree, load_unfrozen, read_adapter
from perceive_adapter.injection.discovery import plan_sites
from perceive_adapter.injection.injector import PromptInjector, check_backbone
from perceive_adapter.injection.model import PerceiveModel
from perceive_adapter.injection.perception import ValueRange
from perceive_adapter.injection.probe import image_argument
from perceive_adapter.injection.semantic import SemanticGuidance
from perceive_adapter.perceiver.quality import QualityPerceiver

__all__ = ["wrap"]

DEFAULT_PERCEIVER = "perceive-tiny"

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
    image_arg: int | str = 0,
    value_range: object = (0, 1),
    is_trainable: bool | None = None,
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
        perceiver: what steers the prompts besides the compact features, frozen: a
            :class:`~perceive_adapter.QualityPerceiver`, a folder or a Hub repository; False for
            none. None is the bundled ``perceive-tiny`` where ``config`` names no sources and the
            backbone's images are RGB or gray, and for a saved adapter the one that it was trained
            with.
        example: input for the dry run, where (1, C, 64, 64) does not fit: an image, or a tuple or
            mapping of all arguments.
        image_arg: position or keyword of the image among the backbone's arguments.
        value_range: of the backbone's images: ``(low, high)``, or ``(mean, std)`` as two
            sequences.
        is_trainable: whether the adapter trains; None: a new one does, a saved one does not.

    Returns:
        The wrapped model, on the backbone's device and in its mode.

    Raises:
        BackboneError: the backbone cannot be run, is compiled, or is wrapped already.
        SiteError: no site matches.
        ConfigError: arguments that contradict each other.
        CheckpointError: the saved adapter is missing, damaged, or of another backbone.

    Example:
        >>> body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1)]
        >>> model = wrap(nn.Sequential(*body))
        >>> model.print_trainable_parameters()
        trainable: ... level and 2 layer sites
    """
    check_backbone(backbone, without_weights=pretrained is not None)
    values = ValueRange.of(value_range)
    argument = image_argument(backbone, image_arg)
    if pretrained is not None:
        if sites is not None or config is not None:
            raise ConfigError(
                "a saved adapter brings its own sites and config; leave out sites= and config=, "
                "or leave out the adapter"
            )
        return _load(backbone, pretrained, perceiver, argument, values, bool(is_trainable))
    if config is not None and not isinstance(config, AdapterConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}; expected an AdapterConfig, such as "
            "AdapterConfig(rank=4)"
        )
    config = config or AdapterConfig()
    by_default = perceiver is None and config.sources is None
    if by_default:
        perceiver = DEFAULT_PERCEIVER
    found = _load_perceiver(perceiver)
    semantic = _build_semantic(config)
    given, config = config, _with_sources(config, found, semantic)
    where = {"sites": sites, "example": example, "image_arg": image_arg}
    plan = plan_sites(backbone, config=config, **where)
    if by_default and plan.image_channels not in (1, 3):  # which the perceiver cannot see
        found = perceiver = None
        config = _with_sources(given, found, semantic)
        plan = plan_sites(backbone, config=config, **where)
    if plan.image_channels not in (1, 3) and (found is not None or semantic is not None):
        raise ConfigError(
            f"the backbone's images have {plan.image_channels} channels, and a perceiver or a "
            "semantic model sees gray and RGB images alone; leave it out, or name sources that you "
            "will give with each image: perceiver=False, config=AdapterConfig(sources=...)"
        )
    return _assemble(
        backbone,
        PromptInjector(plan, config),
        is_trainable is not False,
        perceiver=found,
        perceiver_name=_name_of(perceiver),
        semantic=semantic,
        image_arg=argument,
        value_range=values,
    )


def _load(
    backbone: nn.Module,
    pretrained: str | os.PathLike[str],
    perceiver: PerceiverLike,
    image_arg: tuple[int | None, str | None],
    value_range: ValueRange,
    is_trainable: bool,
) -> PerceiveModel:
    file = read_adapter(pretrained, backbone)
    record = file.record
    found = name = None
    if record.perceiver is None:
        if perceiver is not None and perceiver is not False:
            raise ConfigError(
                f"{pretrained} was trained without a perceiver, so perceiver= would steer nothing; "
                "leave it out"
            )
    else:
        given = record.perceiver.name if perceiver is None else perceiver
        found, name = _load_perceiver(given or None), _name_of(given or None)
        if found is None or found.fingerprint() != record.perceiver.fingerprint:
            raise AdapterMismatchError(
                f"{pretrained} is steered by the perceiver {record.perceiver.name or ''} with "
                f"fingerprint {record.perceiver.fingerprint[:16]}, and "
                f"{'none' if found is None else 'another one'} was given; give that one as "
                "perceiver=..."
            )
    model = _assemble(
        backbone,
        file.injector,
        is_trainable,
        perceiver=found,
        perceiver_name=name,
        semantic=_saved_semantic(record.config, pretrained),
        image_arg=agree(
            "image_arg",
            image_arg,
            image_argument(backbone, 0),
            (record.image_position, record.image_name),
        ),
        value_range=agree("value_range", value_range, ValueRange(), record.value_range),
    )
    load_unfrozen(model, file, is_trainable=is_trainable)
    return model


def _assemble(
    backbone: nn.Module, injector: PromptInjector, is_trainable: bool, **options: Any
) -> PerceiveModel:
    """Build the model; nothing of the backbone has been touched before this."""
    channels, values = injector.plan.image_channels, options["value_range"]
    if len(values.mean) not in (1, channels):
        raise ConfigError(
            f"value_range has {len(values.mean)} means and stds, and the backbone's images have "
            f"{channels} channels: give one for each channel, or one for all"
        )
    like = next(backbone.parameters(), None)
    if like is not None and not like.is_meta:
        for module in (injector, options["perceiver"], options["semantic"]):
            if module is not None:
                module.to(like.device)
    injector.requires_grad_(is_trainable)
    return PerceiveModel(backbone, injector, **options)


def _load_perceiver(perceiver: PerceiverLike) -> QualityPerceiver | None:
    """Return the perceiver that ``wrap`` was given, loaded where it is a name."""
    if perceiver is None or perceiver is False:
        return None
    if isinstance(perceiver, QualityPerceiver):
        return perceiver
    if perceiver == DEFAULT_PERCEIVER:
        return copy.deepcopy(_default_perceiver())  # models may live on different devices
    if isinstance(perceiver, (str, os.PathLike)):
        return QualityPerceiver.from_pretrained(perceiver)
    raise ConfigError(
        f"perceiver is a {type(perceiver).__name__}; expected a QualityPerceiver, a folder, a Hub "
        "repository, None or False"
    )


@functools.lru_cache(maxsize=1)
def _default_perceiver() -> QualityPerceiver:
    return QualityPerceiver.from_pretrained(DEFAULT_PERCEIVER)


def _name_of(perceiver: PerceiverLike) -> str | None:
    return os.fspath(perceiver) if isinstance(perceiver, (str, os.PathLike)) else None


def _build_semantic(config: AdapterConfig) -> SemanticGuidance | None:
    if config.semantic is None:
        return None
    return SemanticGuidance(config.semantic, config.semantic_weights)


def _saved_semantic(
    config: AdapterConfig, pretrained: str | os.PathLike[str]
) -> SemanticGuidance | None:
    try:
        return _build_semantic(config)
    except ConfigError as error:
        raise CheckpointError(f"{pretrained}: {error}") from error


def _with_sources(
    config: AdapterConfig, perceiver: QualityPerceiver | None, semantic: SemanticGuidance | None
) -> AdapterConfig:
    """Name what steers the prompts, where the config does not.

    The perceiver's embedding is named where nothing else tells what is wrong with an image. Where
    presence and severity are told, it adds little on images like those of the training and
    misleads on others (`benchmarks/quality.py`, row "with the embedding").
    """
    if config.sources is not None:
        return config
    sources = {"compact": config.compact_dim} if config.compact_dim else {}
    if perceiver is not None:
        sources["tiers"] = len(perceiver.tiers)
        if kinds := len(perceiver.degradations):
            sources |= {"degradations": kinds, "severity": kinds}
        else:
            sources["embedding"] = perceiver.embedding_dim
    if semantic is not None:
        sources["semantic"] = semantic.dim
    if not sources:
        raise ConfigError(
            "nothing steers the prompts: compact_dim=0, no perceiver and no semantic model; name "
            "the sources of the perceptions that you will give, AdapterConfig(sources=...)"
        )
    return dataclasses.replace(config, sources=sources)
