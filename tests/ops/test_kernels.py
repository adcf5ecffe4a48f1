"""The kernels in Triton's interpreter, in a process of its own: it is chosen at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_parity() -> None:
    suite = str(Path(__file__).with_name("kernel_parity.py"))
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", suite, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


READY = "from perceive_adapter.ops import dispatch; print(sorted(dispatch.READY))"


def test_each_kernel_has_a_switch() -> None:
    told = {"TRITON_INTERPRET": "1"}
    everything = run("-c", READY, **told).stdout
    assert everything == "['add_low_rank', 'modulate', 'reference_distances']\n"
    told["PERCEIVE_ADAPTER_KERNELS"] = "modulate, reference_distances"
    assert run("-c", READY, **told).stdout == "['modulate', 'reference_distances']\n"
    told["PERCEIVE_ADAPTER_KERNELS"] = "none"
    assert run("-c", READY, **told).stdout == "[]\n"


def test_a_name_of_no_kernel_is_refused() -> None:
    done = run("-c", READY, PERCEIVE_ADAPTER_KERNELS="modulat")
    assert done.returncode == 1
    assert "names modulat: expected none, or some of modulate, add_low_rank" in done.stderr


def test_nothing_of_triton_is_imported_where_it_cannot_run() -> None:
    code = "import sys; import perceive_adapter.ops; print('triton' in sys.modules)"
    assert run("-c", code, PERCEIVE_ADAPTER_KERNELS="none").stdout == "False\n"
