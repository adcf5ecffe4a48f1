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


@pytest.mark.newer_torch("brings a Triton that is called another way")
def test_kernels_compile(tmp_path: Path) -> None:
    """For a GPU, which needs none: what the interpreter lets pass, the compiler does not."""
    suite = str(Path(__file__).with_name("compile_kernels.py"))
    done = run(suite, TRITON_CACHE_DIR=str(tmp_path))
    assert done.stdout == "compiled\n", done.stderr[-3000:]


READY = "from perceive_adapter.ops import dispatch; print(sorted(dispatch.READY))"


def test_each_kernel_has_a_switch() -> None:
    told = {"TRITON_INTERPRET": "1"}
    everything = run("-c", READY, **told).stdout
    assert everything == "['add_low_rank', 'reference_distances']\n"
    told["PERCEIVE_ADAPTER_KERNELS"] = "reference_distances, "
    assert run("-c", READY, **told).stdout == "['reference_distances']\n"
    told["PERCEIVE_ADAPTER_KERNELS"] = "none"
    assert run("-c", READY, **told).stdout == "[]\n"


def test_a_name_of_no_kernel_is_refused() -> None:
    done = run("-c", READY, PERCEIVE_ADAPTER_KERNELS="add_low")
    assert done.returncode == 1
    assert (
        "names add_low: expected none, or some of add_low_rank, reference_distances" in done.stderr
    )


def test_nothing_of_triton_is_imported_where_it_cannot_run() -> None:
    code = "import sys; import perceive_adapter.ops; print('triton' in sys.modules)"
    assert run("-c", code, PERCEIVE_ADAPTER_KERNELS="none").stdout == "False\n"
