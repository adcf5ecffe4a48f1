"""Where prompts go: the sites of one backbone, as data that prints and saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, cast

from torch import Tensor, nn

from perceive_adapter.errors import ConfigError, PerceptionError

__all__ = ["Geometry", "Layout", "Role", "Site", "SitePlan"]

MAX_SCALE = 32
MAX_PROBE = 8192
MAX_SCALE_PARTS = 16  # of a fractional scale, such as the 3 of 4 / 3

Role = Literal["level", "layer"]


@dataclass(frozen=True)
class Layout:
    """Which axes of a feature map hold the batch and the channels.

    ``NCHW`` is (0, 1), ``NHWC`` and tokens (B, N, C) are (0, -1). Where windows or positions are
    folded into the batch axis, ``order`` says whether the rows of one image lie together
    ("major") or whether the images alternate ("minor"). It is "unknown" where the dry run had one
    row for each image: should there be more, as where a network cuts large images into tiles, a
    batch of several perceptions is refused.

    Args:
        batch_axis: 0 or 1.
        channel_axis: 1 or -1.
        order: "major", "minor" or "unknown".

    Raises:
        ConfigError: another axis.
    """

    batch_axis: int = 0
    channel_axis: int = 1
    order: Literal["major", "minor", "unknown"] = "unknown"

    def __post_init__(self) -> None:
        if (self.batch_axis, self.channel_axis) not in ((0, 1), (0, -1), (1, -1)):
            raise ConfigError(
                f"batch_axis={self.batch_axis} with channel_axis={self.channel_axis}; expected "
                "(0, 1), (0, -1) or (1, -1)"
            )

    def spread(self, value: Tensor, features: Tensor) -> Tensor:
        """View per-image values (B, C) so that they broadcast over ``features``.

        Args:
            value: (B, C), B = 1 for values that all images share.
            features: feature map whose batch axis holds B images, or a multiple (windows).

        Raises:
            PerceptionError: the batch axis is no multiple of B, or one of unknown order.
        """
        value = self.per_row(value, features.shape[self.batch_axis])
        shape = [1] * features.ndim
        shape[self.batch_axis], shape[self.channel_axis] = value.shape
        return value.view(shape)

    def rows(self, features: Tensor, images: int) -> Tensor:
        """View a feature map as rows of positions, as few as can be without a copy.

        Args:
            features: feature map whose batch axis holds the images, or a multiple (windows).
            images: how many there are, 1 where all are treated alike.

        Returns:
            (G, C, N), each row of one image; :meth:`per_row` gives it what belongs to that image.

        Raises:
            PerceptionError: the batch axis is no multiple of ``images``, or one of unknown order.
        """
        self._times(images, features.shape[self.batch_axis])
        if self.channel_axis == 1:
            return features.flatten(2)
        if images == 1 or (self.batch_axis == 0 and self.order != "minor"):
            return features.reshape(images, -1, features.shape[-1]).transpose(1, 2)
        tokens = features if self.batch_axis == 0 else features.transpose(0, 1)
        return tokens.flatten(1, -2).transpose(1, 2)

    def from_rows(self, rows: Tensor, features: Tensor) -> Tensor:
        """Give what :meth:`rows` has viewed, or the like in the same order, its shape back."""
        if self.channel_axis == 1 and rows.stride(1) != 1:
            return rows.view(features.shape)
        dense = rows.transpose(1, 2)
        if self.channel_axis == 1:
            # A view of one image that is not dense has any stride along the batch, which shows when
            # torch looks for the memory format: so the dense side first.
            return dense.view(rows.shape[0], *features.shape[2:], rows.shape[1]).movedim(-1, 1)
        if self.batch_axis == 1 and rows.shape[0] > 1:
            dense = dense.transpose(0, 1)
        return dense.reshape(features.shape)

    def per_row(self, value: Tensor, rows: int) -> Tensor:
        """Repeat what belongs to each image, (B, ...), for each of its rows; B = 1 stays."""
        times = self._times(value.shape[0], rows)
        if times == 1 or value.shape[0] == 1:
            return value
        if self.order == "major":
            return value.repeat_interleave(times, dim=0)
        return value.repeat(times, *[1] * (value.ndim - 1))

    def _times(self, images: int, rows: int) -> int:
        if images in (1, rows):
            return rows // images
        if rows % images:
            remedy = "give one perception for each image of the batch"
            if rows < images:
                remedy += f"; a network that takes its batch in parts, call with {rows} images"
            raise PerceptionError(
                f"the perception is of {images} images, and a site sees {rows} rows, which is "
                f"no multiple of it; {remedy}"
            )
        if self.order == "unknown":
            raise PerceptionError(
                f"the perception is of {images} images, and a site sees {rows} rows, where the dry "
                "run had one for each image: the network cuts or repeats its images, and which row "
                "is whose is not known; run the images one by one, or wrap the network with an "
                "example= as large as these"
            )
        return rows // images

    def __str__(self) -> str:
        axes = {(0, 1): "NCHW", (0, -1): "N..C", (1, -1): "LNC"}
        name = axes[self.batch_axis, self.channel_axis]
        return f"{name} (alternating)" if self.order == "minor" else name


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks over its input, in torch's terms."""

    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    padding_mode: str

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        """Read the geometry of a convolution."""
        pair = cast("tuple[int, int]", tuple(conv.stride))
        dilation = cast("tuple[int, int]", tuple(conv.dilation))
        padding = conv.padding
        if not isinstance(padding, str):
            padding = cast("tuple[int, int]", tuple(padding))
        return cls(pair, padding, dilation, conv.padding_mode)


@dataclass(frozen=True)
class Site:
    """One place of the backbone at which a prompt module works.

    Args:
        name: dotted name of the module.
        role: "level": its output is changed; "layer": a branch from its input to its output.
        channels: channels of the output.
        stride: input pixels per position of the output, None where it is no feature map.
        layout: axes of the output (and of the input of a layer).
        weight_shape: shape of a layer's weight; empty for a level.
        geometry: how a convolution walks over its input; None for a linear layer and for a level.
        rank: rank of a layer's branch; 0 for a level.
        parameters: what its prompt module adds.
        reason: why discovery chose it.
    """

    name: str
    role: Role
    channels: int
    stride: float | None
    layout: Layout
    weight_shape: tuple[int, ...] = ()
    geometry: Geometry | None = None
    rank: int = 0
    parameters: int = 0
    reason: str = ""


@dataclass(frozen=True)
class SitePlan:
    """The sites of one backbone and what the dry run learned about it. ``print(plan)`` is a table.

    Args:
        sites: levels first, each role in the order of execution.
        image_channels: channels of the image that the backbone takes.
        scale: output size / input size; 2 for a network that doubles the resolution.
        probe_size: height and width of the dry run's image, known to work.
        backbone_parameters: parameters of the backbone.
        encoder_parameters: parameters of the condition encoder that all sites share.
        blocked: sites of which no gradient came back in the dry run: a frozen zero scale of the
            backbone (an untrained NAFNet's beta and gamma) hides them from the output.
        eval_only: modules that stay in eval mode when the model trains, since in training mode
            they run other layers than these sites; "" is the backbone itself.
        folds: whether branches may become a part of their layers' weights for a while: not where
            the network reads such a weight elsewhere too.
        rewritten: parameters that the network itself writes when it runs, such as a convolution
            that it merges from several; they do not tell one backbone from another.

    Raises:
        ConfigError: a size or the scale cannot be, or a site is named twice.
    """

    sites: tuple[Site, ...]
    image_channels: int
    scale: float
    probe_size: tuple[int, int]
    backbone_parameters: int
    encoder_parameters: int = 0
    blocked: tuple[str, ...] = ()
    eval_only: tuple[str, ...] = ()
    folds: bool = True
    rewritten: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sides = self.probe_size
        if not (0 < self.scale <= MAX_SCALE and min(sides) > 0 and max(sides) <= MAX_PROBE):
            raise ConfigError(
                f"a plan has scale={self.scale} and probe_size={sides}; expected a scale up to "
                f"{MAX_SCALE} and sides from 1 to {MAX_PROBE}"
            )
        if len({(site.role, site.name) for site in self.sites}) < len(self.sites):
            raise ConfigError("a plan names a site twice in one role")

    def of(self, role: Role) -> tuple[Site, ...]:
        """Return the sites of one role."""
        return tuple(site for site in self.sites if site.role == role)

    @property
    def parameters(self) -> int:
        """Trainable parameters of an adapter with this plan."""
        return self.encoder_parameters + sum(site.parameters for site in self.sites)

    @property
    def stride(self) -> int:
        """Coarsest stride of any site, at least 1."""
        return max([1, *(round(site.stride) for site in self.sites if site.stride)])

    @property
    def scale_parts(self) -> int:
        """Input pixels after which a whole output pixel begins; the denominator of the scale."""
        return Fraction(self.scale).limit_denominator(MAX_SCALE_PARTS).denominator

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __str__(self) -> str:
        return self.table()

    def table(self, kinds: Mapping[Role, str] | None = None) -> str:
        """Return the sites as a table, and a line of totals.

        Args:
            kinds: kind of the prompt modules of each role, for a column of their own.
        """
        header = ("site", "role", "channels", "stride", "layout", "rank", "parameters", "why")
        rows = [header, *(_row(site) for site in self.sites)]
        right = {2, 3, 5, 6}
        if kinds is not None:
            told = ("prompt", *(kinds[site.role] for site in self.sites))
            rows = [(*row[:2], kind, *row[2:]) for row, kind in zip(rows, told, strict=True)]
            right = {3, 4, 6, 7}
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if i in right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        share = 100 * self.parameters / max(self.backbone_parameters, 1)
        lines.append(
            f"{len(self.of('level'))} level and {len(self.of('layer'))} layer sites, "
            f"{self.parameters:,} trainable parameters with the encoder "
            f"({share:.1f} % of {self.backbone_parameters:,})"
        )
        return "\n".join(lines)


def _row(site: Site) -> tuple[str, ...]:
    stride = "-" if site.stride is None else f"{site.stride:g}"
    rank = str(site.rank) if site.rank else "-"
    return (
        site.name,
        site.role,
        str(site.channels),
        stride,
        str(site.layout),
        rank,
        f"{site.parameters:,}",
        site.reason,
    )
