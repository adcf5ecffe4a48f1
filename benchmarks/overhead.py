"""Inference overhead: a wrapped network against the bare one, perception included.

    python benchmarks/overhead.py [--pairs 11] [--threads 2]
    python benchmarks/overhead.py --device cuda --dtype bfloat16 --compile reduce-overhead

Bare and wrapped runs alternate, after a check that both give the same output at step 0. The
prompts are then randomised, so that no branch is skipped. Prints medians, the quartiles of the
ratio, and the bar of the design, which is for a CPU in eager mode.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from environment import describe
from spandrel.architectures.NAFNet import NAFNet
from spandrel_extra_arches.architectures.Restormer import Restormer
from torch import Tensor, nn

from perceive_adapter import wrap

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "Restormer, 2 blocks a level, 1 x 256 px": (
        lambda: Restormer(num_blocks=[2, 2, 2, 2], num_refinement_blocks=2),
        (1, 3, 256, 256),
        "1.08",
    ),
    "NAFNet-32, 1 x 512 px": (
        lambda: NAFNet(
            width=32, enc_blk_nums=[1, 1, 1, 28], middle_blk_num=1, dec_blk_nums=[1, 1, 1, 1]
        ),
        (1, 3, 512, 512),
        "1.10",
    ),
    "NAFNet-32, 8 different images of 256 px, unfolded": (
        lambda: NAFNet(
            width=32, enc_blk_nums=[1, 1, 1, 28], middle_blk_num=1, dec_blk_nums=[1, 1, 1, 1]
        ),
        (8, 3, 256, 256),
        "1.25",
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


def prepare(build: Callable[[], nn.Module], image: Tensor) -> tuple[nn.Module, nn.Module]:
    """The bare network, and the same wrapped, with prompts that do something."""
    torch.manual_seed(0)
    backbone = build().eval()
    for parameter in backbone.parameters():
        if not parameter.any():  # an untrained NAFNet's beta and gamma
            nn.init.normal_(parameter, std=0.1)
    backbone.to(image)
    bare = copy.deepcopy(backbone)
    model = wrap(backbone)
    if not torch.equal(model(image), bare(image)):
        raise SystemExit("parity failed: the wrapped output differs at step 0")
    for parameter in model.trainable_parameters():
        nn.init.normal_(parameter, std=0.02)
    return bare, model


@torch.no_grad()
def measure(
    bare: nn.Module, model: nn.Module, image: Tensor, pairs: int
) -> tuple[list[float], list[float]]:
    for run in (bare, model):
        for _ in range(3 if image.is_cuda else 1):
            run(image)
    found: tuple[list[float], list[float]] = [], []
    for _ in range(pairs):
        for run, times in zip((bare, model), found, strict=True):
            times.append(seconds(lambda run=run: run(image), image.device))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--compile", nargs="?", const="default", metavar="MODE", help="of torch.compile"
    )
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
        build, shape, bar = CASES[name]
        image = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        with torch.no_grad():
            bare, model = prepare(build, image)
        if options.compile:
            torch._dynamo.reset()
            bare.compile(mode=options.compile)
            model.compile(mode=options.compile)
        of_bare, of_wrapped = measure(bare, model, image, options.pairs)
        ratios = [w / b for b, w in zip(of_bare, of_wrapped, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name}: bare {1e3 * statistics.median(of_bare):.2f} ms, wrapped "
            f"{1e3 * statistics.median(of_wrapped):.2f} ms, ratio {middle:.3f} "
            f"(quartiles {low:.3f} to {high:.3f}), bar {bar}",
            flush=True,
        )


if __name__ == "__main__":
    main()
