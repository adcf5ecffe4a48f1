"""Networks that do what users' networks do: small, random, and none of their weights zero.

Every class is one oddity that a hook can stumble over. :data:`CASES` names them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


class Block(nn.Module):
    def __init__(self, width: int, **options: Any) -> None:
        super().__init__()
        self.a, self.b = conv(width, width, **options), conv(width, width, **options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.gelu(self.a(x)))


class UShape(nn.Module):
    """Encoder and decoder with skips; up by PixelShuffle or by interpolation."""

    def __init__(self, width: int = 8, channels: int = 3, shuffle: bool = True) -> None:
        super().__init__()
        self.intro = conv(channels, width)
        self.enc1, self.down1 = Block(width), nn.Conv2d(width, 2 * width, 2, stride=2)
        self.enc2, self.down2 = Block(2 * width), nn.Conv2d(2 * width, 4 * width, 2, stride=2)
        self.middle = Block(4 * width)
        self.up2, self.dec2 = self._up(4 * width, shuffle), Block(2 * width)
        self.up1, self.dec1 = self._up(2 * width, shuffle), Block(width)
        self.ending = conv(width, channels)

    @staticmethod
    def _up(width: int, shuffle: bool) -> nn.Module:
        if shuffle:
            return nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.PixelShuffle(2))
        return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, width // 2, 1))

    def forward(self, image: Tensor) -> Tensor:
        one = self.enc1(self.intro(image))
        two = self.enc2(self.down1(one))
        x = self.dec2(self.up2(self.middle(self.down2(two))) + two)
        return image + self.ending(self.dec1(self.up1(x) + one))


class Isotropic(nn.Module):
    """One resolution throughout, as most super-resolution bodies are."""

    def __init__(self, width: int = 8, blocks: int = 4, channels: int = 3) -> None:
        super().__init__()
        self.head, self.tail = conv(channels, width), conv(width, channels)
        self.body = nn.Sequential(*(Block(width) for _ in range(blocks)))

    def forward(self, image: Tensor) -> Tensor:
        return image + self.tail(self.body(self.head(image)))


class Upscaler(Isotropic):
    """Twice the size comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.Sequential(conv(8, 12), nn.PixelShuffle(2))

    def forward(self, image: Tensor) -> Tensor:
        return F.interpolate(image, scale_factor=2) + self.tail(self.body(self.head(image)))


class TokenBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.gelu(self.a(self.norm(x))))


class Tokens(nn.Module):
    """Features as tokens (B, N, C) or as maps (B, H, W, C)."""

    def __init__(self, width: int = 12, flat: bool = True) -> None:
        super().__init__()
        self.flat = flat
        self.embed, self.out = nn.Conv2d(3, width, 4, stride=4), nn.Linear(width, 48)
        self.blocks = nn.Sequential(*(TokenBlock(width) for _ in range(3)))

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        height, width = x.shape[-2:]
        x = x.permute(0, 2, 3, 1)
        x = self.out(self.blocks(x.flatten(1, 2) if self.flat else x))
        x = x.reshape(len(image), height, width, -1).permute(0, 3, 1, 2)
        return image + F.pixel_shuffle(x, 4)


class Windows(nn.Module):
    """Linear layers that see windows in the batch axis, image by image or alternating."""

    def __init__(self, width: int = 12, alternating: bool = False) -> None:
        super().__init__()
        self.alternating = alternating
        self.embed, self.out = conv(3, width), conv(width, 3)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        b, c, h, w = x.shape
        cut = x.view(b, c, h // 8, 8, w // 8, 8).permute(0, 2, 4, 3, 5, 1)
        cut = cut.reshape(b, -1, 64, c)
        cut = (cut.transpose(0, 1) if self.alternating else cut).reshape(-1, 64, c)
        q, k, v = self.qkv(cut).chunk(3, dim=-1)
        cut = self.proj(F.scaled_dot_product_attention(q, k, v))
        cut = cut.view(-1, b, 64, c).transpose(0, 1) if self.alternating else cut
        cut = cut.reshape(b, h // 8, w // 8, 8, 8, c).permute(0, 5, 1, 3, 2, 4)
        return image + self.out(x + cut.reshape(b, c, h, w))


class SequenceFirst(nn.Module):
    """Linear layers on (N, B, C)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embed, self.out = nn.Conv2d(3, width, 4, stride=4), nn.ConvTranspose2d(width, 3, 4, 4)
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        tokens = x.flatten(2).permute(2, 0, 1)
        tokens = tokens + self.b(F.gelu(self.a(tokens)))
        return image + self.out(tokens.permute(1, 2, 0).view(x.shape))


class Attention(nn.Module):
    """nn.MultiheadAttention never calls its own out_proj."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embed, self.out = nn.Conv2d(3, width, 8, stride=8), nn.ConvTranspose2d(width, 3, 8, 8)
        self.mha = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Linear(width, width)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = self.mlp(tokens + self.mha(tokens, tokens, tokens, need_weights=False)[0])
        return image + self.out(tokens.transpose(1, 2).reshape(x.shape))


class Transformer(Attention):
    """nn.TransformerEncoderLayer runs fused code in eval mode, unless it is hooked."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        tokens = self.mlp(self.mha(x.flatten(2).transpose(1, 2)))
        return image + self.out(tokens.transpose(1, 2).reshape(x.shape))


class Shared(nn.Module):
    """One block that runs three times."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.head, self.block, self.tail = conv(3, width), Block(width), conv(width, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.head(image)
        for _ in range(3):
            x = self.block(x)
        return image + self.tail(x)


class Tied(Isotropic):
    """Two modules with one weight tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body[1].a.weight = self.body[0].a.weight


class Mixed(nn.Module):
    """Grouped, dilated, strided and 1 x 1 convolutions, ModuleList, BatchNorm and Dropout."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.head = conv(3, width, padding_mode="reflect")
        self.layers = nn.ModuleList(
            [
                conv(width, width, groups=4),
                nn.BatchNorm2d(width),
                nn.Conv2d(width, width, 1),
                nn.Dropout(0.1),
                nn.Conv2d(width, width, 3, padding="same", dilation=2),
                nn.ReLU(inplace=True),
            ]
        )
        self.tail = conv(width, 3)
        nn.init.normal_(self.layers[1].running_mean, std=0.1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.head(image)
        for layer in self.layers:
            x = layer(x)
        return image + self.tail(x)


class Normed(Isotropic):
    """Weights that are computed: spectral and weight norm, the old way and as parametrizations."""

    def __init__(self) -> None:
        super().__init__()
        norms = (
            nn.utils.spectral_norm,
            nn.utils.weight_norm,
            parametrizations.spectral_norm,
            parametrizations.weight_norm,
        )
        for block, norm in zip(self.body, norms, strict=True):
            norm(block.a)


@dataclass
class Restored:
    iterations: int
    image: Tensor


class Packed(Isotropic):
    """The image comes out inside something."""

    def __init__(self, pack: Callable[[Tensor], Any] | None) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, image: Tensor) -> Any:
        return self.pack(super().forward(image)) if self.pack else None


class KeywordOnly(Isotropic):
    def forward(self, *, image: Tensor) -> Tensor:
        return super().forward(image)


class NoiseLevel(Isotropic):
    """A noise map of the image's size beside the image, and a step for a learned shift."""

    def __init__(self) -> None:
        super().__init__(channels=4)
        self.tail, self.shift = conv(8, 3), nn.Linear(1, 8)

    def forward(self, step: Tensor, image: Tensor, sigma: Tensor) -> Tensor:
        x = self.head(torch.cat([image, sigma], 1)) + self.shift(step[:, None])[..., None, None]
        return image + self.tail(self.body(x))


class Inpaints(UShape):
    """A mask beside the image says where there is nothing to see."""

    def __init__(self) -> None:
        super().__init__()
        self.intro = conv(4, 8)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        kept = image * (1 - mask)
        one = self.enc1(self.intro(torch.cat([kept, mask], 1)))
        two = self.enc2(self.down1(one))
        x = self.dec2(self.up2(self.middle(self.down2(two))) + two)
        return kept + mask * self.ending(self.dec1(self.up1(x) + one))


class Scales(UShape):
    """Gives the image at half its size, too, as networks that are trained at several scales do."""

    def __init__(self) -> None:
        super().__init__()
        self.to_small = conv(16, 3)

    def forward(self, image: Tensor) -> list[Tensor]:
        one = self.enc1(self.intro(image))
        two = self.enc2(self.down1(one))
        x = self.dec2(self.up2(self.middle(self.down2(two))) + two)
        small = F.avg_pool2d(image, 2) + self.to_small(x)
        return [small, image + self.ending(self.dec1(self.up1(x) + one))]


class Stages(nn.Module):
    """One network after another, each of which restores; the last one's image comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = UShape(), UShape()

    def forward(self, image: Tensor) -> list[Tensor]:
        one = self.first(image)
        return [self.second(one), one]


class WritesInput(Isotropic):
    """Multiplies its input in place, as RCAN does."""

    def forward(self, image: Tensor) -> Tensor:
        image *= 0.5
        return super().forward(image) * 2


class WritesFeatures(nn.Module):
    """Part of the features is convolved and written back, as PLKSR does."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.part, self.last = conv(3, 8), conv(4, 4), conv(8, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.head(image)
        x[:, :4] = self.part(x[:, :4])
        return image + self.last(x)


class WritesInEval(WritesFeatures):
    """The same in eval mode only, as PLKSR does it: it trains in training mode only, also bare."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix = conv(8, 8), conv(8, 8)

    def forward(self, image: Tensor) -> Tensor:
        x = self.mix(self.first(self.head(image)))
        if self.training:
            x = torch.cat([self.part(x[:, :4]), x[:, 4:]], 1)
        else:
            x[:, :4] = self.part(x[:, :4])
        return image + self.last(x)


class Merged(nn.Module):
    """Two convolutions that are merged into one in eval mode, anew at every call, as in SPAN."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.point = conv(width, width), conv(width, width, 1)
        self.merged = conv(width, width)
        self.merge()

    def merge(self) -> None:
        self.merged.weight.data = self.wide.weight.data + F.pad(self.point.weight.data, [1] * 4)
        self.merged.bias.data = self.wide.bias.data + self.point.bias.data

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.wide(x) + self.point(x)
        self.merge()
        return self.merged(x)


class Reparametrized(Isotropic):
    """Its body runs other layers in training mode than in eval mode."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(*(Merged(width) for _ in range(3)))


class Padded(UShape):
    """Pads the image, and cuts what it gives, as waifu2x does."""

    def forward(self, image: Tensor) -> Tensor:
        padded = F.pad(image, [12] * 4, "reflect")
        return super().forward(padded)[..., 12:-12, 12:-12]


class Decoder(nn.Module):
    """Takes the features of every level as one list."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up2, self.dec2 = UShape._up(4 * width, True), Block(2 * width)
        self.up1, self.dec1 = UShape._up(2 * width, True), Block(width)

    def forward(self, features: list[Tensor]) -> Tensor:
        one, two, three = features
        return self.dec1(self.up1(self.dec2(self.up2(three) + two)) + one)


class CutShort(nn.Module):
    """An encoder of which the deeper half is there and never runs, as a classifier's trunk."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.downs = nn.ModuleList(
            nn.Conv2d(inputs, outputs, step, stride=step)
            for inputs, outputs, step in ((3, width, 1), (width, 16, 2), (16, 4 * width, 2))
        )
        self.never = nn.Sequential(*(Block(32) for _ in range(6)))
        self.decoder, self.ending = Decoder(width), conv(width, 3)

    def forward(self, image: Tensor) -> Tensor:
        features = [image]
        for down in self.downs:
            features.append(down(features[-1]))
        return image + self.ending(self.decoder(features[1:]))


class Noisy(Isotropic):
    """Adds noise to what it sees, at every call other noise."""

    def __init__(self) -> None:
        super().__init__()
        self.blend = nn.Linear(3, 3)

    def forward(self, image: Tensor) -> Tensor:
        image = image + 0.5 * torch.randn_like(image)
        return super().forward(self.blend(image.movedim(1, -1)).movedim(-1, 1))


class ZeroScale(nn.Module):
    """A branch behind a scale that is zero, as in an untrained NAFNet."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.hidden, self.tail = conv(3, 8), conv(8, 8), conv(8, 3)
        self.gamma = nn.Parameter(torch.zeros(1, 8, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        x = self.head(image)
        return image + self.tail(x + self.gamma * self.hidden(x))


class Multiple(UShape):
    """Raises unless both sides are multiples of 8."""

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[-1] % 8 or image.shape[-2] % 8:
            raise ValueError("sides must be multiples of 8")
        return super().forward(image)


class Checkpointed(Isotropic):
    """Activation checkpointing runs the hooks again in the backward pass."""

    checkpointing = True
    reentrant = False

    def forward(self, image: Tensor) -> Tensor:
        x = self.head(image)
        for block in self.body:
            keep = self.checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=self.reentrant) if keep else block(x)
        return image + self.tail(x)


class ReservedNames(nn.Module):
    """Submodules named as methods of nn.ModuleDict are."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values, self.update, self.pop = conv(3, 8), Block(8), conv(8, 8), conv(8, 3)

    def forward(self, image: Tensor) -> Tensor:
        return image + self.pop(self.update(self.values(self.keys(image))))


def nafnet(width: int = 8) -> nn.Module:
    from spandrel.architectures.NAFNet.__arch.NAFNet_arch import NAFNet

    net = NAFNet(width=width, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1])
    for name, parameter in net.named_parameters():
        if name.endswith(("beta", "gamma")):  # zeros, which block the gradient
            nn.init.normal_(parameter, std=0.5)
    return net


def swinir() -> nn.Module:
    from spandrel.architectures.SwinIR.__arch.SwinIR import SwinIR

    return SwinIR(img_size=64, window_size=8, embed_dim=12, depths=[2, 2], num_heads=[2, 2])


def restormer() -> nn.Module:
    from spandrel_extra_arches.architectures.Restormer.__arch.restormer_arch import Restormer

    return Restormer(
        dim=8, num_blocks=[1, 1, 1, 1], num_refinement_blocks=1, heads=[1, 2, 4, 8], bias=False
    )


@dataclass(frozen=True)
class Case:
    """How a network is built, wrapped and called."""

    build: Callable[[], nn.Module]
    channels: int = 3
    wrap: dict[str, Any] = field(default_factory=dict)
    call: Callable[[nn.Module, Tensor], Any] = lambda net, image: net(image)
    read: Callable[[Any], Tensor] = lambda output: output

    def net(self, seed: int = 0) -> nn.Module:
        """A new network in eval mode, its weights decided by the seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.build().eval()

    def images(self, batch: int = 1, size: int = 32, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(batch, self.channels, size, size, generator=generator)

    def run(self, net: nn.Module, image: Tensor) -> Tensor:
        """Call a network on a copy of the image, and take the restored image from its output."""
        return self.read(self.call(net, image.clone()))


def _noise_example() -> tuple[Tensor, ...]:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return torch.full((1,), 0.5), image, torch.full((1, 1, 64, 64), 0.1)


def _masked(image: Tensor) -> tuple[Tensor, Tensor]:
    mask = torch.zeros_like(image[:, :1])
    mask[..., : image.shape[-1] // 2] = 1
    return image, mask


def _with_noise(net: nn.Module, image: Tensor) -> Any:
    return net(image.new_full(image.shape[:1], 0.5), image, torch.full_like(image[:, :1], 0.1))


REAL = {"nafnet": Case(nafnet), "swinir": Case(swinir), "restormer": Case(restormer)}
TOYS = {
    "u_shape": Case(UShape),
    "u_interpolate": Case(lambda: UShape(shuffle=False)),
    "isotropic": Case(Isotropic),
    "upscaler": Case(Upscaler),
    "tokens": Case(Tokens),
    "nhwc": Case(lambda: Tokens(flat=False)),
    "windows": Case(Windows),
    "windows_alternating": Case(lambda: Windows(alternating=True)),
    "sequence_first": Case(SequenceFirst),
    "attention": Case(Attention),
    "transformer": Case(Transformer),
    "shared": Case(Shared),
    "tied": Case(Tied),
    "mixed": Case(Mixed),
    "normed": Case(Normed),
    "tuple": Case(lambda: Packed(lambda x: (x, "note")), read=lambda out: out[0]),
    "list": Case(lambda: Packed(lambda x: [x]), read=lambda out: out[0]),
    "dict": Case(lambda: Packed(lambda x: {"image": x}), read=lambda out: out["image"]),
    "dataclass": Case(lambda: Packed(lambda x: Restored(1, x)), read=lambda out: out.image),
    "keyword": Case(
        KeywordOnly, wrap={"image_arg": "image"}, call=lambda net, image: net(image=image)
    ),
    "noise_level": Case(
        NoiseLevel, wrap={"image_arg": 1, "example": _noise_example()}, call=_with_noise
    ),
    "mask": Case(
        Inpaints,
        wrap={"example": _masked(torch.rand(1, 3, 64, 64))},
        call=lambda net, image: net(*_masked(image)),
    ),
    "scales": Case(Scales, read=lambda out: out[1]),
    "stages": Case(Stages, read=lambda out: out[0]),
    "writes_input": Case(WritesInput),
    "writes_features": Case(WritesFeatures),
    "reparametrized": Case(Reparametrized),
    "padded": Case(Padded),
    "cut_short": Case(CutShort),
    "zero_scale": Case(ZeroScale),
    "multiple": Case(Multiple),
    "checkpointed": Case(Checkpointed),
    "reserved_names": Case(ReservedNames),
    "gray": Case(lambda: Isotropic(channels=1), channels=1),
    "five_channels": Case(
        lambda: UShape(channels=5), channels=5, wrap={"example": torch.rand(1, 5, 64, 64)}
    ),
}
CASES = TOYS | REAL
