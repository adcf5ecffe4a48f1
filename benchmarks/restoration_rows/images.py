"""Images to choose on and to report on; neither is trained on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from perceive_adapter.data import FAMILIES, FAMILY_OF, mix
from perceive_adapter.data.pairs import find_pairs, read_pair
from perceive_adapter.data.photos import find_images, load_photos
from perceive_adapter.data.samples import as_file

TASKS = ("gaussian_noise", "rain", "haze", "low_light")
MIXTURES = ("gaussian_noise+rain", "haze+low_light", "jpeg+rain", "jpeg+haze")
UNSEEN = ("jpeg", "gaussian_blur", "motion_blur", "poisson_noise")
REAL = ("derain/Rain100H", "dehaze/SOTS_indoor", "lowlight", "denoise_real/PolyU", "deblur/GoPro")
SEVERITIES = (0.3, 0.6)
_REAL_EACH = 15  # pairs of each set, evenly spread, up to twice as many where it has fewer than 30


@dataclass(frozen=True)
class Case:
    """One degraded image (1, 3, H, W), its target, and the true severity, where it is known."""

    group: str
    degraded: Tensor
    target: Tensor
    severity: Tensor


def split(data: Path, held_out: int = 12) -> tuple[list[Tensor], list[Tensor]]:
    """Photographs to train on, and some of the same folder to choose on."""
    paths = find_images(data / "train" / "clean")
    step = len(paths) // held_out
    chosen = paths[::step][:held_out]
    return load_photos([path for path in paths if path not in chosen]), load_photos(
        chosen, largest=320
    )


def test_photos(data: Path, count: int) -> list[Tensor]:
    paths = find_images(data / "test" / "denoise" / "CBSD68" / "gt")
    return load_photos(paths[:: max(1, len(paths) // count)][:count])


def damaged(photos: Sequence[Tensor], tasks: Sequence[str]) -> list[Case]:
    """Every photograph with every damage, twice: mild and severe, rounded to 8 bits."""
    cases = []
    for task in tasks:
        for seed, photo in enumerate(photos):
            for severity in SEVERITIES:
                clean = photo[None].float() / 255
                names = dict.fromkeys(task.split("+"), severity)
                degraded = as_file(mix(clean, names, torch.Generator().manual_seed(seed)))
                known = torch.zeros(1, len(FAMILIES))
                for name in names:
                    known[0, FAMILIES.index(FAMILY_OF[name])] = severity
                cases.append(Case(task, degraded, clean, known))
    return cases


def real_pairs(data: Path) -> list[Case]:
    """The pairs of the test folder that no degradation here has made, of the sets that it has."""
    cases = []
    unknown = torch.full((1, len(FAMILIES)), torch.nan)
    for group in REAL:
        if not (data / "test" / group).exists():
            continue
        pairs = find_pairs(data / "test" / group).pairs
        for pair in pairs[:: max(1, len(pairs) // _REAL_EACH)]:
            degraded, target = (image[None].float() / 255 for image in read_pair(pair))
            cases.append(Case(group, degraded, target, unknown))
    return cases


@torch.no_grad()
def measure(restore: Callable[[Case], Tensor], cases: Sequence[Case]) -> dict[str, float]:
    """Mean RGB PSNR in dB of each group, whole images."""
    found: dict[str, list[float]] = {}
    for case in cases:
        restored = restore(case).clamp(0, 1)
        psnr = peak_signal_noise_ratio(restored, case.target, data_range=1.0)
        found.setdefault(case.group, []).append(float(psnr))
    return {group: sum(values) / len(values) for group, values in found.items()}
