"""Stage 2: train a network to restore, on one process or many, resumable to the last bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader

from perceive_adapter.data.restoration import RestorationData, RestorationSample
from perceive_adapter.errors import CheckpointError, ConfigError, TrainingError
from perceive_adapter.injection.checkpoint import whole
from perceive_adapter.losses import ObjectiveWeights, RestorationObjective
from perceive_adapter.training.checkpoints import REMEDY, read_checkpoint, write_checkpoint
from perceive_adapter.training.loop import Schedule
from perceive_adapter.training.mediums import MediumSource
from perceive_adapter.training.restoration import Perceive, RestorationStep

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["ADAPTER", "PAPER_RESTORATION", "Stage2", "train_restoration"]

_STATE: Final = ("step", "recipe", "tasks", "model", "optimizer", "ema", "scaler")
_LOG_EVERY: Final = 20
_PAPER_SCHEDULE: Final = Schedule(
    steps=500_000, learning_rate=2e-4, final_learning_rate=1e-6, weight_decay=1e-4
)
_PAPER_WEIGHTS: Final = ObjectiveWeights()
_KEPT: Final = 0.8  # share of the progress bar's average that the past keeps
_WHOLE: Final = StateDictOptions(
    full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False
)


@dataclass(frozen=True)
class Stage2:
    """The recipe of stage 2; the defaults are Perceive-IR's.

    Args:
        schedule: optimizer steps and learning rates.
        batch: samples of an optimizer step, over all processes and accumulated passes.
        accumulate: forward and backward passes that make one optimizer step.
        weights: of the objective's terms.
        ema: decay of the exponential moving average of the weights, in [0, 1), which is what the
            model ends with; 0 for none.
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
    Schedule(10_000, learning_rate=1e-3, final_learning_rate=1e-5, warmup=1000, weight_decay=1e-4),
    weights=ObjectiveWeights(clip_aware=0.0, difficulty_adaptive=0.0),
)
"""The recipe for an adapter: what `benchmarks/quality.py` found useful, and nothing else."""


def train_restoration(
    model: nn.Module,
    data: RestorationData,
    *,
    recipe: Stage2 = PAPER_RESTORATION,
    objective: RestorationObjective | None = None,
    perceive: Perceive | None = None,
    mediums: Sequence[MediumSource] = (),
    accelerator: Accelerator | None = None,
    checkpoint: Path | None = None,
    every: int = 500,
    workers: int = 0,
    compile: bool = False,
    channels_last: bool = False,
) -> None:
    """Train the parameters of a model that require a gradient, to restore what ``data`` draws.

    Killed at any moment and started again with the same arguments, it ends with the same weights:
    every sample hangs on its index alone, and a checkpoint holds the rest. Launched by ``accelerate
    launch`` it trains on several processes, which share each batch out among them.

    Source: stage 2 of Perceive-IR (IEEE TIP 2025, https://arxiv.org/abs/2408.15994).

    Args:
        model: a :class:`~perceive_adapter.PerceiveModel`, which perceives the whole crop and
            restores a part of it; or any other network from degraded to restored image in [0, 1].
            It is trained in place and left in the mode that it was in.
        data: what is trained on.
        recipe: steps, batches and the weights of the objective.
        objective: None for one of ``recipe.weights``.
        perceive: from the wrapped model and a batch to the perception that it is told, for an
            oracle or a teacher; None for what it perceives itself.
        mediums: what makes half-restored images for the difficulty-adaptive loss: restorers, which
            are frozen, and ``"earlier"`` for the model as it was at the last look at the probe.
        accelerator: precision, devices and trackers; None for what the environment says.
        checkpoint: file to go on from, and to write to.
        every: optimizer steps between two checkpoints.
        workers: processes that draw samples; 0 draws them in this one.
        compile: run through ``torch.compile``.
        channels_last: keep images and the model's weights in that memory format.

    Raises:
        ConfigError: nothing in the model is trainable, the batch cannot be shared out evenly, or
            there are mediums and no difficulty-adaptive loss.
        CheckpointError: the checkpoint is damaged or of another run.
        TrainingError: the loss is no longer finite; the last checkpoint is from before.
    """
    from accelerate import Accelerator

    objective = objective or RestorationObjective(recipe.weights)
    if mediums and objective.difficulty_adaptive is None:
        raise ConfigError(
            "mediums are for the difficulty-adaptive loss, whose weight is 0: leave them out, or "
            "give it a weight."
        )
    if channels_last:
        model.to(memory_format=torch.channels_last)
    module = RestorationStep(model, objective, perceive, mediums)
    if compile:
        module.compile()
    run = _Run(module, data, recipe, accelerator or Accelerator())
    before = model.training
    start = run.resume(checkpoint)
    model.train()
    try:
        for step, samples in run.progress(start, workers):
            run.update(step, samples)
            done = step + 1
            if checkpoint is not None and (done % every == 0 or done == recipe.schedule.steps):
                run.save(checkpoint, done)
    finally:
        model.train(before)
    run.finish()


class _Run:
    """One training run: what it is made of, and its state."""

    def __init__(
        self,
        step: RestorationStep,
        data: RestorationData,
        recipe: Stage2,
        accelerator: Accelerator,
    ) -> None:
        self.data, self.recipe, self.accelerator = data, recipe, accelerator
        self.shares = accelerator.num_processes * recipe.accumulate
        if recipe.batch % self.shares:
            raise ConfigError(
                f"a batch of {recipe.batch} cannot be shared out evenly among "
                f"{accelerator.num_processes} processes and {recipe.accumulate} accumulated "
                f"passes: expected a multiple of {self.shares}."
            )
        trainable = [p for p in step.parameters() if p.requires_grad]
        if not trainable:
            raise ConfigError(
                "nothing in the model is trainable: wrap with is_trainable=True, or unfreeze()."
            )
        decay = recipe.schedule.weight_decay
        optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=decay)
        self.step, self.optimizer = accelerator.prepare(step, optimizer)
        self.parameters: list[Tensor] = [p for p in self.step.parameters() if p.requires_grad]
        self.ema = [p.detach().clone() for p in self.parameters] if recipe.ema else []
        self.probe = data.probe(recipe.probe)
        self.psnr = math.nan
        self.loss = torch.tensor(math.nan)

    def progress(self, start: int, workers: int) -> Iterator[tuple[int, list[RestorationSample]]]:
        """Yield every step that is left, with this process's samples, behind a progress bar."""
        from tqdm import tqdm

        steps, device = self.recipe.schedule.steps, self.accelerator.device
        loader = DataLoader(
            self.data,
            batch_sampler=self._indices(start),
            num_workers=workers,
            pin_memory=device.type == "cuda",
        )
        passes = iter(loader)
        main = self.accelerator.is_main_process
        bar = tqdm(range(start, steps), "restore", steps, initial=start, ncols=90, disable=not main)
        average = None
        for step in bar:
            yield (
                step,
                [_on(next(passes), device) for _ in range(self.recipe.accumulate)],
            )
            if step % _LOG_EVERY == 0:
                loss = self._finite_loss(step)
                average = loss if average is None else _KEPT * average + (1 - _KEPT) * loss
                bar.set_postfix_str(f"loss {average:.4f}, PSNR {self.psnr:.2f}", refresh=False)
                self.accelerator.log({"loss": loss, "PSNR": self.psnr}, step)

    def _indices(self, start: int) -> Iterator[list[int]]:
        """Yield the samples of each pass of this process; a step's are the same for any number."""
        recipe, processes = self.recipe, self.accelerator.num_processes
        size = recipe.batch // (processes * recipe.accumulate)
        for index in range(start * recipe.accumulate, recipe.schedule.steps * recipe.accumulate):
            first = (index * processes + self.accelerator.process_index) * size
            yield list(range(first, first + size))

    def update(self, step: int, passes: list[RestorationSample]) -> None:
        """Take one optimizer step."""
        if step % self.recipe.probe_every == 0:
            self._look(step)
        rate = self.recipe.schedule.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for index, samples in enumerate(passes, start=1):
            with self._synchronised(index == len(passes)):
                terms = self.step(samples)
                self.loss = terms["total"].detach()
                self.accelerator.backward(terms["total"] / len(passes))
        self.accelerator.clip_grad_norm_(self.parameters, self.recipe.schedule.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            torch._foreach_lerp_(self.ema, self.parameters, 1 - self.recipe.ema)

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Let gradients cross the processes in the last pass of a step only."""
        return nullcontext() if last else self.accelerator.no_sync(self.step)

    @torch.no_grad()
    def _look(self, step: int) -> None:
        """Measure the PSNR on the fixed probe, which says how hard the medium images are."""
        inner = self.accelerator.unwrap_model(self.step)
        psnr = self.step(_on(self.probe, self.accelerator.device), measure=True)["psnr"].mean()
        self.psnr = float(self.accelerator.reduce(psnr, "mean"))
        inner.mediums.refresh(inner.model)  # what was the latest is the earlier state from now on
        if inner.objective.difficulty_adaptive is not None and math.isfinite(self.psnr):
            inner.objective.difficulty_adaptive.update_difficulty(self.psnr)

    def _finite_loss(self, step: int) -> float:
        loss = float(self.loss)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of step {step} is {loss}, at a learning rate of "
                f"{self.recipe.schedule.rate(step):.2g}: expected a finite one. Lower the learning "
                "rate, or look for images with values that are not finite."
            )
        return loss

    def save(self, file: Path, done: int) -> None:
        """Write the state after so many steps; every process must call it."""
        self._finite_loss(done - 1)
        model = get_model_state_dict(self.step, options=_WHOLE)
        optimizer = get_optimizer_state_dict(self.step, self._torch_optimizer(), options=_WHOLE)
        ema = [whole(value).cpu() for value in self.ema]  # gathers, so every process must
        scaler = self.accelerator.scaler
        if self.accelerator.is_main_process:
            state = {
                "step": done,
                "recipe": asdict(self.recipe),
                "tasks": list(self.data.tasks),
                "model": model,
                "optimizer": optimizer,
                "ema": ema,
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            write_checkpoint(file, state)
        self.accelerator.wait_for_everyone()

    def resume(self, file: Path | None) -> int:
        """Load the state where there is one, and return the step to go on from."""
        state = read_checkpoint(file, _STATE) if file is not None else None
        if state is None:
            return 0
        expected = {"recipe": asdict(self.recipe), "tasks": list(self.data.tasks)}
        for name, value in expected.items():
            if state[name] != value:
                raise CheckpointError(
                    f"{str(file)!r} was written by a run whose {name} was {state[name]}: expected "
                    f"{value}. Run with the same options, or: {REMEDY}"
                )
        self._check_fits(state["model"], file)
        try:
            set_model_state_dict(self.step, state["model"], options=_WHOLE)
            optimizer = self._torch_optimizer()
            set_optimizer_state_dict(self.step, optimizer, state["optimizer"], options=_WHOLE)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{str(file)!r} is of another model: {error} {REMEDY}") from error
        for mean, saved in zip(self.ema, state["ema"], strict=True):
            mean.copy_(_like(mean, saved))
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return int(state["step"])

    def _check_fits(self, saved: Mapping[str, Tensor], file: Path | None) -> None:
        """Raise, before anything is loaded, if the saved state is of another model."""
        inner = self.accelerator.unwrap_model(self.step)
        frozen = {name for name, value in inner.named_parameters() if not value.requires_grad}
        shapes = {k: v.shape for k, v in inner.state_dict().items() if k not in frozen}
        found = {name: value.shape for name, value in saved.items()}
        if odd := sorted(n for n in {**shapes, **found} if shapes.get(n) != found.get(n)):
            raise CheckpointError(
                f"{str(file)!r} is of another model: {len(odd)} tensors differ, such as "
                f"{odd[0]}, {found.get(odd[0])} where {shapes.get(odd[0])} is expected. {REMEDY}"
            )

    def finish(self) -> None:
        """Leave the averaged weights in the model, where they are kept."""
        with torch.no_grad():
            for parameter, mean in zip(self.parameters, self.ema, strict=False):
                parameter.copy_(mean)

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        inner: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner


def _on(samples: RestorationSample, device: torch.device) -> RestorationSample:
    return RestorationSample(*(part.to(device, non_blocking=True) for part in samples))


def _like(value: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor, sharded as ``value`` is."""
    if isinstance(value, DTensor):
        return distribute_tensor(whole.to(value.device), value.device_mesh, value.placements)
    return whole
