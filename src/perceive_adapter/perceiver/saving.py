"""How a perceiver is saved, loaded and identified."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from perceive_adapter import hub
from perceive_adapter._version import __version__
from perceive_adapter.config import from_dict, to_dict
from perceive_adapter.errors import CheckpointError, ConfigError
from perceive_adapter.folders import figures_table, save_folder
from perceive_adapter.perceiver.bundled import CONFIG_NAME, TENSORS_NAME, locate
from perceive_adapter.perceiver.config import PerceiverConfig
from perceive_adapter.perceiver.heads import DegradationHeads
from perceive_adapter.perceiver.prompts import TierPrompts
from perceive_adapter.perceiver.towers import ClipTowers, build_clip

if TYPE_CHECKING:
    from perceive_adapter.perceiver.quality import QualityPerceiver

__all__ = [
    "Loaded",
    "check_probe",
    "fingerprint",
    "load",
    "push",
    "save",
]

_PROBE_COSINE = 0.999
_CARD = """---
library_name: perceive_adapter
pipeline_tag: image-classification
tags:
- image-quality-assessment
- image-restoration
- clip
---
# Quality perceiver

Tells the quality tier of an image: learnable prompts on a frozen CLIP, as in stage 1 of
[Perceive-IR](https://arxiv.org/abs/2408.15994). Saved by perceive_adapter {version}.

- CLIP: {clip}, with {weights}.
- Degradations told, each with its severity: {degradations}.
- Prompts: {length} context vectors for each tier; they {state}.
- Views: at most {views} crops of an image, at native resolution.
- Score: tier index times tier probability, summed and scaled to [0, 1]; higher is better.

| index | tier | word that its prompt started from |
|---|---|---|
{rows}

```python
from perceive_adapter import QualityPerceiver

perceiver = QualityPerceiver.from_pretrained("path/to/this/folder")
perceived = perceiver(image)  # (B, 3, H, W), RGB in [0, 1]
perceived.score, perceived.tiers
```

{figures}
"""


class Loaded(NamedTuple):
    """The parts of a loaded perceiver, its embedding of the probe image, and where it came from."""

    parts: tuple[ClipTowers, TierPrompts, PerceiverConfig, DegradationHeads | None]
    probe: Tensor
    where: str


def save(
    perceiver: "QualityPerceiver",
    folder: str | os.PathLike[str],
    figures: Mapping[str, float | str] | None = None,
) -> Path:
    """Write a perceiver's folder; the towers only where open_clip cannot name their weights."""
    tensors = _prefixed("prompts", perceiver.prompts)
    if perceiver.config.pretrained is None:
        tensors |= _prefixed("towers", perceiver.towers)
    if perceiver.heads is not None:
        tensors |= _prefixed("heads", perceiver.heads)
    return save_folder(
        folder,
        config=to_dict(perceiver.config) | {"perceive_adapter_version": __version__},
        tensors=tensors | {"probe": _probe(perceiver)},
        config_name=CONFIG_NAME,
        tensors_name=TENSORS_NAME,
        card=_card(perceiver, figures),
    )


def push(
    perceiver: "QualityPerceiver",
    repo_id: str,
    figures: Mapping[str, float | str] | None = None,
    **options: Unpack[hub.PushOptions],
) -> str:
    """Save a perceiver and upload it."""
    with tempfile.TemporaryDirectory() as folder:
        save(perceiver, folder, figures)
        return hub.push_folder(folder, repo_id, **options)


def load(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> Loaded:
    """Build the parts that a folder or a Hub repository describes.

    Raises:
        CheckpointError: it is missing or damaged, or its parts do not fit each other.
    """
    folder, raw, tensors = hub.load(
        locate(name_or_path),
        CONFIG_NAME,
        TENSORS_NAME,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    raw.pop("perceive_adapter_version", None)
    config = from_dict(PerceiverConfig, raw, f"{CONFIG_NAME} in {str(folder)!r}")
    where = f"{TENSORS_NAME} in {str(folder)!r}"
    probe = tensors.pop("probe", None)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            towers, prompts = _build_parts(config, tensors)
            heads = _saved_heads(config, towers.embedding_dim, tensors)
    except (ConfigError, RuntimeError) as error:
        raise CheckpointError(
            f"{where} does not fit its {CONFIG_NAME}: {error} Save the perceiver again."
        ) from error
    if tensors or probe is None or probe.shape != (towers.embedding_dim,):
        raise CheckpointError(
            f"{where} holds a probe of shape {tuple(probe.shape) if probe is not None else None} "
            f"and unknown tensors {sorted(tensors)}: expected a probe of shape "
            f"({towers.embedding_dim},) and nothing unknown. Save the perceiver again."
        )
    return Loaded((towers, prompts, config, heads), probe, where)


def check_probe(perceiver: "QualityPerceiver", loaded: Loaded) -> None:
    """Check that the image tower, its weights and its preprocessing are those of the save.

    Raises:
        CheckpointError: the probe image's embedding is another one.
    """
    cosine = float(_probe(perceiver).float() @ loaded.probe.float())
    if not cosine >= _PROBE_COSINE:
        clip, tag = perceiver.config.clip, perceiver.config.pretrained
        raise CheckpointError(
            f"{loaded.where} was saved with another CLIP than {clip!r} with weights {tag!r} is "
            f"here: a test image's embeddings have the cosine {cosine:.4f}, expected at least "
            f"{_PROBE_COSINE}. Install the version of open_clip_torch that it was saved with, or "
            "train the prompts again."
        )


def fingerprint(perceiver: "QualityPerceiver") -> str:
    """Hash what decides a perceiver's score."""
    digest = hashlib.sha256()
    settings = {
        "clip": to_dict(perceiver.config)["clip"],
        "tiers": perceiver.tiers,
        "degradations": perceiver.degradations,
        "views": perceiver.config.views,
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(perceiver.state_dict().items()):
        if name != "prompts.initial":
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            values = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _build_parts(
    config: PerceiverConfig, tensors: dict[str, Tensor]
) -> tuple[ClipTowers, TierPrompts]:
    """Build towers and prompts, and move their values out of ``tensors``."""
    own_weights = config.pretrained is None
    towers = _saved_towers(config, tensors) if own_weights else _build_towers(config)
    tiers, length, width = len(config.tiers), *towers.text.positions.shape
    with torch.device("meta"):
        prompts = TierPrompts(
            torch.empty(tiers, length - 2, width), torch.empty(width), torch.empty(width)
        )
    prompts.load_state_dict(_take("prompts", tensors), assign=True)
    if not own_weights:
        towers.to(prompts.context.dtype)
    for module in (prompts, towers):
        _check_weights(module)
    return towers, prompts


def _build_towers(config: PerceiverConfig) -> ClipTowers:
    clip = build_clip(config.clip, config.pretrained)
    return ClipTowers(clip, config.context_length + 2, config.vocabulary)


def _saved_heads(
    config: PerceiverConfig, embedding_dim: int, tensors: dict[str, Tensor]
) -> DegradationHeads | None:
    if not config.degradations:
        return None
    with torch.device("meta"):
        heads = DegradationHeads(embedding_dim, config.degradations)
    heads.load_state_dict(_take("heads", tensors), assign=True)
    _check_weights(heads)
    return heads


def _saved_towers(config: PerceiverConfig, tensors: dict[str, Tensor]) -> ClipTowers:
    """Build the towers around saved weights, allocating nothing before all shapes are checked."""
    import open_clip  # noqa: F401  # torch 2.6 cannot import it where tensors are meta

    weights = _take("towers", tensors)
    with torch.device("meta"):
        towers = _build_towers(config)
    towers.load_state_dict(weights, assign=True)
    if any(tensor.is_meta for tensor in (*towers.parameters(), *towers.buffers())):
        towers = _build_towers(config)  # some timm towers compute buffers that no file holds
        towers.load_state_dict(weights)
    return towers


def _probe(perceiver: "QualityPerceiver") -> Tensor:
    """Embed a fixed image with smooth, sharp and coloured parts, to (E,)."""
    height, width = perceiver.towers.image_size
    device = perceiver.prompts.context.device
    down, along = (
        torch.linspace(0, 1, side, device=device, dtype=torch.float32) for side in (height, width)
    )
    y, x = down.reshape(-1, 1).expand(height, width), along.expand(height, width)
    image = torch.stack([x, y, ((8 * x).floor() + (8 * y).floor()) % 2]).unsqueeze(0)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return perceiver.embed(image)[0]


def _prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def _take(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move the tensors of one module out of ``tensors``."""
    names = [name for name in tensors if name.startswith(f"{prefix}.")]
    return {name.removeprefix(f"{prefix}."): tensors.pop(name) for name in names}


def _check_weights(module: nn.Module) -> None:
    dtypes = {parameter.dtype for parameter in module.parameters()}
    if len(dtypes) != 1 or not all(dtype.is_floating_point for dtype in dtypes):
        names = ", ".join(sorted(map(str, dtypes)))
        raise ConfigError(f"its weights have dtypes {names}: expected one floating point dtype.")
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            raise ConfigError(f"its {name} has NaN or infinite values: expected finite ones.")


def _card(perceiver: "QualityPerceiver", figures: Mapping[str, float | str] | None) -> str:
    config = perceiver.config
    clip = config.clip if isinstance(config.clip, str) else "a custom architecture"
    if config.pretrained is None:
        weights = "its own weights, which are in this repository"
    else:
        weights = f"open_clip's weights `{config.pretrained}`, which are not in this repository"
    state = "were trained" if perceiver.trained else "were **not trained**: its scores mean nothing"
    rows = "\n".join(
        f"| {index} | {tier} | {word} |"
        for index, (tier, word) in enumerate(zip(config.tiers, config.words, strict=True))
    )
    return _CARD.format(
        version=__version__,
        clip=clip,
        weights=weights,
        degradations=", ".join(config.degradations).replace("_", " ") or "none",
        length=config.context_length,
        state=state,
        views=config.views,
        rows=rows,
        figures=figures_table(figures),
    )
