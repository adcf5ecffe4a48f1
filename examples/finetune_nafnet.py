"""Teach a trained NAFNet more than it was trained for; its own weights stay as they are.

    python examples/finetune_nafnet.py --weights NAFNet-width32.pth --data photos/ --out rainy

`photos/` holds clean photographs, which are degraded while they are drawn. The adapter works where
it perceives what the network cannot undo by itself, and leaves the network alone otherwise.
`perceive-adapter finetune` does the same and more: it takes pairs of files too, sets some images
aside, and measures the network alone and wrapped on them.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from spandrel import ModelLoader

from perceive_adapter import wrap
from perceive_adapter.data.pairs import find_photos
from perceive_adapter.data.photos import load_photos
from perceive_adapter.data.restoration import CleanPhotos, RestorationData
from perceive_adapter.data.samples import CropSampler
from perceive_adapter.training.stage2 import ADAPTER, train_restoration
from perceive_adapter.training.treated import find_treated

TASKS = ("gaussian_noise", "rain", "haze", "low_light")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint of the network")
    parser.add_argument("--data", type=Path, required=True, help="clean photographs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=256, help="pixels of a crop")
    arguments = parser.parse_args()

    backbone = ModelLoader(device="cpu").load_from_file(arguments.weights).model
    model = wrap(backbone)

    photos = CropSampler(load_photos(find_photos(arguments.data)))
    side = arguments.side
    data = RestorationData([CleanPhotos(photos, TASKS)], context=side, patch=side // 2)
    model.treat(*find_treated(model, data))
    model.print_trainable_parameters()

    recipe = replace(ADAPTER, schedule=ADAPTER.schedule.with_steps(arguments.steps))
    train_restoration(model, data, recipe=recipe, checkpoint=arguments.out / "state.pt")
    model.save_pretrained(arguments.out)
    print(f"Saved in {str(arguments.out)!r}.")


if __name__ == "__main__":
    main()
