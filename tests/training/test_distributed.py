"""Stage 2 in several processes, and in one that is killed again and again."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import TOKEN, HubServer
from restoring import FULL, Recording, data, model, recipe

from perceive_adapter.training.stage2 import train_restoration

HERE = Path(__file__).parent


def launch(script: str, *arguments: str, processes: int) -> None:
    """Run a script of this folder by torchrun, in so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += ["--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    done = subprocess.run(
        [*command, str(HERE / script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def losses(out: Path, processes: int, **told: Any) -> list[float]:
    launch("restoring.py", json.dumps({"out": str(out), **told}), processes=processes)
    found: list[float] = json.loads((out / "losses.json").read_text())
    return found


def test_two_processes_follow_the_losses_of_one(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = losses(tmp_path / "one", 1, recipe={"steps": 20})
    two = losses(tmp_path / "two", 2, recipe={"steps": 20})
    assert len(one) == 20
    assert max(one) > 1.2 * min(one)
    assert two == pytest.approx(one, abs=1e-4)


def test_two_processes_go_on_after_a_kill_as_one_would(tmp_path: Path) -> None:
    whole = losses(tmp_path, 2, recipe={"steps": 8})
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    (tmp_path / "state.pt").unlink()
    losses(tmp_path, 2, recipe={"steps": 8}, every=5, dies_at=6)
    assert losses(tmp_path, 2, recipe={"steps": 8}, every=5) == whole[5:]
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(torch.equal(value, again["model"][name]) for name, value in state["model"].items())


@pytest.mark.newer_torch("shards on GPUs only")
def test_a_sharded_adapter_trains_is_saved_pushed_and_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        launch("sharded.py", str(tmp_path), processes=2)
    assert "adapter_model.safetensors" in hub.repos["user/sharded"]
    assert sum("/commit/" in path for path in hub.asked) == 1


def _train(file: Path, weights: Path) -> None:
    torch.set_num_threads(1)  # a forked process must not use its parent's threads
    trained = model()
    train_restoration(
        trained,
        data(),
        recipe=recipe(40, weights=FULL, ema=0.9),
        objective=Recording(FULL),
        checkpoint=file,
        every=1,
    )
    torch.save(trained.injector.state_dict(), weights)


def _start(file: Path, weights: Path) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=_train, args=(file, weights))
    process.start()
    return process


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    importlib.import_module("perceive_adapter.training.restoration_run")  # no part of a run
    importlib.import_module("accelerate")
    started = time.monotonic()
    _start(tmp_path / "whole.pt", tmp_path / "whole").join()
    duration = time.monotonic() - started
    expected = torch.load(tmp_path / "whole", weights_only=True)
    rng, kills, run = random.Random(0), 0, 0
    while kills < 20 or run < 2:
        assert kills < 200, "it never comes to its end"
        file, weights = tmp_path / f"{run}.pt", tmp_path / str(run)
        process = _start(file, weights)
        process.join(duration * rng.uniform(0.2, 0.6))
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        if weights.exists():
            ended = torch.load(weights, weights_only=True)
            assert all(torch.equal(value, ended[name]) for name, value in expected.items())
            run += 1
