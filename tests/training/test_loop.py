"""The training loop: killed and started again, it ends with the same weights."""

import copy
import math
import os
import queue
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceive_adapter.errors import CheckpointError, ConfigError, TrainingError
from perceive_adapter.training.loop import Prefetcher, Schedule, seeded, train

SCHEDULE = Schedule(steps=12, learning_rate=1e-2, warmup=3, weight_decay=0.1)


class Net(nn.Module):
    """Has batch statistics, which a checkpoint must keep too, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def loss(self, step: int) -> Tensor:
        inputs = torch.randn(16, 4, generator=seeded(3, step))
        return (self.body(self.frozen(inputs)) - inputs.sum(1, keepdim=True)).square().mean()


class Killed(Exception):
    """Stands for a kill."""


@pytest.fixture
def fresh() -> Net:
    return Net()


def run(net: Net, file: Path | None, *, dies_at: int = -1, schedule: Schedule = SCHEDULE) -> Net:
    net = copy.deepcopy(net)

    def loss_at(step: int) -> Tensor:
        if step == dies_at:
            raise Killed
        return net.loss(step)

    train({"net": net}, loss_at, schedule, checkpoint=file, every=5)
    return net


def same(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


def test_minimises_the_loss_and_leaves_what_is_frozen(fresh: Net) -> None:
    trained = run(fresh, None, schedule=Schedule(200, 1e-2))
    assert trained.loss(999) < 0.1 * fresh.loss(999)
    assert same(trained.frozen, fresh.frozen)


@pytest.mark.parametrize("dies_at", [3, 5, 7, 11])
def test_goes_on_bit_for_bit_after_a_kill(fresh: Net, tmp_path: Path, dies_at: int) -> None:
    file = tmp_path / "run" / "state.pt"
    with pytest.raises(Killed):
        run(fresh, file, dies_at=dies_at)
    assert file.exists() == (dies_at >= 5)
    resumed = run(fresh, file)
    assert same(resumed, run(fresh, None))
    assert not same(resumed, fresh)


def test_goes_on_from_the_checkpoint_and_not_from_the_start(fresh: Net, tmp_path: Path) -> None:
    steps: list[int] = []

    def loss_at(step: int) -> Tensor:
        steps.append(step)
        if len(steps) == 8:
            raise Killed
        return fresh.loss(step)

    for _ in range(2):
        try:
            train({"net": fresh}, loss_at, SCHEDULE, checkpoint=tmp_path / "state.pt", every=5)
        except Killed:
            continue
    assert steps == [*range(8), *range(5, 12)]


def test_a_finished_run_is_not_trained_again(fresh: Net, tmp_path: Path) -> None:
    done = run(fresh, tmp_path / "state.pt")
    assert same(run(fresh, tmp_path / "state.pt", dies_at=0), done)


def test_checkpoint_of_another_run_is_refused(fresh: Net, tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    run(fresh, file)
    with pytest.raises(
        CheckpointError, match=r"state\.pt.* schedule\.steps=12: expected schedule\.steps=13\."
    ):
        run(fresh, file, schedule=Schedule(13, 1e-2, warmup=3, weight_decay=0.1))
    with pytest.raises(CheckpointError, match=r"modules=\['net'\]: expected modules=\['other'\]"):
        train({"other": fresh}, fresh.loss, SCHEDULE, checkpoint=file)
    with pytest.raises(CheckpointError, match="of another model"):
        train({"net": nn.Linear(2, 2)}, fresh.loss, SCHEDULE, checkpoint=file)


def test_settings_tell_runs_apart(fresh: Net, tmp_path: Path) -> None:
    def again(**settings: object) -> None:
        train({"net": fresh}, fresh.loss, SCHEDULE, settings=settings, checkpoint=file)

    file = tmp_path / "state.pt"
    again(seed=0, sides=(32, 48), data={"severity": [0.0, 1.0]})
    again(seed=0, sides=(32, 48), data={"severity": [0.0, 1.0]})
    with pytest.raises(CheckpointError, match=r"with seed=0, data\.severity=\[0\.0, 1\.0\]: exp"):
        again(seed=1, sides=[32, 48], data={"severity": [0.0, 0.5]})
    with pytest.raises(CheckpointError, match=r"with low=None: expected low=0\.5\. Run with the"):
        again(seed=0, sides=(32, 48), data={"severity": [0.0, 1.0]}, low=0.5)


def test_damaged_checkpoint_is_refused(fresh: Net, tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    run(fresh, file)
    whole = file.read_bytes()
    for damaged in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"state\.pt' is no checkpoint"):
            run(fresh, file)
    for other in (torch.ones(3), {"step": 3}):
        torch.save(other, file)
        with pytest.raises(CheckpointError, match="is no checkpoint of a training run"):
            run(fresh, file)


def test_failed_write_leaves_the_old_checkpoint_whole(
    fresh: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "state.pt"
    with pytest.raises(Killed):
        run(fresh, file, dies_at=7)
    before = file.read_bytes()
    write = torch.save

    def disk_full(state: object, stream: object) -> None:
        stream.write(b"half of a state")  # type: ignore[attr-defined]
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="no space left"):
        run(fresh, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]  # nor half of the new one, on a disk that is full
    monkeypatch.setattr(torch, "save", write)
    assert same(run(fresh, file), run(fresh, None))


def test_no_draft_is_left_beside_a_checkpoint(fresh: Net, tmp_path: Path) -> None:
    run(fresh, tmp_path / "state.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_the_draft_of_a_run_that_lives_is_its_own(fresh: Net, tmp_path: Path) -> None:
    living, dead = (tmp_path / f".state.pt.{process}" for process in (os.getppid(), 9_999_999))
    for draft in (living, dead):
        draft.touch()
    run(fresh, tmp_path / "state.pt")
    assert living.exists()
    assert not dead.exists()


def test_learning_rate_rises_and_falls() -> None:
    schedule = Schedule(steps=100, learning_rate=1.0, final_learning_rate=0.1, warmup=10)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert Schedule(4, 2.0).rate(2) == pytest.approx(1 + math.cos(math.pi / 2))


def test_gradient_is_clipped() -> None:
    weight = nn.Linear(1, 1, bias=False)
    norms: list[float] = []

    def loss_at(step: int) -> Tensor:
        if weight.weight.grad is not None:
            norms.append(weight.weight.grad.norm().item())
        return 1000 * weight.weight.sum()

    train({"weight": weight}, loss_at, Schedule(3, 1e-3, clip=0.5))
    assert norms == pytest.approx([0.5, 0.5], rel=1e-4)


@pytest.mark.parametrize("steps", [4, 8])
def test_a_gradient_that_is_not_finite_leaves_weights_and_checkpoint(
    fresh: Net, tmp_path: Path, steps: int
) -> None:
    net, file = copy.deepcopy(fresh), tmp_path / "state.pt"

    def loss_at(step: int) -> Tensor:
        spoilt = (0 * net.body[0].weight).square().sum().sqrt()  # 0, its slope not a number
        return net.loss(step) + (spoilt if step == 3 else 0)

    with pytest.raises(TrainingError, match=r"norm of the gradient of step 3 is nan"):
        train({"net": net}, loss_at, Schedule(steps, 1e-3), checkpoint=file, every=2)
    assert torch.load(file, weights_only=True)["step"] == 2
    assert all(value.isfinite().all() for value in net.state_dict().values())


@pytest.mark.parametrize(
    "numbers",
    [{"clip": 0.0}, {"steps": -1}, {"learning_rate": math.nan}, {"weight_decay": -0.1}],
)
def test_schedules_that_cannot_work(numbers: dict[str, float]) -> None:
    settings: dict[str, Any] = {"steps": 3, "learning_rate": 1e-3, **numbers}
    with pytest.raises(ConfigError, match=f"{next(iter(numbers))}="):
        Schedule(**settings)


def test_checkpoints_come_every_so_many_steps(fresh: Net) -> None:
    with pytest.raises(ConfigError, match="every=0"):
        train({"net": fresh}, fresh.loss, SCHEDULE, every=0)


def test_generator_of_a_step_hangs_on_seed_and_step_alone() -> None:
    drawn = {
        torch.rand(4, generator=seeded(seed, step)).sum().item()
        for seed in range(4)
        for step in range(50)
    }
    assert len(drawn) == 200
    assert torch.equal(torch.rand(4, generator=seeded(2, 7)), torch.rand(4, generator=seeded(2, 7)))


class TestAhead:
    """The samples of a step are drawn while the step before is trained."""

    def test_gives_the_samples_of_the_step_that_is_asked_for(self) -> None:
        with Prefetcher(lambda step: step**2, steps=6) as prefetched:
            assert [prefetched(step) for step in (2, 3, 4, 0, 1, 1, 5)] == [4, 9, 16, 0, 1, 1, 25]

    def test_draws_the_next_step_meanwhile_and_none_after_the_last(self) -> None:
        drawn: queue.Queue[int] = queue.Queue()
        with Prefetcher(drawn.put, steps=2) as prefetched:
            prefetched(0)
            assert [drawn.get(timeout=10), drawn.get(timeout=10)] == [0, 1]
            prefetched(1)
        assert drawn.empty()

    @pytest.mark.parametrize("workers", [1, 2])
    def test_processes_give_the_same(self, workers: int) -> None:
        state = torch.get_rng_state()
        with Prefetcher(lambda step: torch.full((2,), step), 6, workers) as prefetched:
            assert [int(prefetched(step)[0]) for step in (2, 3, 4, 0, 1, 2)] == [2, 3, 4, 0, 1, 2]
        assert torch.equal(torch.get_rng_state(), state)

    def test_what_goes_wrong_there_is_raised_here(self) -> None:
        def draw(step: int) -> None:
            raise Killed

        with Prefetcher(draw, steps=2) as prefetched, pytest.raises(Killed):
            prefetched(0)
