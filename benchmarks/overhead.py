"""Inference overhead: a wrapped network against the bare one, perception included.

    python benchmarks/overhead.py [--pairs 11] [--threads 2]

Bare and wrapped runs alternate, after a check that both give the same output at step 0. The
prompts are then randomised, so that no branch is skipped. Prints medians, the quartiles of the
ratio, and the bar of the design.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from spandrel.architectures.NAFNet import NAFNet
from spandrel_extra_arches.architectures.Restormer import Restormer
from torch import Tensor, nn

from perceive_adapter import PerceiveModel, wrap

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


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def prepare(build: Callable[[], nn.Module], image: Tensor) -> PerceiveModel:
    torch.manual_seed(0)
    backbone = build().eval()
    for parameter in backbone.parameters():
        if not parameter.any():  # an untrained NAFNet's beta and gamma
            nn.init.normal_(parameter, std=0.1)
    bare = backbone(image)
    model = wrap(backbone)
    if not torch.equal(model(image), bare):
        raise SystemExit("parity failed: the wrapped output differs at step 0")
    for parameter in model.trainable_parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


@torch.no_grad()
def measure(model: PerceiveModel, image: Tensor, pairs: int) -> tuple[list[float], list[float]]:
    bare, wrapped = [], []
    for index in range(pairs + 1):
        with model.disabled():
            bare.append(seconds(lambda: model(image)))
        wrapped.append(seconds(lambda: model(image)))
        if index == 0:  # warm-up
            bare.clear()
            wrapped.clear()
    return bare, wrapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="torch|spandrel")
    print(f"torch {torch.__version__}, CPU, {options.threads} threads, {options.pairs} pairs")
    for name, (build, shape, bar) in CASES.items():
        image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            model = prepare(build, image)
        bare, wrapped = measure(model, image, options.pairs)
        ratios = [w / b for b, w in zip(bare, wrapped, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name}: bare {statistics.median(bare):.3f} s, wrapped "
            f"{statistics.median(wrapped):.3f} s, ratio {middle:.3f} "
            f"(quartiles {low:.3f} to {high:.3f}), bar {bar}"
        )


if __name__ == "__main__":
    main()
