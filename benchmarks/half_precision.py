"""Half precision: how far bf16 and fp16 are from fp32, wrapped and bare, on photographs.

    python benchmarks/half_precision.py [--side 128] [--photographs 4]

Everything is converted, ``model.to(dtype)`` with its image, or run under autocast. The prompts are
randomised, so that none is the identity. A network's own rounding is in the rows of the bare one;
what the prompts and a perception in half precision add is the difference to them. Outputs that are
not finite are counted and left out of the differences.

A second table looks for what overflows first in fp16, whose largest number is 65504: the features
that the bare network's first convolution gives are doubled until a module gives something that is
not finite, or that is a tenth off what it gives in fp32, as a normalisation does whose variance is
infinite.
"""

import argparse
import contextlib
import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import skimage.data
import torch
from environment import describe
from spandrel.architectures.NAFNet import NAFNet
from spandrel.architectures.SwinIR import SwinIR
from spandrel_extra_arches.architectures.Restormer import Restormer
from torch import Tensor, nn

from perceive_adapter import PerceiveModel, wrap

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo"))
from denoiser import load_denoiser

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
MODES = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "autocast bf16": (torch.bfloat16, True),
    "autocast fp16": (torch.float16, True),
}


def nafnet() -> nn.Module:
    network = NAFNet(
        width=32, enc_blk_nums=[1, 1, 1, 4], middle_blk_num=1, dec_blk_nums=[1, 1, 1, 1]
    )
    for name, parameter in network.named_parameters():
        if name.endswith(("beta", "gamma")):  # zeros, behind which nothing could overflow
            nn.init.normal_(parameter, std=0.5)
    return network


def restormer() -> nn.Module:
    return Restormer(dim=16, num_blocks=[1, 1, 1, 1], num_refinement_blocks=1)


def swinir(img_size: int = 64) -> nn.Module:
    return SwinIR(
        upscale=1, img_size=img_size, window_size=8, embed_dim=32, depths=[2, 2], num_heads=[2, 2]
    )


def swinir_of_this_size() -> nn.Module:
    return swinir(128)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "NAFNet-16, trained (the demo's denoiser)": load_denoiser,
    "NAFNet-32, random weights": nafnet,
    "Restormer, random weights": restormer,
    "SwinIR, random weights": swinir,
    "SwinIR with img_size=128, random weights": swinir_of_this_size,
}
RUNS = ("bare", "wrapped, folded", "wrapped, a batch")


def photographs(count: int, side: int) -> Tensor:
    """The middle of each, (B, 3, side, side) in [0, 1]."""
    crops = []
    for name in PHOTOGRAPHS[:count]:
        pixels = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1) / 255
        top, left = ((length - side) // 2 for length in pixels.shape[1:])
        crops.append(pixels[:, top : top + side, left : left + side])
    return torch.stack(crops)


def prepare(build: Callable[[], nn.Module]) -> PerceiveModel:
    torch.manual_seed(0)
    model = wrap(build().eval())
    for parameter in model.trainable_parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def run(model: PerceiveModel, images: Tensor, how: str) -> Tensor:
    if how == "wrapped, a batch":
        return model(images).float()
    with model.disabled() if how == "bare" else contextlib.nullcontext():
        return torch.cat([model(image[None]) for image in images]).float()


def first_overflow(model: PerceiveModel, image: Tensor) -> str:
    """At which gain of the first features which module of the bare network overflows in fp16."""
    full, half = copy.deepcopy(model), copy.deepcopy(model).half()
    for power in range(1, 15):
        for network in (full, half):
            first = next(m for m in network.backbone.modules() if isinstance(m, nn.Conv2d))
            for parameter in first.parameters():
                parameter.mul_(2)
        try:
            pairs = zip(outputs(full, image), outputs(half, image.half()), strict=True)
        except RuntimeError as error:  # a network that mixes dtypes by itself
            return f"- | fails: {error}"
        for (module, expected), (_, actual) in pairs:
            off = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
            if not off < 0.1:
                return f"{2**power} | {module}, {100 * off:.0f} % off"
    return f"beyond {2**14} | -"


def outputs(model: PerceiveModel, image: Tensor) -> list[tuple[str, Tensor]]:
    """What every module of the bare network gives, in the order of execution."""
    found: list[tuple[str, Tensor]] = []
    with contextlib.ExitStack() as stack:
        for name, module in model.backbone.named_modules():

            def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor):
                    found.append((f"`{name}`, a {type(module).__name__}", output.float()))

            stack.callback(module.register_forward_hook(note).remove)
        run(model, image, "bare")
    return found


def cell(actual: Tensor, expected: Tensor) -> str:
    finite = actual.isfinite()
    difference = (actual - expected)[finite].abs()
    lost = int((~finite).sum())
    told = f"{difference.max():.1e} / {difference.mean():.1e}" if finite.any() else "-"
    return f"{told}, {lost} not finite" if lost else told


def rows(name: str, model: PerceiveModel, images: Tensor) -> list[str]:
    expected = {how: run(model, images, how) for how in RUNS}
    cells: dict[str, list[str]] = {how: [] for how in RUNS}
    for dtype, casts in MODES.values():
        half = model if casts else copy.deepcopy(model).to(dtype)
        given = images if casts else images.to(dtype)
        with torch.autocast("cpu", dtype) if casts else contextlib.nullcontext():
            for how in RUNS:
                try:
                    cells[how].append(cell(run(half, given, how), expected[how]))
                except RuntimeError as error:  # a network that mixes dtypes by itself
                    cells[how].append(f"fails: {error}")
    return [f"| {name} | {how} | {' | '.join(cells[how])} |" for how in RUNS]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--photographs", type=int, default=4, choices=range(1, 5))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch|spandrel")
    print(f"{describe()}, {options.photographs} photographs of {options.side} px\n")
    print("Difference to fp32 in [0, 1], largest / mean:\n")
    print(f"| network | run | {' | '.join(MODES)} |")
    print("|---" * (2 + len(MODES)) + "|")
    images = photographs(options.photographs, options.side)
    models = {name: prepare(build) for name, build in NETWORKS.items()}
    for name, model in models.items():
        print(*rows(name, model, images), sep="\n", flush=True)
    print("\nWhat overflows first in fp16:\n")
    print("| network | gain of the first features | module |\n|---|---|---|")
    for name, model in models.items():
        print(f"| {name} | {first_overflow(model, images[:1])} |", flush=True)


if __name__ == "__main__":
    main()
