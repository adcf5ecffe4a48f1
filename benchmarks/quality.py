"""What restores best at equal steps: LoRA, everything, or a wrapped network; and what helps it.

    python benchmarks/quality.py --data DIR
    python benchmarks/quality.py --data DIR --backbone nafnet-32 --workers 12 --seeds 0

A small network that was trained on noise alone (the demo's NAFNet, or a Restormer or a SwinIR,
which are trained for it first; on a GPU also a NAFNet-32 and a Restormer as published) learns
noise, rain, haze and low light in the ways of `restoration_rows/rows.py`, by the same loop, on the
same samples. A row that names its learning rates is trained with each of them at seed 0, and keeps
the one with the best mean PSNR on photographs that were set aside from DIR/train/clean; every row
is then trained with every seed, and reported on DIR/test, whole images in RGB.

Rows that name none take over those of another, so they are measured where that one is at its best.
Rates are tuned with the NAFNet alone; a Restormer and a SwinIR take them over. `--rates` gives
rates that were tuned elsewhere.
Every finished run is kept in out/quality under its settings, weights included, so that the command
goes on where it was stopped, and what one machine trained another may measure. It does not notice
changes of the code: delete the folder after them. Several processes may share the work, each with
its own `--rows`. Sets of real pairs that DIR lacks are left out.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from copy import copy
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from environment import describe
from restoration_rows.backbones import BACKBONES, load_backbone
from restoration_rows.images import (
    MIXTURES,
    TASKS,
    UNSEEN,
    Case,
    damaged,
    measure,
    real_pairs,
    split,
)
from restoration_rows.images import test_photos as load_test_photos
from restoration_rows.rows import ROWS, Row
from restoration_rows.tables import report
from safetensors.torch import load_file, save_file
from torch import nn

import perceive_adapter
from perceive_adapter import PerceiveModel, QualityPerceiver
from perceive_adapter.data.contents import photos_digest
from perceive_adapter.data.restoration import CleanPhotos, RestorationData
from perceive_adapter.data.samples import CropSampler
from perceive_adapter.training.loop import Schedule
from perceive_adapter.training.stage2 import Stage2, train_restoration

KEPT = Path("out/quality")
BATCH, CONTEXT, PATCH = 8, 128, 64


class Bench:
    """The images, and the runs that are finished."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        KEPT.mkdir(parents=True, exist_ok=True)
        self.arguments = arguments
        trained_on, chosen_on = split(arguments.data)
        self.photos = CropSampler(trained_on)
        self.validation = damaged(chosen_on, TASKS)
        photos = load_test_photos(arguments.data, arguments.images)
        others = damaged(photos[::2], (*MIXTURES, *UNSEEN))
        self.test = damaged(photos, TASKS) + others + real_pairs(arguments.data)
        self.perceiver = QualityPerceiver.from_pretrained("perceive-tiny").fingerprint()
        self.trained_on, self.tested_on = photos_digest(self.photos), images_digest(self.test)

    @property
    def tuning(self) -> "Bench":
        """The same images, with the network that learning rates are tuned with."""
        tuning = copy(self)
        tuning.arguments = argparse.Namespace(**{**vars(self.arguments), "backbone": "nafnet"})
        return tuning

    def backbone(self) -> nn.Module:
        """The denoiser, as it was trained."""
        arguments = self.arguments
        return load_backbone(arguments.backbone, self.photos, KEPT, cpu=arguments.cpu)

    def bare(self) -> dict[str, dict[str, float]]:
        """Measure the backbone untouched."""
        backbone = self.backbone()
        file = self._file({"row": "backbone"})
        found = json.loads(file.read_text()) if file.exists() else {"trainable": 0, "tests": {}}
        if self.tested_on not in found["tests"]:
            found["tests"][self.tested_on] = measure(lambda c: backbone(c.degraded), self.test)
            keep(file, found)
        return {**found, "test": found["tests"][self.tested_on]}

    def rate(self, name: str) -> float:
        """Return the row's learning rate, tuned on the validation photographs."""
        like = ROWS[name].like or name
        if like in self.arguments.rates:
            return self.arguments.rates[like]
        runs = {rate: self.tuning.run(like, 0, rate) for rate in ROWS[like].rates}
        means = {rate: _mean(run["validation"]) for rate, run in runs.items()}
        return max(means, key=means.__getitem__)

    def run(self, name: str, seed: int, rate: float) -> dict:
        """Train once, measure on the validation photographs and keep the weights; or read them."""
        row = ROWS[name]
        settings = {"row": name, "seed": seed, "rate": rate, "weights": repr(row.weights)}
        file = self._file(settings)
        if not file.exists():
            checkpoint = file.with_suffix(".pt")
            model = self.train(row, seed, rate, checkpoint)
            device = next(model.parameters()).device
            found = {**settings, "on": describe(device), "tests": {}}
            trained = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
            save_file(trained, file.with_suffix(".safetensors"))
            found["treats"] = treats(model)
            found["trainable"] = sum(p.numel() for p in trained.values())
            found["validation"] = measure(row.restore(model.eval()), self.validation)
            keep(file, found)
            checkpoint.unlink()
            print(
                f"{name}, seed {seed}, rate {rate:g}: {_mean(found['validation']):.2f}", flush=True
            )
        return json.loads(file.read_text())

    def tested(self, name: str, seed: int, rate: float) -> dict:
        """Measure a run on the test images, once."""
        found, row = self.run(name, seed, rate), ROWS[name]
        if self.tested_on not in found["tests"]:
            file = self._file({k: found[k] for k in ("row", "seed", "rate", "weights")})
            model = row.make(self.backbone(), self.data(row, seed)).eval()
            if treats(model) != found["treats"]:
                raise SystemExit(f"{name} treats other degradations now; delete {file}")
            with torch.no_grad():
                for key, value in load_file(file.with_suffix(".safetensors")).items():
                    model.get_parameter(key).copy_(value)
            model.to(Accelerator(cpu=self.arguments.cpu).device)
            found["tests"][self.tested_on] = measure(row.restore(model), self.test)
            keep(file, found)
            shown = [f"{found['tests'][self.tested_on][task]:.2f}" for task in TASKS]
            print(f"{name}, seed {seed}, tested: {', '.join(shown)}", flush=True)
        return {**found, "test": found["tests"][self.tested_on]}

    def data(self, row: Row, seed: int) -> RestorationData:
        source = CleanPhotos(self.photos, row.tasks)
        return RestorationData([source], context=CONTEXT, patch=PATCH, ratios=row.ratios, seed=seed)

    def train(self, row: Row, seed: int, rate: float, checkpoint: Path) -> nn.Module:
        """Make the row's model and train it, on from its checkpoint where there is one."""
        data = self.data(row, seed)
        set_seed(seed)
        model = row.make(self.backbone(), data)
        steps = self.arguments.steps
        schedule = Schedule(steps, rate, rate / 100, warmup=steps // 10)
        train_restoration(
            model,
            data,
            recipe=Stage2(schedule, batch=BATCH, weights=row.weights, probe_every=steps),
            objective=row.objective(model),
            perceive=row.told(),
            accelerator=Accelerator(cpu=self.arguments.cpu),
            checkpoint=checkpoint,
            every=250,
            workers=self.arguments.workers,
        )
        return model

    def _file(self, settings: dict) -> Path:
        """Where a run is kept: by all that decides its weights."""
        arguments = self.arguments
        decides = {**settings, "steps": arguments.steps, "backbone": arguments.backbone}
        decides["photographs"] = self.trained_on
        if settings["row"] in ROWS and ROWS[settings["row"]].perceives:
            decides["perceiver"] = self.perceiver
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
        return KEPT / f"{digest}.json"


def treats(model: nn.Module) -> list[int] | None:
    """What a wrapped model treats."""
    columns = model.injector.config.treats if isinstance(model, PerceiveModel) else None
    return None if columns is None else list(columns)


def images_digest(cases: Sequence[Case]) -> str:
    """Tell sets of images to measure on apart."""
    # Coarse, since the last bits hang on the number of threads.
    told = " ".join(f"{case.group} {case.degraded.mean():.3f}" for case in cases)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def keep(file: Path, found: dict) -> None:
    draft = file.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps({**found, "version": perceive_adapter.__version__}, indent=1))
    draft.replace(file)


def _mean(values: dict[str, float]) -> float:
    return sum(values[task] for task in TASKS) / len(TASKS)


def rate_of_row(text: str) -> tuple[str, float]:
    """Read NAME=RATE."""
    name, _, rate = text.rpartition("=")
    if name not in ROWS:
        raise argparse.ArgumentTypeError(f"{name!r} names no row")
    return name, float(rate)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", choices=BACKBONES, default="nafnet")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--images", type=int, default=16, help="test photographs for each damage")
    parser.add_argument(
        "--rates", type=rate_of_row, nargs="+", default=[], metavar="ROW=RATE", help="not tuned"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that draw samples")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--out", type=Path, help="Markdown file to write the tables to")
    arguments = parser.parse_args(argv)
    arguments.rates = dict(arguments.rates)
    return arguments


def trained_where(rows: dict[str, list[dict]]) -> list[str]:
    """Say which runs were trained on which machine."""
    found: dict[str, list[str]] = {}
    for name, runs in rows.items():
        for run in runs:
            found.setdefault(run["on"], []).append(f"{name} {run['seed']}")
    return [f"Trained on {on}: {'; '.join(names)}" for on, names in found.items()]


def main() -> None:
    arguments = parse_arguments()
    bench = Bench(arguments)
    bare = bench.bare()
    rows = {}
    for name in arguments.rows:
        rate = bench.rate(name)
        rows[name] = [bench.tested(name, seed, rate) for seed in arguments.seeds]
    steps = f"{arguments.backbone}, {arguments.steps} steps, seeds {arguments.seeds}"
    text = "\n".join([describe(), steps, *trained_where(rows), "", *report(bare, rows), ""])
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
