"""Which degradations an adapter should treat: those that its backbone cannot undo by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from perceive_adapter.data.restoration import RestorationData, RestorationSample
from perceive_adapter.injection.model import PerceiveModel
from perceive_adapter.training.restoration import psnr, restored_by

__all__ = ["find_treated"]

_OWN = 1.0  # dB by which a backbone improves the images of a task that is its own
_SEEN = 0.5  # mean presence from which a degradation counts as perceived in a task
_COVERED = 0.7  # least mean strength of the adapter in every task that it is for


@torch.no_grad()
def find_treated(model: PerceiveModel, data: RestorationData, each: int = 16) -> tuple[str, ...]:
    """Tell which degradations to name to :meth:`~perceive_adapter.PerceiveModel.treat`.

    A task is the backbone's own where the bare backbone raises the PSNR by a decibel or more. The
    degradations that the perceiver sees in the other tasks are treated, but for those that it sees
    in the backbone's own. Where the perceiver does not see what is wrong in one of the tasks, the
    adapter must work on every image, and nothing is named.

    Args:
        model: wrapped with a perceiver that tells degradations.
        data: what it is to be trained on.
        each: samples of each task that are looked at.

    Returns:
        Names of ``model.perceiver.degradations``; none where the adapter should work everywhere.
    """
    names = model.perceiver.degradations if model.perceiver is not None else ()
    if not names:
        return ()
    own: list[Tensor] = []
    others: list[Tensor] = []
    for samples in _by_task(data.probe(each), next(model.parameters()).device):
        with model.disabled():
            restored = restored_by(model, samples.degraded)
        gain = psnr(restored, samples.target) - psnr(samples.degraded, samples.target)
        present = model.perceive(model.value_range.from_unit(samples.context)).degradations
        assert present is not None
        (own if gain.mean() >= _OWN else others).append(present)
    columns = sorted(_seen(others) - _seen(own))
    for present in others:
        strength = 1 - (1 - present[:, columns]).prod(dim=1)
        if strength.mean() < _COVERED:
            return ()
    return tuple(names[column] for column in columns)


def _by_task(samples: RestorationSample, device: torch.device) -> Iterator[RestorationSample]:
    for task in dict.fromkeys(samples.task.tolist()):
        yield RestorationSample(*(part[samples.task == task].to(device) for part in samples))


def _seen(tasks: Sequence[Tensor]) -> set[int]:
    """The columns that are perceived in most images of one of the tasks."""
    return {
        column
        for present in tasks
        for column in (present.mean(0) >= _SEEN).nonzero().flatten().tolist()
    }
