"""Stage 2: train a network to restore, on one process or many, resumable to the last bit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from torch import nn

from perceive_adapter.data.restoration import RestorationData
from perceive_adapter.errors import ConfigError
from perceive_adapter.injection.model import PerceiveModel
from perceive_adapter.losses import ClipAwareLoss, ObjectiveWeights, RestorationObjective
from perceive_adapter.modes import keeping_modes
from perceive_adapter.training.loop import Schedule
from perceive_adapter.training.mediums import MediumSource
from perceive_adapter.training.restoration import Perceive, RestorationStep, check_patch
from perceive_adapter.warning import warn

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["ADAPTER", "PAPER_RESTORATION", "Stage2", "objective_for", "train_restoration"]

_PAPER_SCHEDULE: Final = Schedule(
    steps=500_000, learning_rate=2e-4, final_learning_rate=1e-6, weight_decay=1e-4
)
_PAPER_WEIGHTS: Final = ObjectiveWeights()


@dataclass(frozen=True)
class Stage2:
    """The recipe of stage 2; the defaults are Perceive-IR's.

    Args:
        schedule: optimizer steps and learning rates.
        batch: samples of an optimizer step, over all processes and accumulated passes.
        accumulate: forward and backward passes that make one optimizer step. The contrastive loss
            compares the images of a pass.
        weights: of the objective's terms.
        ema: decay of the exponential moving average of the weights, in [0, 1), which is what the
            model ends with; 0 for none. In the first steps n it is (1 + n) / (10 + n) at most.
        probe: samples of each task that are restored anew every so often, for the PSNR that is
            shown and that the difficulty of medium images is compared with.
        probe_every: optimizer steps between two such looks.

    Raises:
        ConfigError: a number that cannot work.
    """

    schedule: Schedule = _PAPER_SCHEDULE
    batch: int = 8
    accumulate: int = 1
    weights: ObjectiveWeights = _PAPER_WEIGHTS
    ema: float = 0.0
    probe: int = 4
    probe_every: int = 500

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "probe", "probe_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 1 or more.")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema={self.ema}: expected a decay of 0 or more and below 1.")


PAPER_RESTORATION: Final = Stage2()

ADAPTER: Final = Stage2(
    Schedule(10_000, learning_rate=2e-3, final_learning_rate=2e-5, warmup=1000, weight_decay=1e-4),
    weights=ObjectiveWeights(contrastive=0.0, clip_aware=0.0, difficulty_adaptive=0.0),
)
"""The recipe for an adapter: L1 alone, fast; short runs may go faster still."""


def train_restoration(
    model: nn.Module,
    data: RestorationData,
    *,
    recipe: Stage2 = PAPER_RESTORATION,
    objective: RestorationObjective | None = None,
    perceive: Perceive | None = None,
    mediums: Sequence[MediumSource] = (),
    accelerator: Accelerator | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 500,
    workers: int = 0,
    compile: bool = False,
    channels_last: bool = False,
) -> None:
    """Train the parameters of a model that require a gradient, to restore what ``data`` draws.

    Killed at any moment and started again with the same arguments, it ends with the same weights:
    every sample hangs on its index alone, and a checkpoint holds the rest. Launched by ``accelerate
    launch`` it trains on several processes, which share each batch out among them. torch's global
    random generators are seeded at every step.

    Source: stage 2 of Perceive-IR (IEEE TIP 2025, https://arxiv.org/abs/2408.15994).

    Args:
        model: a :class:`~perceive_adapter.PerceiveModel`, which perceives the whole crop and
            restores a part of it; or any other network from degraded to restored image in [0, 1].
            It is trained in place, on the accelerator's device; at the end, or on an error, each
            of its modules gets back the mode it had.
        data: what is trained on.
        recipe: steps, batches and the weights of the objective.
        objective: None for :func:`objective_for` the model and ``recipe.weights``.
        perceive: from the wrapped model and a batch to the perception that it is told, for an
            oracle or a teacher; None for what it perceives itself.
        mediums: what makes half-restored images for the difficulty-adaptive loss: restorers, which
            are frozen, and ``"earlier"`` for the model as it was at the last look at the probe.
        accelerator: precision, devices and trackers; None for what the environment says.
        checkpoint: file to go on from, and to write to.
        every: optimizer steps between two checkpoints.
        workers: processes that draw samples; 0 draws them in this one. A run that is to end with
            the same bits goes on with as many as before.
        compile: run through ``torch.compile``.
        channels_last: keep images and the model's weights in that memory format.

    Raises:
        ConfigError: nothing in the model is trainable, the batch cannot be shared out evenly,
            there are mediums and no difficulty-adaptive loss, a CLIP-aware loss and no perceiver,
            or a contrastive loss and passes of one image.
        BackboneError: the wrapped network takes no RGB image, is an upscaler, or cannot run on
            patches of this size.
        CheckpointError: the checkpoint is damaged, or of another run: another recipe, objective,
            model, frozen weights included, or data, of which all but the content of pairs is
            compared.
        TrainingError: loss or gradient are no longer finite; the last checkpoint is from before.
    """
    from accelerate import Accelerator

    from perceive_adapter.training.restoration_run import RestorationRun, in_channels_last

    objective = objective or objective_for(model, recipe.weights)
    if every < 1:
        raise ConfigError(f"every={every}: expected 1 or more optimizer steps.")
    checkpoint = None if checkpoint is None else Path(checkpoint)
    if mediums and objective.difficulty_adaptive is None:
        raise ConfigError(
            "mediums are for the difficulty-adaptive loss, whose weight is 0: leave them out, or "
            "give it a weight."
        )
    _check_negatives(model, objective, recipe)
    step = RestorationStep(model, objective, perceive, mediums)
    check_patch(model, data.patch)
    accelerator = accelerator or Accelerator()
    run = RestorationRun(step, data, recipe, accelerator, channels_last=channels_last)
    if channels_last:
        in_channels_last(model)
    with _compiled(model, compile), keeping_modes(model):
        start = run.resume(checkpoint)
        model.train()
        for index, samples in run.progress(start, workers):
            run.update(index, samples)
            done = index + 1
            if checkpoint is not None and (done % every == 0 or done == recipe.schedule.steps):
                run.save(checkpoint, done)
        run.finish()


def _check_negatives(model: nn.Module, objective: RestorationObjective, recipe: Stage2) -> None:
    """Tell of a contrastive loss whose negatives are fewer than those of a whole batch.

    Raises:
        ConfigError: there are none, in passes of one image.
    """
    contrasts = isinstance(model, PerceiveModel) and objective.contrastive is not None
    if not contrasts or recipe.accumulate == 1:
        return
    images = recipe.batch // recipe.accumulate
    if images < 2:
        raise ConfigError(
            f"{recipe.accumulate} accumulated passes for a batch of {recipe.batch}: the "
            "contrastive loss compares the images of a pass, and here there is one. Accumulate "
            "less, or give it the weight 0."
        )
    warn(
        f"the contrastive loss compares the {images} images of a pass, and not the {recipe.batch} "
        f"of the batch, of which {recipe.accumulate} passes are accumulated."
    )


def objective_for(model: nn.Module, weights: ObjectiveWeights) -> RestorationObjective:
    """Build the objective of a model, whose own perceiver is the CLIP-aware loss's.

    Raises:
        ConfigError: the CLIP-aware loss has a weight, and the model no perceiver.
    """
    aware = None
    if weights.clip_aware:
        perceiver = model.perceiver if isinstance(model, PerceiveModel) else None
        if perceiver is None:
            raise ConfigError(
                f"the CLIP-aware loss, whose weight is {weights.clip_aware:g}, needs a perceiver, "
                "and this model has none: give it the weight 0, or an objective= with one."
            )
        aware = ClipAwareLoss(perceiver)
    return RestorationObjective(weights, clip_aware=aware)


@contextmanager
def _compiled(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Compile the model for a while, if wanted, and leave it as it was given."""
    names = ("_compiled_call_impl", "_compiled")  # the latter of a wrapped model
    before = {name: getattr(model, name) for name in names if hasattr(model, name)}
    try:
        if wanted:
            model.compile()
        yield
    finally:
        for name, value in before.items():
            setattr(model, name, value)
