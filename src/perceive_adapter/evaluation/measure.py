"""PSNR and SSIM of every image, for several networks side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from perceive_adapter.data.samples import as_file
from perceive_adapter.errors import BackboneError, ImageError, PerceiveError
from perceive_adapter.evaluation.cases import Case
from perceive_adapter.injection.restore import is_out_of_memory

__all__ = ["Measured", "Restore", "check_measurable", "compare"]

Restore = Callable[[Tensor], Tensor]
"""From a degraded image (1, 3, H, W) in [0, 1] to the restored one."""

DEGRADED = "degraded"
_ALIKE = 100.0
_BORDER = 5  # half of SSIM's window of 11 pixels


@dataclass(frozen=True)
class Measured:
    """What one network made of one image.

    Args:
        group: whose mean it counts in.
        image: name of the image, which no other one of the group has.
        network: name of the network; ``degraded`` for the image as it was given.
        psnr: in dB, of RGB in 8 bits; 100 at most, for images that are alike.
        ssim: in [-1, 1], of the same, without the five pixels of the border.
    """

    group: str
    image: str
    network: str
    psnr: float
    ssim: float


@torch.no_grad()
def compare(
    networks: Mapping[str, Restore],
    cases: Iterable[Case],
    *,
    device: torch.device | str = "cpu",
    skipped: list[str] | None = None,
    keep: Callable[[Case, dict[str, Tensor]], None] | None = None,
) -> list[Measured]:
    """Restore every case with every network and measure it, the degraded image first.

    Args:
        networks: by name.
        cases: what is restored.
        device: where the images go.
        skipped: takes what is wrong with each case that cannot be read, is too small to be
            measured, or that a network fails on, which then is left out; None for an error.
        keep: called with each case and its images, (3, H, W) by name, ``degraded`` and ``target``
            among them.

    Raises:
        ImageError: an image is too small to be measured, or a network gives another size.
        BackboneError: a network fails on an image.
    """
    found: list[Measured] = []
    for case in cases:
        try:
            degraded, target = (image.to(device) for image in case.load())
            check_measurable(degraded, target, case.image)
        except ImageError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        images = {DEGRADED: degraded}
        try:
            for name, restore in networks.items():
                images[name] = _restored(restore, degraded, case)
        except BackboneError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        found += [
            Measured(case.group, case.image, name, *_metrics(image, target, case.image))
            for name, image in images.items()
        ]
        if keep is not None:
            keep(case, {**{n: image[0] for n, image in images.items()}, "target": target[0]})
    return found


def _restored(restore: Restore, degraded: Tensor, case: Case) -> Tensor:
    try:
        return as_file(restore(degraded.clone()).float())  # some write into their input
    except Exception as error:  # whatever a network raises for an image that it was not made for
        height, width = degraded.shape[-2:]
        told = (
            str(error) if isinstance(error, PerceiveError) else f"{type(error).__name__}: {error}"
        )
        remedy = " Restore it in tiles, such as --tile 512." if is_out_of_memory(error) else ""
        raise BackboneError(
            f"{case.image} of {case.group}, {width} x {height} pixels, cannot be restored: {told}."
            f"{remedy} Or leave such images out, with --broken skip."
        ) from error


def check_measurable(image: Tensor, target: Tensor, name: str) -> None:
    """Raise ImageError unless PSNR and SSIM can compare images (..., H, W)."""
    if min(target.shape[-2:]) <= _BORDER:
        raise ImageError(
            f"{name} has {target.shape[-2]} x {target.shape[-1]} pixels: SSIM needs more than "
            f"{_BORDER} on every side. Leave it out."
        )
    if image.shape != target.shape:
        raise ImageError(
            f"a network made {tuple(image.shape)} of {name}, whose target has "
            f"{tuple(target.shape)}: expected the same size; upscalers are not evaluated here."
        )


def _metrics(image: Tensor, target: Tensor, name: str) -> tuple[float, float]:
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    check_measurable(image, target, name)
    psnr = peak_signal_noise_ratio(image, target, data_range=1.0)
    _, ssim = structural_similarity_index_measure(
        image, target, data_range=1.0, return_full_image=True
    )
    if min(ssim.shape[-2:]) > 2 * _BORDER:  # published figures leave out what was padded
        ssim = ssim[..., _BORDER:-_BORDER, _BORDER:-_BORDER]
    return min(float(psnr), _ALIKE), float(ssim.mean())
