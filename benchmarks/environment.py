"""What a benchmark ran on, for the head of its tables."""

import datetime
import platform
from pathlib import Path

import torch

import perceive_adapter

__all__ = ["describe", "processor"]


def describe() -> str:
    """Date, processor, threads and versions, in one line."""
    return ", ".join(
        (
            datetime.date.today().isoformat(),
            processor(),
            f"{torch.get_num_threads()} threads",
            f"Python {platform.python_version()}",
            f"torch {torch.__version__}",
            f"perceive_adapter {perceive_adapter.__version__}",
        )
    )


def processor() -> str:
    """Name of the processor, as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
