"""What perception is worth: one frozen denoiser, the same prompts, steered by different knowledge.

    python benchmarks/perception_worth.py --data DIR

A NAFNet that only knows noise (the demo's) is wrapped and trained on noise, rain, haze and low
light, at equal steps on the same batches. What differs is what steers the prompts:

- none: the same constant for every image, so that the adapter is a plain low-rank one;
- compact: the compact features, learned jointly with the contrastive loss of the paper;
- perceive-tiny: presence and severity of each degradation, as the bundled, frozen perceiver tells
  them, in training and in the test;
- wrap's default: compact features and what perceive-tiny says, as `wrap(backbone)` does;
- oracle: the true degradation, which nobody knows in practice;
- oracle with severity: its true severity too.

DIR/train/clean is trained on, DIR/test/denoise/CBSD68/gt is reported on, whole images. The share
that a row closes is its distance from "none" over that of the oracle, in mean PSNR. Every finished
row is kept in out/perception_worth, and not run again with the same settings, perceiver and
degradations.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from environment import describe
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo"))
from denoiser import load_denoiser

from perceive_adapter import AdapterConfig, PerceiveModel, Perception, QualityPerceiver, wrap
from perceive_adapter.data import FAMILIES, FAMILY_OF, degrade
from perceive_adapter.data.photos import find_images, load_photos
from perceive_adapter.data.samples import CropSampler, as_file
from perceive_adapter.losses import DegradationContrastiveLoss

NAMES = ("gaussian_noise", "rain", "haze", "low_light")
COLUMNS = torch.tensor([FAMILIES.index(FAMILY_OF[name]) for name in NAMES])
TOLD = {"degradations": len(FAMILIES), "severity": len(FAMILIES)}
BATCH, CONTEXT, PATCH = 8, 128, 64  # perceived at 128 px, restored at 64 px
BARE = "backbone alone"
PERCEIVED = ("perceive-tiny", "wrap's default")
KEPT = Path("out/perception_worth")
TEST_SEVERITIES = (0.3, 0.6)


@dataclass(frozen=True)
class Batch:
    """Damaged crops of several degradations, (B, 3, H, W), and what is true of them."""

    clean: Tensor
    degraded: Tensor
    kinds: Tensor
    severity: Tensor


@dataclass(frozen=True)
class Row:
    """A way to steer the prompts."""

    sources: dict[str, int]
    perceive: Callable[[PerceiveModel, Batch], Perception]
    contrastive: bool = False
    perceiver: QualityPerceiver | Literal[False] = False


def told(kinds: Tensor, severity: Tensor) -> Perception:
    columns = COLUMNS[kinds][:, None]
    present = torch.zeros(len(kinds), len(FAMILIES))
    return Perception(
        degradations=present.scatter(1, columns, 1.0),
        severity=present.scatter(1, columns, severity[:, None]),
    )


def make_rows(perceiver: QualityPerceiver) -> dict[str, Row]:
    @torch.no_grad()
    def perceived(_: PerceiveModel, batch: Batch) -> Perception:
        seen = perceiver(batch.degraded)
        return Perception(degradations=seen.degradations, severity=seen.severity)

    def constant(_: PerceiveModel, batch: Batch) -> Perception:
        same = torch.full((len(batch.kinds), len(FAMILIES)), 0.5)
        return Perception(degradations=same, severity=same)

    return {
        "none": Row(TOLD, constant),
        "compact": Row(
            {"compact": 64}, lambda model, batch: model.perceive(batch.degraded), contrastive=True
        ),
        "perceive-tiny": Row(TOLD, perceived),
        "wrap's default": Row(
            {},
            lambda model, batch: model.perceive(batch.degraded),
            perceiver=perceiver,
        ),
        "oracle": Row(
            TOLD, lambda _, batch: told(batch.kinds, torch.full_like(batch.severity, 0.5))
        ),
        "oracle with severity": Row(TOLD, lambda _, batch: told(batch.kinds, batch.severity)),
    }


def draw(sampler: CropSampler, generator: torch.Generator) -> Batch:
    clean = sampler.draw(BATCH, CONTEXT, generator)
    kinds = torch.arange(BATCH) % len(NAMES)
    severity = torch.rand(BATCH, generator=generator)
    degraded = degrade(clean, [NAMES[kind] for kind in kinds], severity, generator)
    return Batch(clean, degraded, kinds, severity)


def train(row: Row, sampler: CropSampler, steps: int, seed: int) -> PerceiveModel:
    torch.manual_seed(seed)
    config = AdapterConfig(sources=row.sources or None)
    model = wrap(load_denoiser(), config=config, perceiver=row.perceiver)
    model.train()
    parameters = list(model.trainable_parameters())
    optimizer = torch.optim.Adam(parameters)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    contrast = DegradationContrastiveLoss()
    for _ in tqdm(range(steps), ncols=80, leave=False):
        batch = draw(sampler, generator)
        perception = row.perceive(model, batch)
        top, left = torch.randint(CONTEXT - PATCH + 1, (2,), generator=generator).tolist()
        window = (..., slice(top, top + PATCH), slice(left, left + PATCH))
        loss = F.l1_loss(model(batch.degraded[window], perception=perception), batch.clean[window])
        if row.contrastive:
            half = batch.degraded.flip(3)[..., : CONTEXT // 2]
            neighbour = model.perceive(half).compact
            loss = loss + 0.1 * contrast(perception.compact, neighbour, batch.kinds)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def make_tests(photos: Sequence[Tensor]) -> list[Batch]:
    tests = []
    for kind, name in enumerate(NAMES):
        for seed, photo in enumerate(photos):
            for severity in torch.tensor(TEST_SEVERITIES).split(1):
                clean = photo[None].float() / 255
                generator = torch.Generator().manual_seed(seed)
                degraded = as_file(degrade(clean, name, severity, generator))
                tests.append(Batch(clean, degraded, torch.tensor([kind]), severity))
    return tests


@torch.no_grad()
def measure(restore: Callable[[Batch], Tensor], tests: Sequence[Batch]) -> list[float]:
    """Return the mean PSNR of each degradation."""
    sums = torch.zeros(len(NAMES), 2)
    for batch in tests:
        restored = restore(batch).clamp(0, 1)
        psnr = peak_signal_noise_ratio(restored, batch.clean, data_range=1.0)
        sums[batch.kinds] += torch.tensor([float(psnr), 1.0])
    return (sums[:, 0] / sums[:, 1]).tolist()


def report(rows: dict[str, list[float]]) -> list[str]:
    names = [name.replace("_", " ") for name in NAMES]
    lines = [f"| steered by | {' | '.join(names)} | mean | closes |", "|---" * 7 + "|"]
    means = {name: sum(row) / len(row) for name, row in rows.items()}
    distance = means["oracle"] - means["none"]
    for name, row in rows.items():
        share = f"{(means[name] - means['none']) / distance:.0%}" if name != BARE else ""
        cells = " | ".join(f"{psnr:.2f}" for psnr in (*row, means[name]))
        lines.append(f"| {name} | {cells} | {share} |")
    lost = rows[BARE][0] - rows["perceive-tiny"][0]
    share = (means["perceive-tiny"] - means["none"]) / distance
    lines += [
        "",
        f"perceive-tiny closes {share:.0%} of the distance (bar: 80 %); "
        f"the denoiser's own task loses {lost:.2f} dB (bar: 0.5).",
    ]
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--perceiver", default="perceive-tiny")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--images", type=int, default=16, help="test images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--rows", nargs="+", help="only these; a table needs none, perceive-tiny and oracle"
    )
    parser.add_argument("--out", type=Path, help="Markdown file to write the table to")
    return parser.parse_args()


def run_row(
    name: str,
    row: Row,
    sampler: CropSampler,
    tests: Sequence[Batch],
    arguments: argparse.Namespace,
    perceiver: str,
) -> list[float]:
    """Train and measure a row for every seed, and return the means; finished runs are kept."""
    runs = []
    # Coarse, since the last bits hang on the number of threads.
    damage = hashlib.sha256(str([f"{batch.degraded.mean():.3f}" for batch in tests]).encode())
    for seed in arguments.seeds:
        settings = {
            "row": name,
            "seed": seed,
            "steps": arguments.steps,
            "images": arguments.images,
            "damage": damage.hexdigest()[:16],
            "perceiver": perceiver if name in PERCEIVED else None,
            "torch": torch.__version__,
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        file = KEPT / f"{digest}.json"
        if not file.exists():
            start = time.perf_counter()
            model = train(row, sampler, arguments.steps, seed)
            psnr = measure(lambda b, m=model: m(b.degraded, perception=row.perceive(m, b)), tests)
            KEPT.mkdir(parents=True, exist_ok=True)
            seconds = time.perf_counter() - start
            file.write_text(json.dumps({**settings, "psnr": psnr, "seconds": seconds}, indent=2))
        runs.append(json.loads(file.read_text())["psnr"])
        print(f"{name}, seed {seed}: {[round(value, 2) for value in runs[-1]]}", flush=True)
    return torch.tensor(runs).mean(0).tolist()


def main() -> None:
    arguments = parse_arguments()
    perceiver = QualityPerceiver.from_pretrained(arguments.perceiver)
    rows = make_rows(perceiver)
    sampler = CropSampler(load_photos(find_images(arguments.data / "train" / "clean")))
    test = find_images(arguments.data / "test" / "denoise" / "CBSD68" / "gt")
    tests = make_tests(load_photos(test[:: max(1, len(test) // arguments.images)]))
    denoiser = load_denoiser()
    results = {BARE: measure(lambda batch: denoiser(batch.degraded), tests)}
    for name in arguments.rows or rows:
        found = run_row(name, rows[name], sampler, tests, arguments, perceiver.fingerprint())
        results[name] = found
    if not results.keys() >= {"none", "oracle", "perceive-tiny"}:
        return
    seeds = f"{arguments.steps} steps, seeds {arguments.seeds}, {len(tests)} damaged images"
    text = "\n".join([describe(), seeds, "", *report(results), ""])
    print(f"\n{text}")
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
