"""The networks that rows are made of, trained on noise alone: small, and as published for a GPU."""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from spandrel.architectures.NAFNet import NAFNet
from spandrel.architectures.SwinIR import SwinIR
from spandrel_extra_arches.architectures.Restormer import Restormer
from torch import Tensor, nn

from perceive_adapter.data.restoration import CleanPhotos, RestorationData
from perceive_adapter.data.samples import CropSampler
from perceive_adapter.losses import ObjectiveWeights
from perceive_adapter.training.loop import Schedule
from perceive_adapter.training.stage2 import Stage2, train_restoration

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "demo"))
from denoiser import load_denoiser

__all__ = ["BACKBONES", "load_backbone"]

_STEPS = 3000
_L1 = ObjectiveWeights(contrastive=0.0, clip_aware=0.0, difficulty_adaptive=0.0)
_BUILD = {
    "restormer": partial(
        Restormer, dim=16, num_blocks=[1, 1, 1, 2], num_refinement_blocks=1, heads=[1, 2, 4, 8]
    ),
    "swinir": partial(
        SwinIR,
        upscale=1,
        img_size=64,
        window_size=8,
        img_range=1.0,
        depths=[2, 2, 2],
        embed_dim=36,
        num_heads=[3, 3, 3],
        mlp_ratio=2,
        drop_path_rate=0.0,
        resi_connection="1conv",
    ),
    "nafnet-32": partial(
        NAFNet, width=32, enc_blk_nums=[1, 1, 1, 28], middle_blk_num=1, dec_blk_nums=[1, 1, 1, 1]
    ),
    "restormer-48": Restormer,
}
BACKBONES = ("nafnet", *_BUILD)


class Padded(nn.Module):
    """Continues images by their mirror image to sides that the network takes, and cuts that off."""

    def __init__(self, network: nn.Module, multiple: int = 8) -> None:
        super().__init__()
        self.network, self.multiple = network, multiple

    def forward(self, image: Tensor) -> Tensor:
        """Restore (B, 3, H, W)."""
        height, width = image.shape[2:]
        more = (0, -width % self.multiple, 0, -height % self.multiple)
        restored: Tensor = self.network(F.pad(image, more, mode="reflect"))
        return restored[..., :height, :width]


def load_backbone(name: str, photos: CropSampler, kept: Path, *, cpu: bool) -> nn.Module:
    """Return the trained denoiser in evaluation mode; one that is no demo's is trained once."""
    if name == "nafnet":
        return load_denoiser()
    torch.manual_seed(0)
    network = _BUILD[name]()
    file = kept / f"{name}-denoiser-{_STEPS}.safetensors"
    if not file.exists():
        data = RestorationData([CleanPhotos(photos, ["gaussian_noise"])], context=64, patch=64)
        schedule = Schedule(_STEPS, 1e-3, 1e-5, warmup=100, weight_decay=1e-4)
        recipe = Stage2(schedule, weights=_L1, probe_every=_STEPS)
        checkpoint = kept / f"{name}-denoiser.pt"
        accelerator = Accelerator(cpu=cpu)
        train_restoration(
            network, data, recipe=recipe, accelerator=accelerator, checkpoint=checkpoint
        )
        save_file({k: v.contiguous().cpu() for k, v in network.state_dict().items()}, file)
    network.load_state_dict(load_file(file))
    return Padded(network).eval().cpu()
