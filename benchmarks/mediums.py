"""Where stage 1's medium images come from: half-trained restorers, or cheaper means.

    python benchmarks/mediums.py --data DIR [--steps 400] [--images 12] [--out FILE.md]

Tier prompts are trained on perceive-tiny's frozen towers three times, at equal steps on the same
scenes of DIR/train/clean: with the outputs of two half-trained restorers, each on the photographs
that it never saw, as the paper has it; with blends of degraded and clean image; with the same
damage, less severe. Each is then audited on photographs of DIR/test/denoise/CBSD68/gt with each
kind of medium. A source is worth its cost if prompts trained with it hold on all three.
"""

import argparse
import copy
from dataclasses import replace
from pathlib import Path

from environment import describe

from perceive_adapter import QualityPerceiver
from perceive_adapter.data.photos import find_images, load_photos
from perceive_adapter.data.samples import CropSampler
from perceive_adapter.data.triplets import Blend, Medium, Milder, Restored
from perceive_adapter.perceiver.audit import audit
from perceive_adapter.training.restorers import train_restorers
from perceive_adapter.training.stage1 import TINY, train_perceiver


def untrained(perceiver: QualityPerceiver) -> QualityPerceiver:
    """The same towers with the prompts as they were drawn, and without heads."""
    prompts = copy.deepcopy(perceiver.prompts)
    prompts.context.data.copy_(prompts.initial)
    return QualityPerceiver(perceiver.towers, prompts, replace(perceiver.config, degradations=()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--images", type=int, default=12, help="photographs to audit on")
    parser.add_argument("--checkpoints", type=Path, help="folder of the restorers' checkpoints")
    parser.add_argument("--out", type=Path, help="Markdown file to write the tables to")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    photos = load_photos(find_images(arguments.data / "train" / "clean"), largest=1200)
    folds = [CropSampler(photos[fold::2]) for fold in range(2)]
    test = find_images(arguments.data / "test" / "denoise" / "CBSD68" / "gt")
    held_out = load_photos(test[:: max(1, len(test) // arguments.images)])
    restorers = train_restorers(folds, folder=arguments.checkpoints, every=250)
    mediums: dict[str, Medium] = {
        "restored": Restored(restorers),
        "blend": Blend(),
        "milder": Milder(),
    }
    towers = QualityPerceiver.from_pretrained("perceive-tiny")
    # Without graded images, which are the same for every source and order the tiers by themselves.
    recipe = replace(TINY, graded=0.0, schedule=replace(TINY.schedule, steps=arguments.steps))
    lines = [
        describe(),
        f"{arguments.steps} steps, {len(photos)} photographs; audit on {len(held_out)} others.",
        "",
        "| trained with | audited with | tier accuracy | worst | triplets right | monotonic |",
        "|---|---|---|---|---|---|",
    ]
    for trained_with, medium in mediums.items():
        perceiver = untrained(towers)
        train_perceiver(perceiver, folds, recipe=recipe, mediums=[medium])
        for audited_with, other in mediums.items():
            figures = audit(perceiver, held_out, medium=other).figures()
            mean, worst = figures["mean"], figures["worst"]
            cells = (mean["tier accuracy"], worst["tier accuracy"])
            cells += (mean["triplets right"], mean["monotonic"])
            row = " | ".join(f"{cell:.3f}" for cell in cells)
            lines.append(f"| {trained_with} | {audited_with} | {row} |")
            print(lines[-1], flush=True)
    text = "\n".join([*lines, ""])
    print(f"\n{text}")
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
