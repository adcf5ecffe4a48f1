"""Which degradations an adapter should treat: those that its backbone cannot undo by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from perceive_adapter.data.restoration import RestorationData, RestorationSample
from perceive_adapter.errors import UnseenTaskWarning
from perceive_adapter.injection.condition import strength
from perceive_adapter.injection.model import PerceiveModel
from perceive_adapter.losses.difficulty import psnr
from perceive_adapter.modes import keeping_modes
from perceive_adapter.training.calling import restored_by
from perceive_adapter.training.restoration import check_patch
from perceive_adapter.warning import warn

__all__ = ["find_treated"]

_OWN = 1.0  # dB by which a backbone improves images whose damage it can undo
_SEEN = 0.5  # presence from which a degradation counts as perceived
_COVERED = 0.7  # share of the error left by the backbone where something treated is perceived


@torch.no_grad()
def find_treated(model: PerceiveModel, data: RestorationData, each: int = 32) -> tuple[str, ...]:
    """Tell which degradations to name to :meth:`~perceive_adapter.PerceiveModel.treat`.

    A degradation is the backbone's own where the bare backbone raises the PSNR of images in which
    nothing else is perceived by a decibel or more. Those that the perceiver sees in most images of
    a task are treated, but for the backbone's own. Where a good part of the error that the backbone
    leaves in a task is in images in which none of them is perceived, the adapter must work on every
    image, and nothing is named.

    Args:
        model: wrapped with a perceiver that tells degradations.
        data: what it is to be trained on.
        each: samples of each task that are looked at.

    Returns:
        Names of ``model.perceiver.degradations``; none where the adapter should work everywhere.

    Raises:
        BackboneError: the wrapped network takes no RGB image, is an upscaler, or cannot run on
            patches of this size.

    Warns:
        UnseenTaskWarning: nothing is named because of a task, which it names.
    """
    names = model.perceiver.degradations if model.perceiver is not None else ()
    if not names:
        return ()
    check_patch(model, data.patch)
    device = next(model.parameters()).device
    with keeping_modes(model):
        model.eval()
        looked = [
            _look(model, data.tasks[int(samples.task[0])], samples)
            for samples in _by_task(data.probe(each), device)
        ]
    own = _own(looked)
    seen = [(task.present.mean(0) >= _SEEN) for task in looked]
    treated = torch.stack(seen).any(0) & ~own
    for task, families in zip(looked, seen, strict=True):
        if task.gain.mean() >= _OWN and not (families & ~own).any():
            continue
        left = task.error * (task.gain < _OWN)
        covered = strength(task.severity[:, treated], task.present[:, treated])
        if covered @ left < _COVERED * left.sum():
            warn(_unseen(task, float(covered @ left / left.sum())), UnseenTaskWarning)
            return ()
    return tuple(name for name, chosen in zip(names, treated.tolist(), strict=True) if chosen)


def _unseen(task: _Looked, share: float) -> str:
    return (
        f"the adapter will work on every image, its backbone's own task included: of the error in "
        f"the task {task.name!r}, only {share:.0%} is where something to treat is perceived. Name "
        "what it should treat nevertheless (treat(), or --treat), or accept it (--treat everywhere)"
    )


class _Looked(NamedTuple):
    """Samples of a task, as the perceiver sees them and the bare backbone restores them.

    Args:
        name: of the task.
        present: (B, D), presence of each degradation.
        severity: (B, D), of the same.
        gain: (B,), of the backbone in dB.
        error: (B,), mean squared, that it leaves.
    """

    name: str
    present: Tensor
    severity: Tensor
    gain: Tensor
    error: Tensor


def _look(model: PerceiveModel, name: str, samples: RestorationSample) -> _Looked:
    with model.disabled():
        restored = restored_by(model, samples.degraded)
    reached = psnr(restored, samples.target)
    gain = reached - psnr(samples.degraded, samples.target)
    seen = model.perceive(model.value_range.from_unit(samples.context))
    assert seen.degradations is not None
    assert seen.severity is not None
    return _Looked(name, seen.degradations, seen.severity, gain, 10 ** (-reached / 10))


def _own(looked: Sequence[_Looked]) -> Tensor:
    """Which degradations the backbone undoes by itself, (D,)."""
    perceived = torch.cat([task.present for task in looked]) >= _SEEN
    gain = torch.cat([task.gain for task in looked])
    alone = perceived & (perceived.sum(1, keepdim=True) == 1)
    count = alone.sum(0)
    return (count > 0) & ((gain @ alone.to(gain)) / count.clamp_min(1) >= _OWN)


def _by_task(samples: RestorationSample, device: torch.device) -> Iterator[RestorationSample]:
    for task in dict.fromkeys(samples.task.tolist()):
        yield RestorationSample(*(part[samples.task == task].to(device) for part in samples))
