"""Adapters on disk: a config, safetensors and a model card, loaded strictly."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Unpack

from perceive_adapter import hub
from perceive_adapter._version import __version__
from perceive_adapter.config import AdapterConfig, from_dict, to_dict
from perceive_adapter.errors import (
    AdapterMismatchError,
    CheckpointError,
    ConfigError,
    SiteError,
)
from perceive_adapter.folders import figures_table, save_folder
from perceive_adapter.injection.freezing import hold_in_eval
from perceive_adapter.injection.injector import PromptInjector, modules_at
from perceive_adapter.injection.perception import ValueRange
from perceive_adapter.injection.plan import Site, SitePlan
from perceive_adapter.warning import warn
from perceive_adapter.weights import fingerprint, full_tensor, is_sharded

if TYPE_CHECKING:
    from perceive_adapter.injection.model import PerceiveModel

__all__ = [
    "AdapterFile",
    "load_unfrozen",
    "read_adapter",
    "read_beside",
    "resolve_saved",
    "save_adapter",
]

FORMAT_VERSION = 1
CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
BACKBONE_PREFIX = "backbone."
INJECTOR_PREFIX = "injector."


@dataclass(frozen=True)
class BackboneRecord:
    """Which backbone an adapter was made for."""

    name: str
    fingerprint: str
    parameters: int


@dataclass(frozen=True)
class PerceiverRecord:
    """Which perceiver steered it; the name is what it was loaded by, if by a name."""

    fingerprint: str
    name: str | None = None


@dataclass(frozen=True)
class AdapterRecord:
    """What ``adapter_config.json`` holds."""

    format_version: int
    package_version: str
    config: AdapterConfig
    plan: SitePlan
    backbone: BackboneRecord
    perceiver: PerceiverRecord | None
    value_range: ValueRange
    image_position: int | None
    image_name: str | None
    semantic: str | None = None
    """Fingerprint of the semantic model, whose name is in ``config``."""

    def __post_init__(self) -> None:
        if (self.image_position or 0) < 0 or (self.image_position, self.image_name) == (None, None):
            raise ConfigError(
                f"the image argument has position {self.image_position} and name "
                f"{self.image_name!r}; expected a position from 0, or a name"
            )


@dataclass(frozen=True)
class AdapterFile:
    """A saved adapter, read and checked, and not yet attached to anything."""

    record: AdapterRecord
    injector: PromptInjector
    unfrozen: Mapping[str, Tensor]
    where: str


def save_adapter(
    model: PerceiveModel,
    folder: str | os.PathLike[str],
    figures: Mapping[str, float | str] | None = None,
    *,
    elsewhere: bool = False,
) -> bool:
    """See :meth:`PerceiveModel.save_pretrained`; whoever calls this has the model to itself.

    Args:
        model: wrapped.
        folder: made if it does not exist.
        figures: what was measured, for the model card.
        elsewhere: whether it is to be read on other machines; paths of this one are left out.

    Returns:
        Whether it was written: of the processes of a sharded model, by the first one alone.
    """
    frozen, config = model.frozen, model.injector.config
    frozen.check_kept()
    tower, perceiver_name = model.perceiver_fingerprint, model.perceiver_name
    if elsewhere:
        config = replace(config, semantic_weights=None)
        perceiver_name = None if os.path.isabs(perceiver_name or "") else perceiver_name
    position, name = model.image_arg
    record = AdapterRecord(
        format_version=FORMAT_VERSION,
        package_version=__version__,
        config=config,
        plan=model.sites,
        backbone=BackboneRecord(
            type(model.backbone).__name__,
            fingerprint(model.backbone, frozen.originals, leave_out=model.sites.rewritten),
            model.sites.backbone_parameters,
        ),
        perceiver=None if tower is None else PerceiverRecord(tower, perceiver_name),
        value_range=model.value_range,
        image_position=position,
        image_name=name,
        semantic=model.semantic_fingerprint,
    )
    tensors = {INJECTOR_PREFIX + k: v for k, v in model.injector.state_dict().items()}
    tensors |= {BACKBONE_PREFIX + name: value for name, value in frozen.changed().items()}
    sharded = any(map(is_sharded, tensors.values()))
    # Every process must gather.
    tensors = {name: full_tensor(value) for name, value in tensors.items()}
    if sharded and dist.get_rank() != 0:
        return False
    save_folder(
        folder,
        config=to_dict(record),
        tensors=tensors,
        config_name=CONFIG_NAME,
        tensors_name=TENSORS_NAME,
        card=_card(model, record, figures),
    )
    return True


def read_adapter(
    name_or_path: str | os.PathLike[str],
    backbone: nn.Module,
    originals: Mapping[str, Tensor] | None = None,
    **options: Unpack[hub.HubOptions],
) -> AdapterFile:
    """Read a saved adapter and check that it is sound and fits ``backbone``; touch nothing.

    Args:
        name_or_path: folder or Hub repository.
        backbone: that it is for.
        originals: values of the backbone's weights from before its own training, by name.
        **options: of the Hub repository.

    Raises:
        CheckpointError: missing, damaged, of an unknown format, or with other tensors than its
            config describes.
        AdapterMismatchError: it belongs to a backbone with other modules or shapes.
    """
    where = str(name_or_path)
    _, data, tensors = hub.load(name_or_path, CONFIG_NAME, TENSORS_NAME, **options)
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        remedy = "upgrade perceive_adapter" if newer else "is it an adapter of perceive_adapter?"
        raise CheckpointError(
            f"{where}: {CONFIG_NAME} has format_version {version!r}, and perceive_adapter "
            f"{__version__} reads {FORMAT_VERSION}; {remedy}"
        )
    record = from_dict(AdapterRecord, data, f"{where}: {CONFIG_NAME}")
    unfrozen = _with_prefix(tensors, BACKBONE_PREFIX)
    own = _with_prefix(tensors, INJECTOR_PREFIX)
    prefixes = (BACKBONE_PREFIX, INJECTOR_PREFIX)
    if extra := sorted(name for name in tensors if not name.startswith(prefixes)):
        raise CheckpointError(
            f"{where}: {TENSORS_NAME} holds tensors of no known part: {', '.join(extra[:5])}"
        )
    _check_backbone(record, unfrozen, backbone, originals, where)
    return AdapterFile(record, _rebuild(record, own, where), unfrozen, where)


def read_beside(
    model: PerceiveModel,
    name_or_path: str | os.PathLike[str],
    *,
    like: PromptInjector | None = None,
    **options: Unpack[hub.HubOptions],
) -> AdapterFile:
    """Read a saved adapter that is to share a wrapped model with its own adapters.

    Args:
        model: it is not changed.
        name_or_path: folder or Hub repository.
        like: adapter that must have the same sites and config, but for what it treats.
        **options: of the Hub repository.

    Raises:
        CheckpointError: missing, damaged, or it does not fit the model.
    """
    file = read_adapter(name_or_path, model.backbone, model.frozen.originals, **options)
    record = file.record
    steers = None if record.perceiver is None else record.perceiver.fingerprint
    position = (record.image_position, record.image_name)
    differs = {
        "is steered by another perceiver": steers not in (None, model.perceiver_fingerprint),
        "is steered by another semantic model": record.config.semantic is not None
        and (record.config.semantic, record.semantic or model.semantic_fingerprint)
        != (model.injector.config.semantic, model.semantic_fingerprint),
        "takes another value range": record.value_range != model.value_range,
        "takes the image as another argument": position != model.image_arg,
        "trained parameters of the backbone, which adapters share": bool(file.unfrozen),
        "has other sites": like is not None and _unreasoned(record.plan) != _unreasoned(like.plan),
        "has another config": like is not None
        and _comparable(record.config) != _comparable(like.config),
    }
    if reasons := [reason for reason, differ in differs.items() if differ]:
        raise AdapterMismatchError(
            f"{file.where} {' and '.join(reasons)}: wrap another copy of the backbone with it"
        )
    return file


def _comparable(config: AdapterConfig) -> AdapterConfig:
    """Leave out what may differ between weights that take each other's place."""
    return replace(config, treats=None, semantic_weights=None)


def _unreasoned(plan: SitePlan) -> list[Site]:
    return [replace(site, reason="") for site in plan]


def load_unfrozen(model: PerceiveModel, file: AdapterFile, *, is_trainable: bool) -> None:
    """Put the backbone weights that were trained with an adapter into the backbone."""
    model.frozen.keep(file.unfrozen)
    with torch.no_grad():
        for name, value in file.unfrozen.items():
            parameter = model.backbone.get_parameter(name)
            parameter.copy_(value)
            parameter.requires_grad_(is_trainable)
    hold_in_eval(model.backbone, model.sites.eval_only, training=model.training)


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _rebuild(record: AdapterRecord, tensors: Mapping[str, Tensor], where: str) -> PromptInjector:
    """Build the injector on the meta device first: a hostile config costs no memory."""
    try:
        with torch.device("meta"):
            injector = PromptInjector(record.plan, record.config)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: {CONFIG_NAME} describes no adapter that can be built: {error}"
        ) from error
    expected = injector.state_dict()
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    wrong = [
        f"{name} is {tuple(tensors[name].shape)} of {tensors[name].dtype}, expected "
        f"{tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors
        and (tensors[name].shape != value.shape or not tensors[name].is_floating_point())
    ]
    if missing or extra or wrong:
        raise CheckpointError(
            f"{where}: {TENSORS_NAME} does not hold what {CONFIG_NAME} describes: "
            f"{len(missing)} missing {missing[:3]}, {len(extra)} unexpected {extra[:3]}, "
            f"{len(wrong)} of another shape or dtype {wrong[:3]}"
        )
    if lost := [name for name in expected if not tensors[name].isfinite().all()]:
        raise CheckpointError(
            f"{where}: {TENSORS_NAME} has NaN or infinite values in {len(lost)} of its tensors, "
            f"such as {lost[0]}: expected finite ones. The training diverged; use a checkpoint "
            "from before, or train again with a lower learning rate"
        )
    injector.load_state_dict(dict(tensors), assign=True)
    return injector


def _check_backbone(
    record: AdapterRecord,
    unfrozen: Mapping[str, Tensor],
    backbone: nn.Module,
    originals: Mapping[str, Tensor] | None,
    where: str,
) -> None:
    kind = type(backbone).__name__
    parameters = dict(backbone.named_parameters())
    other = [
        name
        for name, value in unfrozen.items()
        if name not in parameters or parameters[name].shape != value.shape
    ]
    try:
        modules_at(record.plan, backbone)
        count = sum(parameter.numel() for parameter in backbone.parameters())
        if count != record.backbone.parameters:
            raise SiteError(f"it has {count:,} parameters")
        if other:
            raise SiteError(f"it changes parameters that are not there: {', '.join(other[:5])}")
    except SiteError as error:
        raise AdapterMismatchError(
            f"{where} was made for a {record.backbone.name} of {record.backbone.parameters:,} "
            f"parameters and does not fit this {kind}: {error}"
        ) from error
    if any(parameter.is_meta for parameter in parameters.values()):
        if unfrozen:
            raise AdapterMismatchError(
                f"{where} changes weights of the {kind}, which has none yet: load them first"
            )
        return
    found = fingerprint(backbone, originals, leave_out=record.plan.rewritten)
    if found != record.backbone.fingerprint:
        warn(
            f"{where} was trained on a {record.backbone.name} with other weights than this "
            f"{kind}; it loads, since the shapes agree, and may restore badly"
        )


def resolve_saved(name: str, given: Any, saved: Any) -> Any:
    """Return the saved value, unless the caller asked for another one.

    Raises:
        ConfigError: a value is given, and is not the saved one.
    """
    if given not in (None, saved):
        raise ConfigError(
            f"{name}={given!r} contradicts the saved adapter's {saved!r}; leave it out"
        )
    return saved


def _card(
    model: PerceiveModel, record: AdapterRecord, figures: Mapping[str, float | str] | None
) -> str:
    plan = record.plan
    share = 100 * plan.parameters / max(plan.backbone_parameters, 1)
    steered = ", ".join(model.injector.encoder.sources)
    treats = ", ".join(model.status().treats or ["every image"])
    return f"""---
library_name: perceive_adapter
tags: [image-restoration, adapter]
---
# Adapter for {record.backbone.name}

A perceive_adapter adapter: prompt modules for a frozen `{record.backbone.name}` of
{plan.backbone_parameters:,} parameters, with {plan.parameters:,} of their own ({share:.1f} % of
that), steered by {steered}.

```python
from perceive_adapter import wrap

model = wrap(backbone, "path/to/this/folder")  # backbone: the same network, with its own weights
restored = model.restore("photo.jpg")
```

| | |
|---|---|
| format version | {record.format_version} |
| perceive_adapter | {record.package_version} |
| backbone fingerprint | `{record.backbone.fingerprint[:16]}` |
| level sites | {len(plan.of("level"))}, {record.config.level} |
| layer sites | {len(plan.of("layer"))}, {record.config.layer} |
| treats | {treats} |
| backbone parameters trained with it | {len(model.frozen.originals)} |

{figures_table(figures)}

## Sites
```
{plan}
```
"""
