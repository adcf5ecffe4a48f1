"""Compile every kernel for a GPU, which needs none: what the interpreter lets pass, this does not.

python tests/ops/compile_kernels.py
"""

import itertools

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from perceive_adapter.ops.kernels import distances, low_rank, sums

TARGET = GPUTarget("cuda", 90, 32)
FORWARD = [
    {"BLOCK_C": c, "BLOCK_N": n, "BLOCK_R": r, "GATED": gated, "ONCE": once, "WIDE": False}
    for c, n, r, gated, once in (
        (16, 128, 16, True, True),
        (64, 64, 64, True, False),
        (16, 128, 16, False, False),
    )
]
BACKWARD = [
    {"BLOCK_C": c, "BLOCK_N": n, "BLOCK_R": r, "AHEAD": 3, "GATED": gated, "WIDE": False}
    for c, n, r, gated in ((64, 128, 16, True), (512, 32, 64, True), (64, 128, 16, False))
]
APART = [{**options, "UP_C": 64, "UP_N": 128} for options in BACKWARD]
OF_UP = ("sums_ptr", "gate_sums_ptr", "up_ptr")  # in single precision, as parameters are
DISTANCES = [{"BLOCK_N": 4, "BLOCK": 1024}]
AHEAD = [
    {"BLOCK_N": n, "BLOCK": 4096 // n, "AHEAD": ahead} for n, ahead in ((4, 4), (1, 2), (8, 1))
]
SUMS = [{"BLOCK_P": parts, "BLOCK": numbers} for parts, numbers in ((128, 16), (512, 8))]
KERNELS = (
    (low_rank._forward, FORWARD, ("up_ptr",)),
    (low_rank._backward, BACKWARD, OF_UP),
    (low_rank._backward_apart, APART, OF_UP),
    (distances._forward, AHEAD, ("sums_ptr",)),
    (distances._backward, DISTANCES, ("grad_ptr",)),
    (sums._sum, SUMS, ("parts_ptr",)),
    (sums._sum_both, SUMS, ("parts_ptr", "other_parts_ptr")),
)


def compile_kernel(
    kernel: JITFunction, constants: dict, single: tuple[str, ...], unit: str
) -> None:
    """Compile for bfloat16, and strides of one where their names end in ``unit``.

    Pointers named in ``single`` are to single precision.
    """
    known, signature = dict(constants), {}
    if "LAST" in kernel.arg_names:
        known["LAST"] = unit == "_c"
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            signature[name] = "*fp32" if name in single else "*bf16"
        elif name in known or name.endswith(unit):
            known.setdefault(name, 1)
            signature[name] = "constexpr"
        else:
            signature[name] = "i32"
    triton.compile(ASTSource(kernel, signature, known), target=TARGET)


if __name__ == "__main__":
    for kernel, options, single in KERNELS:
        for constants, unit in itertools.product(options, ("_n", "_c")):
            compile_kernel(kernel, constants, single, unit)
    print("compiled")
