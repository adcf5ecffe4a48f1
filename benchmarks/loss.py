"""What the difficulty-adaptive loss costs, and a training step with the whole objective.

    python benchmarks/loss.py [--pairs 11] [--threads 2]

1. The loss with its gradient, two medium images, against a straightforward version of the same
   features: frozen, all images in one batch, the paper's formula; with ours computed anew, and with
   the references' features computed before.
2. A training step of a wrapped NAFNet-32 on eight crops of 128 px, with the default objective and
   two medium images, against the same step with L1 alone.
3. Peak resident memory of such a step, each in a process of its own, against training all of the
   bare network with L1: with the C library's allocator as it is, which keeps much of what is given
   back and so counts its gaps, and told to keep nothing.

Runs alternate; printed are medians and the quartiles of the ratio, beside the bars of the design.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
from environment import describe, peak_gib
from spandrel.architectures.NAFNet import NAFNet
from torch import Tensor, nn

from perceive_adapter import DifficultyAdaptiveLoss, wrap
from perceive_adapter.losses import ClipAwareLoss, ObjectiveWeights, RestorationObjective
from perceive_adapter.losses.features import timm_features, tiny_features

SIDE, BATCH = 128, 8
# glibc returns at once what was mapped by itself: all larger than this, once it is told a number.
ALLOCATORS = {"as it is": {}, "nothing kept": {"MALLOC_MMAP_THRESHOLD_": "65536"}}
L1 = ObjectiveWeights(contrastive=0.0, clip_aware=0.0, difficulty_adaptive=0.0)


def images(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(BATCH, 3, SIDE, SIDE, generator=generator) for _ in range(count)]


def straightforward(features: nn.Module, weights: tuple[float, ...]) -> Callable[..., Tensor]:
    """The formula of the paper, with every image in one batch."""

    def loss(restored: Tensor, target: Tensor, degraded: Tensor, medium: list[Tensor]) -> Tensor:
        levels = features(restored)
        with torch.no_grad():
            others = [
                level.chunk(2 + len(medium))
                for level in features(torch.cat([target, degraded, *medium]))
            ]
        total = restored.new_zeros(())
        for weight, level, (of_target, of_degraded, *of_medium) in zip(
            weights, levels, others, strict=True
        ):
            push = 2 * (level - of_degraded).abs().mean()
            push = push + sum((level - of_one).abs().mean() for of_one in of_medium)
            total = total + weight * (level - of_target).abs().mean() / (push + 1e-7)
        return total

    return loss


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(
    name: str, run: Callable[[], object], other: Callable[[], object], pairs: int, bar: str
) -> None:
    """Print the ratio of two runs that take turns."""
    run(), other()
    ours, theirs = [], []
    for _ in range(pairs):
        theirs.append(seconds(other))
        ours.append(seconds(run))
    low, middle, high = statistics.quantiles(
        [a / b for a, b in zip(ours, theirs, strict=True)], n=4
    )
    print(
        f"| {name} | {statistics.median(ours):.3f} | {statistics.median(theirs):.3f} | "
        f"{middle:.2f} ({low:.2f} to {high:.2f}) | {bar} |",
        flush=True,
    )


def the_loss(pairs: int) -> None:
    restored, target, degraded, *medium = images(5)
    for name, features in (
        ("perceive-tiny", tiny_features()),
        ("VGG-16, random weights", timm_features("vgg16", pretrained=False)),
    ):
        loss = DifficultyAdaptiveLoss(features)
        plain = straightforward(features, features.weights)
        references = loss.references(target, degraded, medium)

        def gradient(compute: Callable[[Tensor], Tensor]) -> Callable[[], object]:
            def run() -> None:
                leaf = restored.clone().requires_grad_()
                compute(leaf).backward()

            return run

        anew = gradient(lambda x, loss=loss: loss(x, target, degraded, medium))
        kept = gradient(lambda x, loss=loss, kept=references: loss.compare(x, kept))
        other = gradient(lambda x, plain=plain: plain(x, target, degraded, medium))
        compare(f"loss, {name}", anew, other, pairs, "1.0")
        compare(f"loss, {name}, references kept", kept, other, pairs, "0.6")


def nafnet() -> NAFNet:
    torch.manual_seed(0)
    network = NAFNet(
        width=32, enc_blk_nums=[1, 1, 1, 28], middle_blk_num=1, dec_blk_nums=[1, 1, 1, 1]
    )
    for parameter in network.parameters():
        if not parameter.any():  # an untrained NAFNet's beta and gamma
            nn.init.normal_(parameter, std=0.1)
    return network


def step(whole: bool) -> Callable[[], object]:
    """A training step of a wrapped NAFNet-32, with the whole objective or with L1 alone."""
    model = wrap(nafnet(), is_trainable=True).train()
    weights = ObjectiveWeights() if whole else L1
    aware = ClipAwareLoss(model.perceiver) if whole else None
    objective = RestorationObjective(weights, clip_aware=aware)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-4)
    target, degraded, *medium = images(4)
    labels = torch.arange(BATCH) % 4

    def run() -> None:
        perception = model.perceive(degraded)
        restored = model(degraded, perception=perception)
        more = {}
        if whole:
            another_crop = model.injector.perceive(target).compact
            more = {"medium": medium, "anchor": perception.compact}
            more |= {"positive": another_crop, "labels": labels}
        optimizer.zero_grad()
        objective(restored, target, degraded=degraded, **more).total.backward()
        optimizer.step()

    return run


def memory(which: str) -> None:
    """Print the peak of one training step, for a process of its own."""
    if which == "wrapped":
        run = step(whole=True)
    else:
        network = nafnet().train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        target, degraded = images(2)

        def run() -> None:
            optimizer.zero_grad()
            nn.functional.l1_loss(network(degraded), target).backward()
            optimizer.step()

    run(), run()
    print(peak_gib())


def peak(which: str, threads: int, allocator: dict[str, str]) -> float:
    command = [sys.executable, __file__, "--memory", which, "--threads", str(threads)]
    environment = os.environ | allocator
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", choices=["wrapped", "bare"], help="measure this and stop")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="torch|spandrel")
    if options.memory:
        memory(options.memory)
        return
    print(f"{describe()}; CPU, {options.pairs} pairs, {BATCH} x {SIDE} px\n")
    print("| | ours, s | other, s | ratio | bar |\n|---|---|---|---|---|")
    the_loss(options.pairs)
    whole, alone = step(whole=True), step(whole=False)
    compare("step, default objective / L1 alone", whole, alone, options.pairs, "1.3")
    for name, allocator in ALLOCATORS.items():
        wrapped, bare = (peak(which, options.threads, allocator) for which in ("wrapped", "bare"))
        print(
            f"| peak memory of a step, {name}, GiB | {wrapped:.2f} | {bare:.2f} | "
            f"{wrapped / bare:.2f} | 1.0 |"
        )


if __name__ == "__main__":
    main()
