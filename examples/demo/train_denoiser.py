"""Train the demo's backbone on Gaussian noise of random strength.

    python examples/demo/train_denoiser.py --data FOLDER_OF_JPEGS --out denoiser.safetensors

The figures that it logs are of photographs that it never trains on and are not used to choose
anything: the last checkpoint is the result.
"""

import argparse
import time
from pathlib import Path

import torch
from denoiser import build_denoiser, save_denoiser
from images import load_held_out, load_photos, random_crops
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio

BATCH = 8
CROP_SIDES = (64, 80, 96)
LONGEST_SIDES = (1000, 640)  # photographs at two scales: shrinking hides their own blur and noise
SIGMAS = (15, 25, 50)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of JPEG photographs")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=1000)
    return parser.parse_args()


@torch.no_grad()
def validate(denoiser: nn.Module) -> str:
    """PSNR on held-out photographs at each sigma, noisy and denoised."""
    report = []
    for sigma in SIGMAS:
        psnr = []
        for index, clean in enumerate(load_held_out(longest_side=320)):
            noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(index))
            noisy = (clean + sigma / 255 * noise)[None].clamp(0, 1)
            denoised = denoiser(noisy).clamp(0, 1)
            psnr.append(
                [
                    peak_signal_noise_ratio(image, clean[None], data_range=1.0).item()
                    for image in (noisy, denoised)
                ]
            )
        before, after = torch.tensor(psnr).mean(0).tolist()
        report.append(f"sigma {sigma}: {before:.2f} -> {after:.2f} dB")
    return ", ".join(report)


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    photos = [photo for side in LONGEST_SIDES for photo in load_photos(arguments.data, side)]
    if not photos:
        raise SystemExit(f"no *.jpg in {arguments.data}")
    denoiser = build_denoiser()
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=arguments.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps, eta_min=1e-6)
    started = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        side = CROP_SIDES[int(torch.randint(len(CROP_SIDES), (), generator=generator))]
        clean = random_crops(photos, BATCH, (side, side), generator)
        sigma = (5 + 45 * torch.rand(BATCH, 1, 1, 1, generator=generator)) / 255
        noise = sigma * torch.randn(clean.shape, generator=generator)
        noisy = (clean + noise).clamp(0, 1)
        loss = nn.functional.l1_loss(denoiser(noisy), clean)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % arguments.checkpoint_every == 0 or step == arguments.steps:
            save_denoiser(denoiser, arguments.out)
            minutes = (time.perf_counter() - started) / 60
            print(f"step {step:5d}, {minutes:4.1f} min, {validate(denoiser)}", flush=True)


if __name__ == "__main__":
    train(parse_arguments())
