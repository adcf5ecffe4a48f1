"""Operations on feature maps: pure torch, what Inductor makes of it, and ours, side by side.

    python benchmarks/ops.py [--dtype bfloat16] [--sides 32 64 128 256] [--out results.csv]

On a GPU ours is a fused kernel inside torch.compile; on a CPU it is the form of pure torch that is
used there. It is checked first against double precision. Every row is the median of alternating
runs, with the quartiles of ours, and the bandwidth that the bytes which must move at least come to,
as a part of what a copy reaches on this machine, a large one and one of just as many bytes. On a
GPU a run is the replay of a CUDA graph over several inputs, more than its cache holds, so that
launches cost nothing; what a call in eager mode costs the host is printed beside.
`--out` writes the rows as CSV, and beside them a plot of the cost as the side grows.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from environment import describe
from torch import Tensor

from perceive_adapter.injection.plan import Layout
from perceive_adapter.ops import add_low_rank, distances, reference_distances

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 7.8e-3}
RANK, REFERENCES = 8, 4
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
UNCACHED = 2**28  # bytes of inputs that no cache holds
Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Operation:
    """Two ways to compute the same.

    Args:
        ours: what the package calls.
        plain: pure torch, step by step.
        inputs: of features (B, C, H, W); those that come first receive gradients.
        trained: how many do.
        moved: of C channels, numbers that must be read or written per number of the features:
            forward, and with the backward pass.
    """

    ours: Run
    plain: Run
    inputs: Callable[[Tensor], list[Tensor]]
    trained: int
    moved: Callable[[int], tuple[float, float]]


def branch(x: Tensor) -> list[Tensor]:
    low = torch.randn_like(x[:, :RANK])
    up = torch.randn(x.shape[1], RANK, device=x.device, dtype=x.dtype)
    return [x, low, up, torch.rand(x.shape[0], RANK, device=x.device, dtype=x.dtype)]


def step_by_step(x: Tensor, low: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    return x + F.conv2d(low * gate[..., None, None], up[..., None, None])


def together(x: Tensor, low: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    layout = Layout()
    wide, narrow = (layout.rows(maps, len(gate)) for maps in (x, low))
    return layout.from_rows(add_low_rank(wide, narrow, up, gate), x)


OPERATIONS = {
    "add_low_rank": Operation(
        together, step_by_step, branch, 4, lambda c: (2 + RANK / c, 3 + 3 * RANK / c)
    ),
    "reference_distances": Operation(
        reference_distances,
        distances.reference,
        lambda x: [x, torch.stack([torch.randn_like(x) for _ in range(REFERENCES)])],
        1,
        lambda _: (1 + REFERENCES, 2 * (1 + REFERENCES) + 1),
    ),
}


@dataclass
class Timing:
    """One row: milliseconds, and ours as a part of the bandwidth of copies."""

    operation: str
    direction: str
    shape: str
    layout: str
    eager_ms: float
    inductor_ms: float | None
    ours_ms: float
    ours_low_ms: float
    ours_high_ms: float
    of_copy: float
    of_like_copy: float
    eager_call_ms: float
    ours_call_ms: float


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


def call_milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """What the host spends on one run, which on a GPU does not wait for the result."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def recorded(run: Callable[[], object]) -> Callable[[], object]:
    """The same on a GPU, as a CUDA graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def alternate(
    runs: dict[str, list[Callable[[], object]]], device: torch.device
) -> dict[str, list[float]]:
    """Times of one run of each, in turn; each has several, over inputs of their own."""

    def in_a_row(several: list[Callable[[], object]]) -> Callable[[], object]:
        return lambda: [run() for run in several]

    whole = {name: in_a_row(several) for name, several in runs.items()}
    if device.type == "cuda":
        whole = {name: recorded(run) for name, run in whole.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(3 + 15):
        for name, run in whole.items():
            spent = milliseconds(run, device) / len(runs[name])
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


def check(ours: Run, operation: Operation, inputs: list[Tensor]) -> None:
    """Raise if ours is not what double precision gives."""
    exact = operation.plain(*[x.double() for x in inputs])
    error = (ours(*inputs).double() - exact).abs().max() / exact.abs().max()
    if error > TOLERANCE[inputs[0].dtype]:
        raise SystemExit(f"parity failed: {error:.1e}")


def copies(
    numbers: int, dtype: torch.dtype, device: torch.device, count: int
) -> list[Callable[[], object]]:
    """Copies of so many numbers, each to another place."""
    source, target = torch.rand((2, count, numbers), dtype=dtype, device=device)
    pairs = zip(target, source, strict=True)
    return [lambda to=to, of=of: to.copy_(of) for to, of in pairs]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes here."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source), device) for _ in range(11)]
    return 2e3 * source.numel() * source.element_size() / statistics.median(times)


def measure(
    name: str, shape: tuple[int, ...], layout: str, arguments: argparse.Namespace, peak: float
) -> list[Timing]:
    operation, device = OPERATIONS[name], torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype)

    def draw() -> list[Tensor]:
        x = torch.randn(shape, device=device, dtype=dtype)
        return operation.inputs(x.to(memory_format=FORMATS[layout]))

    sets = [draw()]
    numbers, moved_by = sets[0][0].numel(), operation.moved(shape[1])
    if device.type == "cuda":
        several = UNCACHED // (moved_by[0] * numbers * dtype.itemsize)
        sets += [draw() for _ in range(min(20, max(1, int(several))))]
    torch._dynamo.reset()
    ways: dict[str, Run] = {"eager": operation.plain, "ours": operation.ours}
    if arguments.inductor:
        ways["inductor"] = torch.compile(operation.plain, dynamic=False)
    if device.type == "cuda":  # where the kernels are for
        ways["ours"] = torch.compile(operation.ours, dynamic=False)
    check(ways["ours"], operation, sets[0])

    def prepared(run: Run, inputs: list[Tensor], direction: str) -> Callable[[], object]:
        if direction == "forward":
            return forward(run, inputs)
        return training(run, inputs, operation.trained)

    rows = []
    for direction, moved in zip(("forward", "and backward"), moved_by, strict=True):
        runs = {
            way: [prepared(run, inputs, direction) for inputs in sets] for way, run in ways.items()
        }
        runs["copy"] = copies(round(moved * numbers / 2), dtype, device, len(sets))
        found = alternate(runs, device)
        calls = {}
        for way, run in (("eager", operation.plain), ("ours", operation.ours)):
            called = prepared(run, sets[0], direction)
            called()
            calls[way] = statistics.median(call_milliseconds(called, device) for _ in range(15))
        low, middle, high = statistics.quantiles(found["ours"], n=4)
        bandwidth = 1e3 * moved * numbers * dtype.itemsize / middle
        inductor = statistics.median(found["inductor"]) if "inductor" in found else None
        eager = statistics.median(found["eager"])
        rows.append(
            Timing(
                name, direction, "x".join(map(str, shape)), layout, eager, inductor, middle, low,
                high, bandwidth / peak, statistics.median(found["copy"]) / middle,
                calls["eager"], calls["ours"],
            )
        )  # fmt: skip
        print(shown(rows[-1]), flush=True)
    return rows


def shown(row: Timing) -> str:
    inductor = "" if row.inductor_ms is None else f"{row.inductor_ms:.4f}"
    return (
        f"| {row.operation}, {row.direction} | {row.shape}, {row.layout} | {row.eager_ms:.4f} | "
        f"{inductor} | {row.ours_ms:.4f} ({row.ours_low_ms:.4f} to {row.ours_high_ms:.4f}) | "
        f"{row.eager_ms / row.ours_ms:.2f} | {row.of_copy:.2f}, {row.of_like_copy:.2f} | "
        f"{row.eager_call_ms:.3f}, {row.ours_call_ms:.3f} |"
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
    parser.add_argument("--layouts", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--no-inductor", dest="inductor", action="store_false")
    parser.add_argument("--out", type=Path, help="CSV file, with a plot beside it")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    peak = copy_bandwidth(device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{describe()}; {where}, {arguments.dtype}, a copy reaches {peak / 1e9:.0f} GB/s\n")
    print(
        "| | shape | pure torch, ms | Inductor, ms | ours, ms | gain | of a copy: large, like it | "
        "call, ms: pure torch, ours |"
    )
    print("|---" * 8 + "|")
    shapes = [(8 if side <= 256 else 1, 48, side, side) for side in arguments.sides]
    shapes.append((8, 384, 32, 32))
    rows = [
        row
        for name in arguments.operations
        for layout in arguments.layouts
        for shape in shapes
        for row in measure(name, shape, layout, arguments, peak)
    ]
    if arguments.out:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(map(asdict, rows))
        first = [r for r in rows if "x48x" in r.shape and r.layout == arguments.layouts[0]]
        plot(first, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
