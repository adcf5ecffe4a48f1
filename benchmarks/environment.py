"""What a benchmark ran on, for the head of its tables, and how much memory it took."""

import datetime
import platform
import resource
import sys
from pathlib import Path

import torch

import perceive_adapter

__all__ = ["describe", "peak_gib", "processor"]


def describe(device: torch.device | None = None) -> str:
    """Date, processor, threads and versions, in one line; a GPU by its name."""
    on_gpu = device is not None and device.type == "cuda"
    return ", ".join(
        (
            datetime.date.today().isoformat(),
            torch.cuda.get_device_name(device) if on_gpu else processor(),
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


def peak_gib() -> float:
    """Peak resident memory of this process in GiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the parent had in use before it started this
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
