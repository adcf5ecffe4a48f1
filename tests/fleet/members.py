"""The fleet: networks of other people, small and random, as their packages build them.

:data:`MEMBERS` has every restoration architecture that spandrel and spandrel_extra_arches know, and
networks of other packages; :data:`LEFT_OUT` names the architectures that are not built, and why.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[[], nn.Module]


def first_image(output: Any) -> Tensor:
    """The restored image in what a network gives."""
    return next(tensor for tensor in _tensors(output) if tensor.ndim == 4)


def seeded(run: Callable[..., Any], *inputs: Tensor) -> Tensor:
    """Run on copies; a network that draws random numbers draws the same ones every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return first_image(run(*(value.clone() for value in inputs)))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, (list, tuple)):
        yield from (tensor for value in output for tensor in _tensors(value))


@dataclass(frozen=True)
class Member:
    """How one network of the fleet is built, wrapped and called.

    Args:
        package: what has to be installed.
        architecture: its name there; in spandrel, of the registry.
        build: the network, small.
        channels: of the image that it takes.
        size: side of the image that it is tried with; sites are always found at 64 px, or at the
            size of ``wrap["example"]``.
        batch: 1 for a network that takes one image at a time.
        wrap: options that its wrapper needs.
        call: how it is called with an image.
    """

    package: str
    architecture: str
    build: Build
    channels: int = 3
    size: int = 32
    batch: int = 2
    wrap: dict[str, Any] = field(default_factory=dict)
    call: Callable[[Callable[..., Any], Tensor], Any] = lambda net, image: net(image)

    @property
    def installed(self) -> bool:
        """Whether the package is there."""
        return importlib.util.find_spec(self.package) is not None

    def net(self, seed: int = 0) -> nn.Module:
        """A new network in eval mode, its weights decided by the seed, none of them all zero."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = self.build().eval()
            for parameter in net.parameters():
                if not parameter.any():  # a zero scale, as in an untrained NAFNet, hides its branch
                    nn.init.normal_(parameter, std=0.1)
            return net

    def images(self, batch: int | None = None, size: int | None = None, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        side = size or self.size
        return torch.rand(batch or self.batch, self.channels, side, side, generator=generator)

    def run(self, net: Callable[..., Any], image: Tensor) -> Tensor:
        """Restore a copy of the image."""
        return seeded(lambda copy: self.call(net, copy), image)


def _of(package: str, modules: str = "{}", **options: Any) -> Callable[..., Member]:
    """Return how a member of one package is described: its architecture and its arguments."""

    def member(architecture: str, name: str | None = None, **arguments: Any) -> Member:
        def build() -> nn.Module:
            module = importlib.import_module(modules.format(architecture))
            return getattr(module, name or architecture)(**arguments)

        return Member(package, architecture, build, **options)

    return member


def _with(member: Member, **changes: Any) -> Member:
    return dataclasses.replace(member, **changes)


SWIN = {"img_size": 64, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2]}
RGB = {"num_in_ch": 3, "num_out_ch": 3}
IN_OUT = {"in_channels": 3, "out_channels": 3}
BLOCKS = {"num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1}
LEVELS = {"enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1], "middle_blk_num": 1}


def _example(*more: Any, size: int = 64, channels: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"example": (torch.rand(1, channels, size, size, generator=generator), *more)}


def _hole(image: Tensor) -> Tensor:
    """A mask (B, 1, H, W) of the right half."""
    mask = torch.zeros_like(image[:, :1])
    mask[..., mask.shape[-1] // 2 :] = 1
    return mask


def _spandrel() -> dict[str, Member]:
    net = _of("spandrel", "spandrel.architectures.{}")
    return {
        "ATD": net("ATD", **SWIN, category_size=64, num_tokens=8),
        "AuraSR": net(
            "AuraSR",
            dim=8,
            image_size=256,
            input_image_size=64,
            style_network={"dim_in": 16, "dim_out": 64, "depth": 2},
            full_attn=(False,) * 5,
            attn_depths=(1,) * 5,
            mid_attn_depth=1,
            resnet_block_groups=4,
            self_attn_dim_head=8,
            self_attn_heads=2,
            num_conv_kernels=2,
        ),
        "CRAFT": net("CRAFT", embed_dim=24, depths=[1, 1], num_heads=[2, 2], upscale=2),
        "Compact": net("Compact", num_feat=16, num_conv=4, upscale=2),
        "DAT": net("DAT", embed_dim=16, split_size=[4, 8], depth=[2, 2], num_heads=[2, 2]),
        "DCTLSA": net("DCTLSA", nf=20, upscale=2),
        "DITN": net("DITN", dim=16, ITL_blocks=1, SAL_blocks=1, upscale=2),
        "DRCT": net("DRCT", **SWIN, window_size=8, upscale=2, upsampler="pixelshuffle", gc=8),
        "DRUNet": net("DRUNet", in_nc=3, out_nc=3, nc=[8, 16, 24, 32], nb=1),
        "DnCNN": _with(net("DnCNN", nc=16, nb=5), channels=1),
        "ESRGAN": net("ESRGAN", num_filters=16, num_blocks=2, scale=2),
        "FBCNN": net("FBCNN", nc=[8, 16, 24, 512], nb=1),
        "FDAT": net("FDAT", embed_dim=16, num_groups=2, depth_per_group=2, scale=2, mid_dim=16),
        "FFTformer": net("FFTformer", dim=8, num_blocks=[1, 1, 1], num_refinement_blocks=1),
        "GFPGAN": _with(net("GFPGAN", out_size=64, narrow=0.125, num_style_feat=32), size=64),
        "GRL": net(
            "GRL", embed_dim=16, depths=[2, 2], num_heads_window=[2, 2], num_heads_stripe=[2, 2]
        ),
        "HAT": net("HAT", **SWIN, window_size=8, upscale=2, num_feat=16, squeeze_factor=2),
        "HVICIDNet": net("HVICIDNet", channels=[12, 12, 24, 48]),
        "IPT": _with(
            net("IPT", n_feats=8, num_layers=1, num_heads=2), size=48, wrap=_example(size=48)
        ),
        "KBNet_l": net("KBNet", "KBNet_l", dim=24, **BLOCKS),
        "KBNet_s": net("KBNet", "KBNet_s", width=8, **LEVELS),
        "LaMa": _with(
            net("LaMa", in_nc=4),
            wrap=_example(_hole(torch.zeros(1, 3, 64, 64))),
            call=lambda net, image: net(image, _hole(image)),
        ),
        "MMRealSR": net(
            "MMRealSR", **RGB, num_feat=16, num_block=2, num_grow_ch=8, num_feats=[8, 16, 24, 32]
        ),
        "MixDehazeNet": _with(net("MixDehazeNet", embed_dims=[8, 16, 32, 16, 8]), size=64),
        "MoESR": net("MoESR", dim=16, n_blocks=2, n_block=1, upsample_dim=16, scale=2),
        "MoSR": net("MoSR", dim=16, n_block=3, upscale=2),
        "NAFNet": net("NAFNet", width=8, **LEVELS),
        "OmniSR": net("OmniSR", num_feat=16, up_scale=2),
        "PLKSR": net("PLKSR", dim=16, n_blocks=3, upscaling_factor=2),
        "RCAN": net("RCAN", scale=2, n_resgroups=2, n_resblocks=2, n_feats=16, reduction=4),
        "RGT": net("RGT", embed_dim=16, depth=[2, 2], num_heads=[2, 2]),
        "RealCUGAN_2x": net("RealCUGAN", "UpCunet2x"),
        "RealCUGAN_2x_fast": _with(net("RealCUGAN", "UpCunet2x_fast"), size=64),
        "RealCUGAN_3x": net("RealCUGAN", "UpCunet3x"),
        "RealCUGAN_4x": net("RealCUGAN", "UpCunet4x"),
        "RealPLKSR": net("PLKSR", "RealPLKSR", dim=16, n_blocks=3, upscaling_factor=2),
        "RestoreFormer": net(
            "RestoreFormer",
            n_embed=64,
            embed_dim=32,
            ch=32,
            ch_mult=(1, 1, 1),
            num_res_blocks=1,
            resolution=64,
            z_channels=32,
        ),
        "RetinexFormer": net("RetinexFormer", n_feat=8, stage=1, num_blocks=[1, 1, 1]),
        "SAFMN": net("SAFMN", dim=16, n_blocks=3, upscaling_factor=2),
        "SAFMNBCIE": net("SAFMNBCIE", dim=16, n_blocks=2, num_layers=2),
        "SCUNet": _with(net("SCUNet", config=[1] * 7, dim=64, input_resolution=64), size=64),
        "SPAN": net("SPAN", **RGB, feature_channels=16, upscale=2),
        "SeemoRe": _with(
            net("SeemoRe", scale=2, num_experts=3, num_layers=2, embedding_dim=16), batch=1
        ),
        "SwiftSRGAN": net("SwiftSRGAN", num_channels=16, num_blocks=3, upscale_factor=2),
        "Swin2SR": net("Swin2SR", **SWIN, window_size=8, upsampler="pixelshuffle"),
        "SwinIR": net("SwinIR", **SWIN, window_size=8),
        "Uformer": _with(net("Uformer", img_size=64, embed_dim=8, depths=[1] * 9), size=64),
    }


def _settled(build: Build) -> Build:
    """Run a network in training mode, so that its spectral norms know the norms of its weights."""

    def settled() -> nn.Module:
        net = build().train()
        with torch.no_grad():
            for _ in range(5):
                net(torch.rand(2, 3, 64, 64))
        return net

    return settled


def _extra() -> dict[str, Member]:
    net = _of("spandrel_extra_arches", "spandrel_extra_arches.architectures.{}")
    color = net("DDColor", encoder_name="convnext-t", input_size=(64, 64), dec_layers=3)
    return {
        "AdaCode": net("AdaCode", codebook_params=[[32, 32, 32]], gt_resolution=64),
        "DDColor": _with(color, build=_settled(color.build), size=64),
        "FeMaSR": net("FeMaSR", codebook_params=[[32, 64, 32]], gt_resolution=64),
        "M3SNet": net("M3SNet", width=8, **LEVELS),
        "MIRNet2": net("MIRNet2", n_feat=16, n_MRB=1),
        "MPRNet": net("MPRNet", n_feat=16, scale_unetfeats=8, scale_orsnetfeats=8, num_cab=1),
        "Restormer": net("Restormer", dim=8, **BLOCKS),
        "SRFormer": net("SRFormer", **{**SWIN, "embed_dim": 16}, window_size=8),
    }


def _deepinv() -> dict[str, Member]:
    net = _of("deepinv", "deepinv.models", wrap=_example(0.1), call=lambda n, image: n(image, 0.1))
    plain = _of("deepinv", "deepinv.models")
    own = {"pretrained": None}
    score = {"img_resolution": 64, "model_channels": 32, "attn_resolutions": (16,), **own}
    level = {
        "wrap": _example(torch.tensor([0.1])),
        "call": lambda n, image: n(image, image.new_full(image.shape[:1], 0.1)),
    }
    return {
        "ADMUNet": _with(net("ADMUNet", **score, num_blocks=1, channel_mult=(1, 2)), **level),
        "DRUNet": net("DRUNet", nc=(8, 16, 24, 32), nb=1, **own),
        "FFDNet": net("FFDNet", n_conv_layers=4, nf=16, img_channels=3, **own),
        "NCSNpp": _with(net("NCSNpp", **score, num_blocks=1, channel_mult=(1, 2)), **level),
        "PromptIR": plain("PromptIR", **BLOCKS, **own),
        "SRResNet": plain("SRResNet", num_blocks=2, feats=16, upscale=2),
        "UNet": plain("UNet", **IN_OUT, scales=3, channels_per_scale=[8, 16, 32]),
    }


def _diffusers() -> dict[str, Member]:
    net = _of("diffusers", "diffusers")
    widths = {"block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 1}
    return {
        "AutoencoderKL": net(
            "AutoencoderKL",
            **widths,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        "AutoencoderTiny": net(
            "AutoencoderTiny",
            encoder_block_out_channels=(16, 16),
            decoder_block_out_channels=(16, 16),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        "UNet2DModel": _with(
            net(
                "UNet2DModel",
                **widths,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            ),
            wrap=_example(10),
            call=lambda net, image: net(image, 10),
        ),
    }


def _segmentation() -> dict[str, Member]:
    net = _of("segmentation_models_pytorch", "segmentation_models_pytorch")
    small = {"encoder_name": "resnet18", "encoder_weights": None, "encoder_depth": 3, "classes": 3}
    decoder = {"decoder_channels": (32, 16, 8)}
    return {
        "MAnet": net("MAnet", **small, **decoder),
        "Unet": net("Unet", **small, **decoder),
        "UnetPlusPlus": net("UnetPlusPlus", **small, **decoder),
    }


def _monai() -> dict[str, Member]:
    net = _of("monai", "monai.networks.nets")
    plane = {"spatial_dims": 2, **IN_OUT}
    return {
        "AttentionUnet": net("AttentionUnet", **plane, channels=(8, 16, 32), strides=(2, 2)),
        "BasicUNet": net("BasicUNet", **plane, features=(8, 8, 16, 16, 32, 8)),
        "SegResNet": net("SegResNet", **plane, init_filters=8, blocks_down=(1, 1), blocks_up=(1,)),
        "SwinUNETR": _with(net("SwinUNETR", **plane, feature_size=12), size=64),
    }


def _others() -> dict[str, Member]:
    def swin2sr() -> nn.Module:
        from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

        config = Swin2SRConfig(
            image_size=64, embed_dim=16, depths=[2, 2], num_heads=[2, 2], upsampler="pixelshuffle"
        )
        return Swin2SRForImageSuperResolution(config)

    lraspp = _of("torchvision", "torchvision.models.segmentation")(
        "lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=3
    )
    return {
        "torchvision.LRASPP": lraspp,
        "transformers.Swin2SR": Member("transformers", "Swin2SR", swin2sr),
    }


def _prefixed(prefix: str, members: dict[str, Member]) -> dict[str, Member]:
    return {f"{prefix}.{name}": member for name, member in members.items()}


MEMBERS = {
    **_spandrel(),
    **_extra(),
    **_prefixed("deepinv", _deepinv()),
    **_prefixed("diffusers", _diffusers()),
    **_prefixed("monai", _monai()),
    **_prefixed("smp", _segmentation()),
    **_others(),
}

LEFT_OUT = {
    "CodeFormer": "restores face crops of 512 px only, with 74 M parameters of fixed widths",
    "MAT": "fills holes in images of 512 px only, with 62 M parameters of fixed widths",
}

# Those that take seconds; their tests are slow ones.
LARGE = frozenset(
    (
        "AdaCode",
        "AuraSR",
        "CRAFT",
        "DCTLSA",
        "DDColor",
        "DRCT",
        "ESRGAN",
        "FeMaSR",
        "GFPGAN",
        "GRL",
        "HVICIDNet",
        "KBNet_l",
        "LaMa",
        "MIRNet2",
        "MMRealSR",
        "MPRNet",
        "MixDehazeNet",
        "RealCUGAN_2x",
        "RealCUGAN_2x_fast",
        "RealCUGAN_3x",
        "RealCUGAN_4x",
        "SCUNet",
        "Uformer",
        "deepinv.PromptIR",
        "monai.SwinUNETR",
    )
)
