"""A training loop that, killed at any moment and started again, ends with the same weights."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from perceive_adapter.errors import CheckpointError, ConfigError, TrainingError
from perceive_adapter.training.checkpoints import (
    REMEDY,
    check_settings,
    read_checkpoint,
    write_checkpoint,
)

__all__ = ["Prefetcher", "Schedule", "check_finite", "seeded", "train"]

T = TypeVar("T")

_STATE = {"step", "settings", "modules", "optimizer"}


@dataclass(frozen=True)
class Schedule:
    """How long to train, and how fast.

    Args:
        steps: optimizer steps.
        learning_rate: highest, after the warm-up.
        final_learning_rate: lowest, to which a cosine falls from there until the end.
        warmup: steps over which the learning rate rises from 0.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.

    Raises:
        ConfigError: a number that cannot work.
    """

    steps: int
    learning_rate: float
    final_learning_rate: float = 0.0
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        numbers = ("steps", "learning_rate", "final_learning_rate", "warmup", "weight_decay")
        for name in numbers:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"{name}={value}: expected a finite number, 0 or more.")
        if not self.clip > 0:
            raise ConfigError(
                f"clip={self.clip}: no step would change anything. Give a norm above 0; math.inf "
                "clips nothing."
            )

    def with_steps(self, steps: int) -> Schedule:
        """Return the same for another number of steps, the warm-up a tenth of them at most.

        Example:
            >>> Schedule(steps=1000, learning_rate=1e-3, warmup=100).with_steps(200).warmup
            20
        """
        return replace(self, steps=steps, warmup=min(self.warmup, steps // 10))

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        fall = (1 + math.cos(math.pi * progress)) / 2
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * fall


def seeded(seed: int, step: int) -> torch.Generator:
    """Return the generator of one step: what is drawn hangs on the step, not on a history.

    Of its seed torch's generator takes the lowest 32 bits.
    """
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class Prefetcher(Generic[T]):
    """Draws the samples of the next steps while this one trains.

    A thread draws those of the next step, which is enough on a CPU, where training takes longer; a
    GPU is kept busy by many processes only.

    Args:
        draw: the samples of a step, on the CPU; everything random in it must hang on the step
            alone, so that it does not matter who draws (but for rounding, where sums are shared by
            other numbers of threads).
        steps: in all.
        workers: processes that draw; 0 for the thread, which also draws where processes cannot be
            forked.
    """

    def __init__(self, draw: Callable[[int], T], steps: int, workers: int = 0) -> None:
        self._draw, self._steps = draw, steps
        self._workers = workers if "fork" in multiprocessing.get_all_start_methods() else 0
        self._pool = ThreadPoolExecutor(1, "samples")
        self._next: tuple[int, Future[T]] | None = None
        self._drawn: tuple[int, Iterator[T]] | None = None

    def __call__(self, step: int) -> T:
        """Return the samples of a step."""
        if self._workers:
            return self._by_processes(step)
        ready = self._next
        if ready is None or ready[0] != step:
            ready = step, self._pool.submit(self._draw, step)
        samples = ready[1].result()
        if step + 1 < self._steps:
            self._next = step + 1, self._pool.submit(self._draw, step + 1)
        return samples

    def _by_processes(self, step: int) -> T:
        if self._drawn is None or self._drawn[0] != step:
            self._drawn = step, iter(self._loader(step))
        drawn = self._drawn[1]
        self._drawn = step + 1, drawn
        return next(drawn)

    def _loader(self, step: int) -> DataLoader[T]:
        """Draw from a step on, in the order of the steps."""
        return DataLoader(
            _Steps(self._draw),
            sampler=range(step, self._steps),
            batch_size=None,
            collate_fn=_as_drawn,
            num_workers=self._workers,
            prefetch_factor=4,
            multiprocessing_context="fork",  # what draws holds photographs, and cannot be pickled
            generator=torch.Generator(),  # else torch's global one is moved
        )

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._drawn = None
        self._pool.shutdown(cancel_futures=True)


class _Steps(Dataset[T]):
    """What a step draws, as a data loader wants it."""

    def __init__(self, draw: Callable[[int], T]) -> None:
        self._draw = draw

    def __getitem__(self, step: int) -> T:
        return self._draw(step)


def _as_drawn(drawn: T) -> T:
    return drawn


def train(
    modules: Mapping[str, nn.Module],
    loss_at: Callable[[int], Tensor],
    schedule: Schedule,
    *,
    settings: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None,
    every: int = 500,
    title: str = "train",
) -> None:
    """Minimise ``loss_at(step)`` over the modules' parameters that require a gradient, by AdamW.

    Args:
        modules: what is trained and checkpointed, by name.
        loss_at: the loss of a step; everything random in it must hang on the step alone.
        schedule: steps and learning rates.
        settings: whatever else decides the weights, such as a seed and a digest of the data: plain
            values and mappings of them. A checkpoint of a run with others is refused.
        checkpoint: file that holds the state; training goes on from it where it exists.
        every: steps between two checkpoints.
        title: of the progress bar.

    Raises:
        ConfigError: ``every`` is less than 1.
        CheckpointError: the checkpoint is damaged, or of another schedule, other settings or other
            modules.
        TrainingError: loss or gradient are no longer finite; the last checkpoint is from before.
    """
    from tqdm import tqdm

    if every < 1:
        raise ConfigError(f"every={every}: expected 1 or more steps.")
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=schedule.weight_decay)
    told = {"modules": list(modules), "schedule": asdict(schedule), **(settings or {})}
    start = _resume(checkpoint, modules, optimizer, told)
    bar = tqdm(range(start, schedule.steps), title, schedule.steps, initial=start, ncols=80)
    average = None
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(parameters, schedule.clip)
        check_finite("loss", loss, step, schedule)
        check_finite("norm of the gradient", norm, step, schedule)
        optimizer.step()
        if step % 20 == 0:
            average = loss.item() if average is None else 0.8 * average + 0.2 * loss.item()
            bar.set_postfix_str(f"loss {average:.4f}", refresh=False)
        if checkpoint is not None and ((step + 1) % every == 0 or step + 1 == schedule.steps):
            _save(checkpoint, modules, optimizer, told, step + 1)


def check_finite(name: str, value: Tensor, step: int, schedule: Schedule) -> None:
    """Raise TrainingError unless a number of a step, such as its loss, is finite."""
    if not math.isfinite(number := value.item()):
        raise TrainingError(
            f"the {name} of step {step} is {number}, at a learning rate of "
            f"{schedule.rate(step):.2g}: expected a finite one. Lower the learning rate, or look "
            "for images with values that are not finite."
        )


def _save(
    file: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
    step: int,
) -> None:
    state = {
        "step": step,
        "settings": settings,
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "optimizer": optimizer.state_dict(),
    }
    write_checkpoint(file, state)


def _resume(
    file: Path | None,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
) -> int:
    """Load the state where there is one, and return the step to go on from."""
    state = read_checkpoint(file, _STATE) if file is not None else None
    if state is None:
        return 0
    check_settings(file, state["settings"], settings)
    try:
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{str(file)!r} is of another model: {error} {REMEDY}") from error
    return int(state["step"])
