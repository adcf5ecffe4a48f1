"""What is known of an image before it is restored, and the range that its values have."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsIndex, TypeAlias, Union

import torch
from torch import Tensor

from perceive_adapter.errors import ConfigError, PerceptionError
from perceive_adapter.pytrees import register_pytree

__all__ = ["Perception", "ValueRange", "ValueRangeLike", "check_perception"]

ValueRangeLike: TypeAlias = Union["ValueRange", Sequence[float], Sequence[Sequence[float]], Tensor]
"""``(low, high)``, or ``(mean, std)``, each with a number for each channel; arrays will do."""


@dataclass(frozen=True, eq=False)
class Perception:
    """What is known of each image of a batch; every field has the batch as its first dimension.

    A field that nothing has perceived is None. A batch of one stands for every image of the batch
    that the network sees, which is how the tiles of one photograph share its perception.

    Args:
        compact: (B, C) compact features of the degradation, unit vectors.
        tiers: (B, K) probability of each quality tier.
        degradations: (B, D) presence of each degradation in [0, 1].
        severity: (B, D) severity of each degradation in [0, 1].
        embedding: (B, E) image embedding of the perceiver, unit vectors.
        semantic: (B, L, S) semantic vectors, one for each of L depths, unit vectors.

    Raises:
        PerceptionError: a field has the wrong number of dimensions or the batch sizes differ.

    Example:
        >>> oracle = Perception(degradations=torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> oracle.batch
        2
        >>> oracle[1].degradations
        tensor([[0., 1.]])
    """

    compact: Tensor | None = None
    tiers: Tensor | None = None
    degradations: Tensor | None = None
    severity: Tensor | None = None
    embedding: Tensor | None = None
    semantic: Tensor | None = None

    def __post_init__(self) -> None:
        sizes = {}
        for name, value in self.known().items():
            dims = 3 if name == "semantic" else 2
            if value.ndim != dims:
                raise PerceptionError(
                    f"perception.{name} has shape {tuple(value.shape)}; expected {dims} dimensions"
                )
            sizes[name] = value.shape[0]
        if len(set(sizes.values())) > 1:
            raise PerceptionError(f"the perception's fields disagree on the batch size: {sizes}")

    def known(self) -> dict[str, Tensor]:
        """Return the fields that are not None."""
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in fields if value is not None}

    @property
    def batch(self) -> int:
        """Number of images that this perception is of."""
        for value in self.known().values():
            return int(value.shape[0])
        raise PerceptionError(
            "the perception is empty: no field is known. Where an adapter is steered by what is "
            "known elsewhere, as by an oracle, give it: perception=Perception(...)"
        )

    def __len__(self) -> int:
        return self.batch

    def __getitem__(self, index: SupportsIndex | slice) -> Perception:
        """Return the perception of one image (as a batch of one) or of a range of images.

        Raises:
            IndexError: there is no such image.
        """
        if not isinstance(index, slice):
            image = operator.index(index)
            if not -self.batch <= image < self.batch:
                raise IndexError(f"image {image} of a perception of {self.batch}")
            index = slice(image, image + 1 or None)
        return Perception(**{name: value[index] for name, value in self.known().items()})

    def detach(self) -> Perception:
        """Return the same perception, cut from the graph that made it."""
        return Perception(**{name: value.detach() for name, value in self.known().items()})

    @staticmethod
    def cat(perceptions: Sequence[Perception]) -> Perception:
        """Join perceptions that know the same fields into one batch."""
        fields = [perception.known() for perception in perceptions]
        if len({frozenset(known) for known in fields}) != 1:
            raise PerceptionError("only perceptions that know the same fields can be joined")
        return Perception(**{name: torch.cat([f[name] for f in fields]) for name in fields[0]})


register_pytree(Perception)


def check_perception(given: object, batch: int | None = None) -> None:
    """Raise unless what was given as a perception is one, of so many images, or of one for all.

    Raises:
        PerceptionError: it is something else, or of another number of images.
    """
    if not isinstance(given, Perception):
        raise PerceptionError(
            f"perception= got a {type(given).__name__}; expected a Perception, as "
            "model.perceive(image) gives, or Perception(severity=...) with what is known elsewhere"
        )
    if batch is not None and given.batch not in (1, batch):
        raise PerceptionError(
            f"the perception is of {given.batch} images and the batch has {batch}; give one for "
            "each, or one for all"
        )


@dataclass(frozen=True)
class ValueRange:
    """The affine map between images in [0, 1] and what a backbone takes and gives.

    ``backbone = (unit - mean) / std`` per channel, so ``ValueRange.of((-1, 1))`` has mean 0.5 and
    std 0.5, and an ImageNet-normalised backbone has ImageNet's mean and std.

    Raises:
        ConfigError: mean and std are of different lengths or empty, or a std is not positive.

    Example:
        >>> ValueRange.of((0, 255)).to_unit(torch.tensor([[[[51.0]]]])).item()
        0.2...
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        values = (*self.mean, *self.std)
        fits = len(self.mean) == len(self.std) > 0 and all(map(math.isfinite, values))
        if not fits or min(self.std) <= 0:
            raise ConfigError(
                f"value_range=({self.mean}, {self.std}); expected as many finite means as positive "
                "stds, one for each channel or one for all"
            )

    @classmethod
    def of(cls, value: object) -> ValueRange:
        """Read ``(low, high)``, or ``(mean, std)`` where both are sequences, one per channel.

        Raises:
            ConfigError: ``value`` is neither, or the range is empty.
        """
        if isinstance(value, ValueRange):
            return value
        value = _plain(value)
        if isinstance(value, tuple | list):
            value = [_plain(part) for part in value]
        problem = ConfigError(
            f"value_range={value!r}; expected (low, high) with low < high, such as (0, 1), or "
            "(mean, std) as two sequences with one positive std for each channel"
        )
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
            raise problem
        first, second = value
        if isinstance(first, Sequence) and isinstance(second, Sequence):
            return cls(tuple(map(float, first)), tuple(map(float, second)))
        if not all(isinstance(end, (int, float)) for end in value) or not first < second:
            raise problem
        width = float(second - first)
        return cls((0.0 - first / width,), (1.0 / width,))

    @property
    def is_unit(self) -> bool:
        """Whether the backbone itself works in [0, 1]."""
        return set(self.mean) == {0.0} and set(self.std) == {1.0}

    def to_unit(self, image: Tensor) -> Tensor:
        """Map (B, C, H, W) from the backbone's range to [0, 1]."""
        if self.is_unit:
            return image
        mean, std = self._columns(image)
        return (image * std + mean).to(image.dtype)

    def from_unit(self, image: Tensor) -> Tensor:
        """Map (B, C, H, W) from [0, 1] to the backbone's range."""
        if self.is_unit:
            return image
        mean, std = self._columns(image)
        return ((image - mean) / std).to(image.dtype)

    def _columns(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std, in single precision or better: half a precision has no 1 / 255."""
        dtype = torch.promote_types(image.dtype, torch.float32)
        mean, std = (image.new_tensor(each, dtype=dtype) for each in (self.mean, self.std))
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def _plain(value: object) -> object:
    """Numbers and lists of arrays, tensors and their elements; others as they are."""
    tolist = getattr(value, "tolist", None)
    return value if tolist is None else tolist()
