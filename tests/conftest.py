"""Fixtures that every part of the suite may use."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Every test draws the same numbers, whichever test ran before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
