"""Fixtures that every part of the suite may use."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

OTHERS_WARNINGS = (
    "ignore:'saved_variables' is deprecated:DeprecationWarning",  # spandrel's NAFNet
    "ignore:torch.meshgrid:UserWarning",  # spandrel's SwinIR
    "ignore:`torch.jit:FutureWarning",
    "ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning",
)


if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes share the cores: threads of torch's, in these and in those that tests start, would
    # wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    for warning in OTHERS_WARNINGS:
        config.addinivalue_line("filterwarnings", warning)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.__version__.startswith("2.6."):
        return
    for item in items:
        for mark in item.iter_markers("newer_torch"):
            item.add_marker(pytest.mark.skip(reason=f"torch 2.6 {mark.args[0]}"))


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Every test draws the same numbers, whichever test ran before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def no_accelerator_yet() -> Iterator[Callable[[], None]]:
    """The first accelerator of a process decides for all; what is given forgets it."""
    from accelerate.state import AcceleratorState

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)

    forget()
    yield forget
    forget()
