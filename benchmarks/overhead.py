"""Inference overhead: a wrapped network against the bare one, perception included.

    python benchmarks/overhead.py [--pairs 11] [--threads 2]
    python benchmarks/overhead.py --device cuda --dtype bfloat16 [--compile reduce-overhead]

Bare and wrapped runs alternate, after a check that both give the same output at step 0. The
prompts are then randomised, so that no branch is skipped. Prints medians, the quartiles of the
ratio, and the bar of the design, which is for a CPU in eager mode; for one image also what it takes
to compose the folded weights. `--profile` also prints where a bare and a wrapped run spend their
time.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from environment import describe
from spandrel.architectures.NAFNet import NAFNet
from spandrel_extra_arches.architectures.Restormer import Restormer
from torch import Tensor, nn

from perceive_adapter import PerceiveModel, wrap


def nafnet(width: int) -> nn.Module:
    return NAFNet(
        width=width, enc_blk_nums=[1, 1, 1, 28], middle_blk_num=1, dec_blk_nums=[1, 1, 1, 1]
    )


@dataclass(frozen=True)
class Case:
    """A network, the images that it restores, whole or in tiles, and the bar of the ratio."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    bar: str
    tile: int | None = None


CASES = {
    "Restormer, 2 blocks a level, 1 x 256 px": Case(
        lambda: Restormer(num_blocks=[2, 2, 2, 2], num_refinement_blocks=2),
        (1, 3, 256, 256),
        "1.08",
    ),
    "NAFNet-32, 1 x 512 px": Case(lambda: nafnet(32), (1, 3, 512, 512), "1.10"),
    "NAFNet-32, 8 different images of 256 px, unfolded": Case(
        lambda: nafnet(32), (8, 3, 256, 256), "1.25"
    ),
    "NAFNet-16, 1 x 2048 px in tiles of 512": Case(
        lambda: nafnet(16), (1, 3, 2048, 2048), "1.03", tile=512
    ),
}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def prepare(build: Callable[[], nn.Module], like: Tensor) -> tuple[nn.Module, PerceiveModel]:
    """The bare network, and the same wrapped, with prompts that do something."""
    torch.manual_seed(0)
    backbone = build().eval()
    for parameter in backbone.parameters():
        if not parameter.any():  # an untrained NAFNet's beta and gamma
            nn.init.normal_(parameter, std=0.1)
    backbone.to(like)
    bare = copy.deepcopy(backbone)
    model = wrap(backbone)
    image = like[..., :256, :256]
    if not torch.equal(model(image), bare(image)):
        raise SystemExit("parity failed: the wrapped output differs at step 0")
    for parameter in model.trainable_parameters():
        nn.init.normal_(parameter, std=0.02)
    return bare, model


Run = Callable[[], object]


@torch.no_grad()
def measure(bare: Run, wrapped: Run, device: torch.device, pairs: int) -> list[list[float]]:
    """Seconds of both, run in turn."""
    for run in (bare, wrapped):
        for _ in range(3 if device.type == "cuda" else 1):
            run()
    found: list[list[float]] = [[], []]
    for _ in range(pairs):
        for run, times in zip((bare, wrapped), found, strict=True):
            times.append(seconds(run, device))
    return found


def runs(case: Case, bare: nn.Module, model: PerceiveModel, image: Tensor) -> tuple[Run, Run]:
    if case.tile is None:
        return lambda: bare(image), lambda: model(image)

    def wrapped() -> Tensor:
        return model.restore(image, tile=case.tile)

    def untouched() -> Tensor:
        with model.disabled():
            return wrapped()

    return untouched, wrapped


@torch.no_grad()
def folding(model: PerceiveModel, image: Tensor) -> float:
    """Seconds that it takes to compose the folded weights."""
    seen = model.perceive(image)

    def fold() -> None:
        with model.fold(seen):
            pass

    return statistics.median(seconds(fold, image.device) for _ in range(11))


@torch.no_grad()
def profiled(run: Run, device: torch.device) -> str:
    """The operations that one run spends most on."""
    with torch.profiler.profile() as profile:
        seconds(run, device)
    key = f"self_{device.type}_time_total"
    table: str = profile.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=60)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--compile", nargs="?", const="default", metavar="MODE", help="of torch.compile"
    )
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="torch|spandrel")
    device, dtype = options.device, getattr(torch, options.dtype)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    way = f"compiled, {options.compile}" if options.compile else "eager"
    print(f"{describe()}; {where}, {options.dtype}, {way}, {options.pairs} pairs")
    for index in options.cases:
        name = list(CASES)[index]
        case = CASES[name]
        image = torch.rand(case.shape, generator=torch.Generator().manual_seed(0))
        image = image.to(device, dtype)
        with torch.no_grad():
            bare, model = prepare(case.build, image)
        if options.compile:
            torch._dynamo.reset()
            bare.compile(mode=options.compile)
            model.compile(mode=options.compile)
        both = runs(case, bare, model, image)
        of_bare, of_wrapped = measure(*both, device, options.pairs)
        ratios = [w / b for b, w in zip(of_bare, of_wrapped, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        usual = statistics.median(of_bare)
        print(
            f"{name}: bare {1e3 * usual:.2f} ms, wrapped {1e3 * statistics.median(of_wrapped):.2f} "
            f"ms, ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f}), bar {case.bar}",
            flush=True,
        )
        if options.profile:
            print(*(profiled(run, device) for run in both), sep="\n")
        if len(image) == 1 and case.tile is None and not options.compile:
            composed = folding(model, image)
            print(
                f"  composing folded weights {1e3 * composed:.2f} ms, {composed / usual:.2%} of a "
                "bare run (bar 2 %)"
            )


if __name__ == "__main__":
    main()
