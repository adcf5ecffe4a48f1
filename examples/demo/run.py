"""Adapt a denoiser to rain, haze and low light with `perceive_adapter.wrap`.

    python examples/demo/run.py

The backbone is a small NAFNet that knows nothing but noise. It stays frozen; only the prompt
modules that `wrap` plugs into it are trained, for a few minutes on a two-core CPU. Results go
to `out/demo`: a grid of images and the adapter, which a fresh process loads for comparison.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from denoiser import load_denoiser
from finetune import Batch, Stage, draw_batches, learn_to_perceive, learn_to_restore
from images import load_held_out, load_photos
from report import count_told, damage, draw_grid, print_table, restore_all
from safetensors.torch import save_file
from torch import Tensor

from perceive_adapter import PerceiveModel, wrap
from perceive_adapter.losses import ObjectiveWeights

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Size:
    """How much work the demo does."""

    perceive: Stage
    restore: Stage
    crop_sides: tuple[int, ...]
    longest_side: int  # of the photographs that are reported on


SIZES = {
    "full": Size(
        perceive=Stage(steps=300, batch=32, learning_rate=4e-3),
        restore=Stage(steps=1000, batch=8, learning_rate=2e-3),
        crop_sides=(48, 64, 96),
        longest_side=384,
    ),
    "small": Size(
        perceive=Stage(steps=4, batch=4, learning_rate=4e-3),
        restore=Stage(steps=4, batch=4, learning_rate=3e-3),
        crop_sides=(32, 48),
        longest_side=64,
    ),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive, help="steps of learning to restore")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--difficulty-adaptive",
        type=float,
        default=0.0,
        metavar="WEIGHT",
        help="of that loss (the paper's: 0.1), which draws dots in so short a training",
    )
    parser.add_argument("--size", choices=SIZES, default="full", help="small: a smoke test")
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main() -> int:
    arguments = parse_arguments()
    sys.stdout.reconfigure(line_buffering=True)  # in step with the progress bar, also in a pipe
    size = SIZES[arguments.size]
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)

    denoiser = load_denoiser()
    held_out = load_held_out(size.longest_side)
    cases = damage(held_out)
    before = restore_all(denoiser, cases)

    print("The backbone: a NAFNet, trained on Gaussian noise and nothing else. Wrapped and frozen:")
    model = wrap(denoiser)
    model.print_trainable_parameters()
    model.treat("rain", "haze", "low_light")  # leaves the denoiser alone where there is none
    print(f"Told apart by the bundled perceiver, unasked: {count_told(model.perceiver, cases)}.")

    photos = load_photos(HERE / "photos", longest_side=512)
    print(f"\nFine-tuning on noise, rain, haze and low light over {len(photos)} photographs:")
    restore = replace(size.restore, steps=arguments.steps or size.restore.steps)
    weights = ObjectiveWeights(difficulty_adaptive=arguments.difficulty_adaptive)
    fine_tune(model, photos, replace(size, restore=restore), weights, arguments.seed)

    after = restore_all(model, cases)
    print(f"\nOn {len(held_out)} photographs that neither has trained on:\n")
    print_table(cases, before, after)

    grid = draw_grid(cases, before, after, arguments.out / "grid.png")
    print(f"\nBefore and after, as images: {grid}")
    return check_reload(model, cases[0].degraded, arguments.out)


def fine_tune(
    model: PerceiveModel,
    photos: Sequence[Tensor],
    size: Size,
    weights: ObjectiveWeights,
    seed: int,
) -> None:
    """First what is wrong with an image, then what to do about it."""
    generator = torch.Generator().manual_seed(seed)

    def batches(stage: Stage) -> Iterator[Batch]:
        return draw_batches(photos, size.crop_sides, stage, generator)

    model.train()
    learn_to_perceive(model, batches(size.perceive), size.perceive)
    learn_to_restore(model, batches(size.restore), size.restore, weights)
    model.eval()


def check_reload(model: PerceiveModel, degraded: Tensor, out: Path) -> int:
    """Save the adapter and compare the outputs of a fresh process; its exit code."""
    adapter = out / "adapter"
    model.save_pretrained(adapter)
    weights = adapter / "adapter_model.safetensors"
    print(f"The adapter: {adapter}, {weights.stat().st_size / 1e6:.2f} MB")
    example = out / "example.safetensors"
    with torch.no_grad():
        save_file({"degraded": degraded, "restored": model(degraded)}, example)
    command = [sys.executable, str(HERE / "reload.py"), str(adapter), str(example)]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
