"""One run of stage 2: what it is made of, its steps, and its state on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import cached_property
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
from perceive_adapter.errors import CheckpointError, ConfigError, ImageError, TrainingError
from perceive_adapter.training.checkpoints import (
    REMEDY,
    check_settings,
    read_checkpoint,
    write_checkpoint,
)
from perceive_adapter.training.loop import check_finite
from perceive_adapter.training.restoration import RestorationStep
from perceive_adapter.weights import fingerprint, full_tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

    from perceive_adapter.training.stage2 import Stage2

__all__ = ["RestorationRun", "in_channels_last"]

_WEIGHTS: Final = ("model", "optimizer", "ema", "scaler")
_STATE: Final = ("step", "recipe", "objective", "data", "precision", "frozen", *_WEIGHTS)
_LOG_EVERY: Final = 20
_KEPT: Final = 0.8  # share of the progress bar's average that the past keeps
_SEEDS: Final = 1_000_003
_WHOLE: Final = StateDictOptions(
    full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False
)


class RestorationRun:
    """What :func:`~perceive_adapter.training.stage2.train_restoration` runs.

    Args:
        step: what is computed; it is prepared for the accelerator here.
        data: what is trained on.
        recipe: steps, batches and rates.
        accelerator: precision, devices and trackers.
        channels_last: whether images come in that memory format.

    Raises:
        ConfigError: nothing in the model is trainable, or the batch cannot be shared out evenly.
    """

    def __init__(
        self,
        step: RestorationStep,
        data: RestorationData,
        recipe: Stage2,
        accelerator: Accelerator,
        *,
        channels_last: bool = False,
    ) -> None:
        self.data, self.recipe, self.accelerator = data, recipe, accelerator
        self.channels_last = channels_last
        shares = accelerator.num_processes * recipe.accumulate
        if recipe.batch % shares:
            raise ConfigError(
                f"a batch of {recipe.batch} cannot be shared out evenly among "
                f"{accelerator.num_processes} processes and {recipe.accumulate} accumulated "
                f"passes: expected a multiple of {shares}."
            )
        trainable = [p for p in step.parameters() if p.requires_grad]
        if not trainable:
            raise ConfigError(
                "nothing in the model is trainable: wrap with is_trainable=True, or unfreeze()."
            )
        decay = recipe.schedule.weight_decay
        optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=decay)
        optimizer.zero_grad(set_to_none=True)  # of what the caller did before
        # One flag for the whole process: a loop that stopped while it accumulated leaves it off.
        accelerator.sync_gradients = True
        self.step, self.optimizer = accelerator.prepare(step, optimizer)
        self.parameters: list[Tensor] = [p for p in self.step.parameters() if p.requires_grad]
        self.ema = [p.detach().clone() for p in self.parameters] if recipe.ema else []
        self.probe = data.probe(recipe.probe)
        self.psnr = math.nan
        self.terms: dict[str, Tensor] = {}
        self.norm = torch.tensor(0.0)

    # Steps

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
            yield step, [self._moved(next(passes)) for _ in range(self.recipe.accumulate)]
            if step % _LOG_EVERY == 0 or step + 1 == steps:
                self._check_finite(step)
                loss = float(self.terms["total"])
                average = loss if average is None else _KEPT * average + (1 - _KEPT) * loss
                bar.set_postfix_str(f"loss {average:.4f}, PSNR {self.psnr:.2f}", refresh=False)
                values = {name: float(value) for name, value in self.terms.items()}
                self.accelerator.log({**values, "PSNR": self.psnr}, step)

    def _indices(self, start: int) -> Iterator[list[int]]:
        """Yield the samples of each pass of this process; a step's are the same for any number."""
        recipe, processes = self.recipe, self.accelerator.num_processes
        size = recipe.batch // (processes * recipe.accumulate)
        for index in range(start * recipe.accumulate, recipe.schedule.steps * recipe.accumulate):
            first = (index * processes + self.accelerator.process_index) * size
            yield list(range(first, first + size))

    def update(self, step: int, passes: list[RestorationSample]) -> None:
        """Take one optimizer step."""
        last = step + 1 == self.recipe.schedule.steps
        if last or step % self.recipe.probe_every == 0 or math.isnan(self.psnr):
            self._look(step)
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        # Whatever is random in the network hangs on the step, so that a resumed run repeats it.
        torch.manual_seed(self.data.seed * _SEEDS + step * processes + rank)
        rate = self.recipe.schedule.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        share = self.accelerator.gradient_accumulation_steps / len(passes)  # which it divides by
        for index, samples in enumerate(passes, start=1):
            with self._synchronised(index == len(passes)):
                terms = self._terms(step, samples)
                self.terms = {name: value.detach() for name, value in terms.items()}
                self.accelerator.backward(terms["total"] * share)
        self.norm = self.accelerator.clip_grad_norm_(self.parameters, self.recipe.schedule.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            with torch.no_grad():
                decay = min(self.recipe.ema, (1 + step) / (10 + step))  # so that the start fades
                torch._foreach_lerp_(self.ema, self.parameters, 1 - decay)

    def _terms(self, step: int, samples: RestorationSample) -> dict[str, Tensor]:
        try:
            terms: dict[str, Tensor] = self.step(samples)
        except ImageError as error:
            raise TrainingError(
                f"step {step}, at a learning rate of {self.recipe.schedule.rate(step):.2g}, cannot "
                f"be computed: {error} If it was the network, lower the learning rate."
            ) from error
        return terms

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Let gradients cross the processes in the last pass of a step only."""
        return nullcontext() if last else self.accelerator.no_sync(self.step)

    @torch.no_grad()
    def _look(self, step: int) -> None:
        """Measure the PSNR on the fixed probe, which says how hard the medium images are.

        A run that goes on between two looks only shows it: the difficulty is in its checkpoint.
        """
        self.step.eval()
        psnr = self.step(self._moved(self.probe), measure=True)["psnr"].mean()
        self.step.train()
        self.psnr = float(self.accelerator.reduce(psnr, "mean"))
        if step % self.recipe.probe_every:
            return
        inner = self.accelerator.unwrap_model(self.step)
        inner.mediums.refresh(inner.model)  # what was the latest is the earlier state from now on
        if inner.objective.difficulty_adaptive is not None and math.isfinite(self.psnr):
            inner.objective.difficulty_adaptive.update_difficulty(self.psnr)

    def _moved(self, samples: RestorationSample) -> RestorationSample:
        device = self.accelerator.device
        parts = [part.to(device, non_blocking=True) for part in samples]
        if self.channels_last:
            parts = [
                part.contiguous(memory_format=torch.channels_last) if part.ndim == 4 else part
                for part in parts
            ]
        return RestorationSample(*parts)

    def _check_finite(self, step: int) -> None:
        """Raise if loss or gradient are not finite; a gradient scaler skips such gradients."""
        found = {"loss": self.terms["total"]}
        if self.accelerator.scaler is None:
            found["norm of the gradient"] = self.norm
        for name, value in found.items():
            check_finite(name, value, step, self.recipe.schedule)

    def finish(self) -> None:
        """Leave the averaged weights in the model, where they are kept."""
        with torch.no_grad():
            for parameter, mean in zip(self.parameters, self.ema, strict=False):
                parameter.copy_(mean)

    # State

    def save(self, file: Path, done: int) -> None:
        """Write the state after so many steps; every process must call it."""
        self._check_finite(done - 1)
        inner, optimizer = self._bare()
        model = get_model_state_dict(inner, options=_WHOLE)
        moments = get_optimizer_state_dict(inner, optimizer, options=_WHOLE)
        # These gather, so every process must.
        ema, settings = [full_tensor(value).cpu() for value in self.ema], self._settings
        scaler = self.accelerator.scaler
        if self.accelerator.is_main_process:
            state = {
                "step": done,
                **settings,
                "model": model,
                "optimizer": moments,
                "ema": ema,
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            write_checkpoint(file, state)
        self.accelerator.wait_for_everyone()

    def resume(self, file: Path | None) -> int:
        """Load the state where there is one, and return the step to go on from."""
        state = read_checkpoint(file, _STATE) if file is not None else None
        if state is None:
            return self._agreed(0, file)
        check_settings(file, {name: state[name] for name in self._settings}, self._settings)
        self._check_fits(state["model"], file)
        try:
            inner, optimizer = self._bare()
            set_model_state_dict(inner, state["model"], options=_WHOLE)
            set_optimizer_state_dict(inner, optimizer, state["optimizer"], options=_WHOLE)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{str(file)!r} is of another model: {error} {REMEDY}") from error
        for mean, saved in zip(self.ema, state["ema"], strict=True):
            mean.copy_(_like(mean, saved))
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return self._agreed(int(state["step"]), file)

    @cached_property  # photographs are hashed for it
    def _settings(self) -> dict[str, Any]:
        """What decides the weights, besides those that train and the content of pairs."""
        told: dict[str, Any] = {"recipe": asdict(self.recipe), "data": self.data.settings()}
        inner = self.accelerator.unwrap_model(self.step)
        terms = {n: " ".join(repr(term).split()) for n, term in inner.objective.named_children()}
        told["objective"] = {"weights": asdict(inner.objective.weights), **terms}
        frozen = _frozen(inner)
        others = [name for name in inner.state_dict() if name not in frozen]
        told["frozen"] = fingerprint(inner, leave_out=others)
        return {**told, "precision": self.accelerator.mixed_precision}

    def _agreed(self, step: int, file: Path | None) -> int:
        """Return the step, after making sure that every process found the same checkpoint."""
        found = self.accelerator.gather(torch.tensor([step], device=self.accelerator.device))
        if found.unique().numel() > 1:
            raise CheckpointError(
                f"the processes found checkpoints of steps {found.tolist()} in {str(file)!r}: they "
                "need one folder that all of them share."
            )
        return step

    def _check_fits(self, saved: Mapping[str, Tensor], file: Path | None) -> None:
        """Raise, before anything is loaded, if the saved state is of another model."""
        inner = self.accelerator.unwrap_model(self.step)
        frozen = _frozen(inner)
        shapes = {k: v.shape for k, v in inner.state_dict().items() if k not in frozen}
        found = {name: value.shape for name, value in saved.items()}
        if odd := sorted(n for n in {**shapes, **found} if shapes.get(n) != found.get(n)):
            raise CheckpointError(
                f"{str(file)!r} is of another model: {len(odd)} tensors differ, such as "
                f"{odd[0]}, {found.get(odd[0])} where {shapes.get(odd[0])} is expected. {REMEDY}"
            )

    def _bare(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model and the optimizer without what accelerate wraps around them.

        torch 2.6 finds no parameter of a model that is inside DistributedDataParallel.
        """
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return self.accelerator.unwrap_model(self.step), optimizer


def _frozen(module: nn.Module) -> set[str]:
    """The names of the parameters that do not train."""
    return {name for name, value in module.named_parameters() if not value.requires_grad}


def in_channels_last(model: nn.Module) -> None:
    """Give all weights of images' layers that memory format; other tensors stay as they are."""
    for value in model.parameters():
        if value.ndim == 4:
            value.data = value.data.contiguous(memory_format=torch.channels_last)


def _like(value: Tensor, saved: Tensor) -> Tensor:
    """A whole tensor, sharded as ``value`` is."""
    if isinstance(value, DTensor):
        return distribute_tensor(saved.to(value.device), value.device_mesh, value.placements)
    return saved
