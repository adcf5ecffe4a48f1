"""Tiled restoration: memory of a 24-megapixel photograph, and how far tiles are from the whole.

    python benchmarks/tiling.py [--skip-memory]

Memory is the peak resident set of a process of its own. The differences are those between
``restore(image)`` and ``restore(image, tile=...)`` with randomised prompts, in [0, 1]: rounding for
a purely local network, more where a network pools over the whole image.
"""

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
from environment import peak_gib
from spandrel.architectures.NAFNet import NAFNet
from spandrel.architectures.SwinIR import SwinIR
from spandrel_extra_arches.architectures.Restormer import Restormer
from torch import nn

from perceive_adapter import PerceiveModel, wrap

BAR_GIB = 4


def local() -> nn.Module:
    """Convolutions with one level of stride 2; its output depends on 9 pixels around at most."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 12, 3, padding=1),
        nn.PixelShuffle(2),
    )


def nafnet16() -> nn.Module:
    return NAFNet(width=16, enc_blk_nums=[1, 1, 1, 1], middle_blk_num=1, dec_blk_nums=[1, 1, 1, 1])


def restormer() -> nn.Module:
    return Restormer(dim=16, num_blocks=[1, 1, 1, 1], num_refinement_blocks=1)


def swinir() -> nn.Module:
    return SwinIR(
        upscale=1, img_size=64, window_size=8, embed_dim=32, depths=[2, 2], num_heads=[2, 2]
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "local convolutions": local,
    "NAFNet-16 (global pooling)": nafnet16,
    "Restormer, small (global channel attention)": restormer,
    "SwinIR, small (windows)": swinir,
}


def wrapped(build: Callable[[], nn.Module]) -> PerceiveModel:
    torch.manual_seed(0)
    backbone = build()
    for parameter in backbone.parameters():
        if not parameter.any():  # an untrained NAFNet's beta and gamma
            nn.init.normal_(parameter, std=0.1)
    model = wrap(backbone)
    for parameter in model.trainable_parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def print_differences() -> None:
    image = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    print("| network | overlap | largest difference | mean difference |")
    print("|---|---|---|---|")
    for name, build in NETWORKS.items():
        model = wrapped(build)
        whole = model.restore(image)
        for overlap in (32, 64):
            difference = (model.restore(image, tile=256, overlap=overlap) - whole).abs()
            print(f"| {name} | {overlap} | {difference.max():.1e} | {difference.mean():.1e} |")


def restore_photograph() -> None:
    """Restore 6000 x 4000 uint8 pixels and print seconds and peak memory of this process."""
    model = wrapped(nafnet16)
    image = torch.randint(0, 256, (3, 4000, 6000), dtype=torch.uint8)
    start = time.perf_counter()
    result = model.restore(image, tile=512)
    assert result.shape == image.shape
    print(
        f"6000 x 4000 through a wrapped NAFNet-16, tiles of 512 px: "
        f"{time.perf_counter() - start:.0f} s, peak {peak_gib():.2f} GiB (bar {BAR_GIB} GiB)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--photograph", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch|spandrel")
    if options.photograph:
        restore_photograph()
        return
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads")
    print_differences()
    if not options.skip_memory:
        subprocess.run([sys.executable, __file__, "--photograph"], check=True)


if __name__ == "__main__":
    main()
