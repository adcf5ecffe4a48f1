"""Operations on feature maps: pure torch, what Inductor makes of it, and ours, side by side.

    python benchmarks/ops.py [--dtype bfloat16] [--sides 32 64 128 256] [--out results.csv]

On a GPU ours is a fused kernel, checked first against double precision; on a CPU it is the form of
pure torch that is used there. Every row is the median of alternating runs, with the quartiles of
ours, and the bandwidth that the bytes which must move at least come to, as a part of what a copy
reaches on this machine. `--out` writes the rows as CSV, and beside them a plot of the cost as the
side grows.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from environment import describe
from torch import Tensor

from perceive_adapter.ops import (
    add_low_rank,
    distances,
    low_rank,
    modulate,
    modulation,
    reference_distances,
)

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 7.8e-3}
RANK, REFERENCES = 8, 4
Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Operation:
    """Two ways to compute the same.

    Args:
        ours: what the package calls.
        plain: pure torch, step by step.
        inputs: of features (B, C, H, W); those that come first receive gradients.
        trained: how many do.
        moved: numbers that must be read or written, per number of the features.
    """

    ours: Run
    plain: Run
    inputs: Callable[[Tensor], list[Tensor]]
    trained: int
    moved: float


def per_channel(x: Tensor, channels: int | None = None) -> Tensor:
    return torch.rand(x.shape[0], channels or x.shape[1], 1, 1, device=x.device, dtype=x.dtype)


def branch(x: Tensor) -> list[Tensor]:
    low = torch.randn_like(x[:, :1]).repeat(1, RANK, 1, 1)
    up = torch.randn(x.shape[1], RANK, 1, 1, device=x.device, dtype=x.dtype)
    return [x, low, up, per_channel(x, RANK)]


OPERATIONS = {
    "modulate": Operation(
        modulate, modulation.reference, lambda x: [x, per_channel(x), per_channel(x)], 3, 2
    ),
    "add_low_rank": Operation(add_low_rank, low_rank.reference, branch, 4, 2),
    "reference_distances": Operation(
        reference_distances,
        distances.reference,
        lambda x: [x, torch.randn((REFERENCES, *x.shape), device=x.device).to(x.dtype)],
        1,
        1 + REFERENCES,
    ),
}


@dataclass
class Timing:
    """One row: milliseconds, their ratios, and the part of the copy bandwidth that ours reaches."""

    operation: str
    direction: str
    shape: str
    eager_ms: float
    inductor_ms: float | None
    ours_ms: float
    ours_low_ms: float
    ours_high_ms: float
    of_copy: float


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def alternate(runs: dict[str, Callable[[], object]], device: torch.device) -> dict[str, list]:
    """Times of each, run in turn."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(3 + 15):
        for name, run in runs.items():
            spent = milliseconds(run, device)
            if turn >= 3:
                found[name].append(spent)
    return found


def forward(run: Run, inputs: list[Tensor]) -> Callable[[], object]:
    def measured() -> None:
        with torch.no_grad():
            run(*inputs)

    return measured


def training(run: Run, inputs: list[Tensor], trained: int) -> Callable[[], object]:
    leaves = [x.detach().requires_grad_(i < trained) for i, x in enumerate(inputs)]
    weight = torch.randn_like(run(*leaves))

    def measured() -> None:
        torch.autograd.grad(run(*leaves), leaves[:trained], weight)

    return measured


def check(operation: Operation, inputs: list[Tensor]) -> None:
    """Raise if ours is not what double precision gives."""
    exact = operation.plain(*[x.double() for x in inputs])
    error = (operation.ours(*inputs).double() - exact).abs().max() / exact.abs().max()
    if error > TOLERANCE[inputs[0].dtype]:
        raise SystemExit(f"parity failed: {error:.1e}")


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes here."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source), device) for _ in range(11)]
    return 2e3 * source.numel() * source.element_size() / statistics.median(times)


def measure(
    name: str, shape: tuple[int, ...], arguments: argparse.Namespace, peak: float
) -> list[Timing]:
    operation, device = OPERATIONS[name], torch.device(arguments.device)
    x = torch.randn(shape, device=device).to(getattr(torch, arguments.dtype))
    inputs = operation.inputs(x)
    check(operation, inputs)
    ways: dict[str, Run] = {"eager": operation.plain, "ours": operation.ours}
    if arguments.inductor:
        torch._dynamo.reset()
        ways["inductor"] = torch.compile(operation.plain, dynamic=False)
    rows = []
    for direction in ("forward", "and backward"):
        runs = {
            way: forward(run, inputs)
            if direction == "forward"
            else training(run, inputs, operation.trained)
            for way, run in ways.items()
        }
        found = alternate(runs, device)
        low, middle, high = statistics.quantiles(found["ours"], n=4)
        moved = operation.moved if direction == "forward" else 2 * operation.moved + 1
        bandwidth = 1e3 * moved * x.numel() * x.element_size() / middle
        inductor = statistics.median(found["inductor"]) if "inductor" in found else None
        eager = statistics.median(found["eager"])
        rows.append(
            Timing(
                name, direction, "x".join(map(str, shape)), eager, inductor, middle, low, high,
                bandwidth / peak,
            )
        )  # fmt: skip
        print(shown(rows[-1]), flush=True)
    return rows


def shown(row: Timing) -> str:
    inductor = "" if row.inductor_ms is None else f"{row.inductor_ms:.3f}"
    return (
        f"| {row.operation}, {row.direction} | {row.shape} | {row.eager_ms:.3f} | {inductor} | "
        f"{row.ours_ms:.3f} ({row.ours_low_ms:.3f} to {row.ours_high_ms:.3f}) | "
        f"{row.eager_ms / row.ours_ms:.2f} | {row.of_copy:.2f} |"
    )


def plot(rows: list[Timing], file: Path) -> None:
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row.operation for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        chosen = [r for r in rows if r.operation == name and r.direction == "forward"]
        sides = [int(r.shape.split("x")[-1]) for r in chosen]
        axis.loglog(sides, [r.eager_ms for r in chosen], "o-", label="pure torch")
        if all(r.inductor_ms is not None for r in chosen):
            axis.loglog(sides, [r.inductor_ms for r in chosen], "o-", label="Inductor")
        axis.loglog(sides, [r.ours_ms for r in chosen], "o-", label="ours")
        axis.set(title=name, xlabel="side in pixels", ylabel="milliseconds, forward")
        axis.legend()
    figure.tight_layout()
    figure.savefig(file)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[128, 256, 512, 1024, 2048] if gpu else [64, 128]
    )
    parser.add_argument("--no-inductor", dest="inductor", action="store_false")
    parser.add_argument("--out", type=Path, help="CSV file, with a plot beside it")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    peak = copy_bandwidth(device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{describe()}; {where}, {arguments.dtype}, a copy reaches {peak / 1e9:.0f} GB/s\n")
    print("| | shape | pure torch, ms | Inductor, ms | ours, ms | gain | of a copy |")
    print("|---|---|---|---|---|---|---|")
    shapes = [(8 if side <= 256 else 1, 48, side, side) for side in arguments.sides]
    shapes.append((8, 384, 32, 32))
    rows = [
        row
        for name in arguments.operations
        for shape in shapes
        for row in measure(name, shape, arguments, peak)
    ]
    if arguments.out:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(map(asdict, rows))
        plot([row for row in rows if "x48x" in row.shape], arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
