"""Teach a trained Restormer from pairs of files, on one GPU or, by `accelerate launch`, on many.

    python examples/finetune_restormer.py --weights gaussian_color_denoising_blind.pth \
        --data all-in-one/ --out all-in-one-adapter

`all-in-one/` holds sets of pairs at any depth, such as derain/input and derain/gt, dehaze/hazy and
dehaze/clear. Restormer's code comes with `pip install spandrel_extra_arches`, on its own terms.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import spandrel_extra_arches
from accelerate import Accelerator
from spandrel import ModelLoader

from perceive_adapter import AdapterConfig, wrap
from perceive_adapter.data.pairs import find_pairs
from perceive_adapter.data.restoration import PairFiles, RestorationData
from perceive_adapter.training.stage2 import ADAPTER, train_restoration
from perceive_adapter.training.treated import find_treated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint of the network")
    parser.add_argument("--data", type=Path, required=True, help="sets of pairs, at any depth")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--side", type=int, default=256, help="pixels of a crop")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    arguments = parser.parse_args()

    spandrel_extra_arches.install(ignore_duplicates=True)
    backbone = ModelLoader(device="cpu").load_from_file(arguments.weights).model
    model = wrap(backbone, config=AdapterConfig(level="cross_attention"))

    found = find_pairs(arguments.data, broken="skip")
    print(f"{found.counts()}, skipped {len(found.skipped)}")
    source = PairFiles(found.pairs, broken="skip")
    data = RestorationData([source], context=arguments.side, patch=arguments.side // 2)
    model.treat(*find_treated(model, data))
    model.print_trainable_parameters()

    accelerator = Accelerator(mixed_precision=arguments.precision)
    train_restoration(
        model,
        data,
        recipe=replace(ADAPTER, schedule=ADAPTER.schedule.with_steps(arguments.steps), ema=0.999),
        accelerator=accelerator,
        checkpoint=arguments.out / "state.pt",
    )
    if accelerator.is_main_process:
        model.save_pretrained(arguments.out)
        print(f"Saved in {str(arguments.out)!r}.")


if __name__ == "__main__":
    main()
