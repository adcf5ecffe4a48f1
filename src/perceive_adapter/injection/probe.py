"""Dry runs: what a backbone's modules see and give, recorded without leaving a trace."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from perceive_adapter.errors import BackboneError, ConfigError, ImageError
from perceive_adapter.injection.prompts import is_dense

__all__ = [
    "Call",
    "Example",
    "Trace",
    "check_image",
    "find_image",
    "image_alone",
    "image_argument",
    "quiet",
    "tensors_in",
    "trace",
    "weight_like_images",
]

SAMPLES = 4096


@dataclass(frozen=True)
class Example:
    """The arguments of one dry run, and which of them is the image."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    image_arg: int | str

    @property
    def image(self) -> Tensor:
        """The image (B, C, H, W)."""
        where: Any = self.args if isinstance(self.image_arg, int) else self.kwargs
        try:
            image = where[self.image_arg]
        except (IndexError, KeyError):
            raise BackboneError(
                f"image_arg={self.image_arg!r} names no argument of the example, which has "
                f"{len(self.args)} positional arguments and keywords {sorted(self.kwargs)}"
            ) from None
        if not isinstance(image, Tensor) or image.ndim != 4:
            raise BackboneError(
                f"the example's image is {_describe(image)}; expected a tensor (B, C, H, W)"
            )
        return image

    def with_image(self, image: Tensor) -> Example:
        """Return the same call on another image."""
        if isinstance(self.image_arg, int):
            args = list(self.args)
            args[self.image_arg] = image
            return dataclasses.replace(self, args=tuple(args))
        return dataclasses.replace(self, kwargs={**self.kwargs, self.image_arg: image})

    def doubled(self) -> Example:
        """Return a batch twice as large, in which every second half differs from the first.

        Every tensor argument with the image's batch size is doubled with it.
        """
        image = self.image
        second = image.flip(-1) * 0.5

        def double(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == image.shape[0]:
                return torch.cat([value, value])
            return value

        twice = dataclasses.replace(
            self,
            args=tuple(map(double, self.args)),
            kwargs={key: double(value) for key, value in self.kwargs.items()},
        )
        return twice.with_image(torch.cat([image, second]))

    def resized(self, height: int, width: int) -> Example:
        """Return the same call on an image of another size, cropped or tiled from this one.

        Every map of the image's size, such as a noise level per pixel, is resized with it.
        """
        size = self.image.shape[-2:]
        rows, columns = -(-height // size[0]), -(-width // size[1])

        def resize(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim == 4 and value.shape[-2:] == size:
                return value.repeat(1, 1, rows, columns)[..., :height, :width].clone()
            return value

        return dataclasses.replace(
            self,
            args=tuple(map(resize, self.args)),
            kwargs={key: resize(value) for key, value in self.kwargs.items()},
        )

    def call(self, backbone: nn.Module) -> Any:
        """Run ``backbone`` on a copy of the tensors, since some networks write to their input.

        Networks that draw random numbers draw the same ones every time, so that runs compare; the
        random state is put back by :func:`quiet`.
        """
        _seed(self.image.device)
        args = [v.clone() if isinstance(v, Tensor) else v for v in self.args]
        kwargs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.kwargs.items()}
        return backbone(*args, **kwargs)


def _seed(device: torch.device) -> None:
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":  # torch.manual_seed would reach the other devices too
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)


def image_argument(backbone: nn.Module, image_arg: int | str) -> tuple[int | None, str | None]:
    """Return position and name of the image argument, as far as the signature tells them.

    Raises:
        ConfigError: it is neither a position from 0 nor a keyword.
    """
    counted = isinstance(image_arg, int) and not isinstance(image_arg, bool) and image_arg >= 0
    if not counted and not isinstance(image_arg, str):
        raise ConfigError(f"image_arg={image_arg!r}; expected a position from 0, or a keyword")
    names = [
        parameter.name
        for parameter in inspect.signature(backbone.forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if isinstance(image_arg, str):
        return (names.index(image_arg) if image_arg in names else None), image_arg
    return image_arg, names[image_arg] if image_arg < len(names) else None


def image_alone(
    image_arg: tuple[int | None, str | None], image: Tensor
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return the arguments of a call with an image and nothing else.

    Args:
        image_arg: position and name of the image, as :func:`image_argument` gives them.
        image: (B, C, H, W).

    Raises:
        ConfigError: the image is neither the first argument nor known by name.
    """
    position, name = image_arg
    if position == 0:
        return (image,), {}
    if name is None:
        raise ConfigError(
            f"the backbone's image is argument {position}, whose name its signature does not tell, "
            "so that nothing can call it with the image alone; wrap a module that takes the image "
            "first, or by a name: image_arg=..."
        )
    return (), {name: image}


@dataclass
class Call:
    """One call of one module."""

    name: str
    end: int = -1
    input: Tensor | None = None
    output_shape: tuple[int, ...] | None = None
    input_shape: tuple[int, ...] | None = None
    rows: Tensor | None = None
    version: int = 0
    input_changed: bool = False

    def finish(self) -> None:
        """Note whether the input was written to after the module had read it; let it go."""
        if self.input is not None:
            self.input_changed = self.input._version != self.version
            self.input = None


@dataclass
class Trace:
    """Every call of one dry run, by module name, and the output."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    output: Any = None


@contextmanager
def quiet(backbone: nn.Module) -> Iterator[None]:
    """Run a backbone frozen and in eval mode, and leave no trace of it.

    Modes, ``requires_grad``, buffers and the random state are put back, also after an exception.
    """
    modes = [(module, module.training) for module in backbone.modules()]
    buffers = [(module, dict(module._buffers)) for module in backbone.modules()]
    values = [(b, b.clone()) for _, own in buffers for b in own.values() if b is not None]
    grads = [(parameter, parameter.requires_grad) for parameter in backbone.parameters()]
    devices = {t.device for t in backbone.parameters() if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d.index or 0 for d in devices]):
        try:
            for module, _ in modes:
                module.training = False
            for parameter, _ in grads:
                parameter.requires_grad_(False)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, required in grads:
                parameter.requires_grad_(required)
            for module, own in buffers:
                module._buffers.clear()
                module._buffers.update(own)
            with torch.no_grad():
                for buffer, value in values:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


def trace(backbone: nn.Module, example: Example, *, fingerprints: bool = True) -> Trace:
    """Run ``backbone`` once and record every call of every submodule.

    Args:
        backbone: run inside :func:`quiet`.
        example: what it is called with.
        fingerprints: whether to keep a number for every row of the layers' inputs, by which the
            order of windows in the batch axis is told.
    """
    result, open_calls = Trace(), list[Call]()
    clock = itertools.count()
    recorder = _Recorder(result, open_calls, clock, fingerprints)
    with ExitStack() as stack, torch.no_grad():
        for name, module in backbone.named_modules():
            if name:
                recorder.watch(name, module, stack)
        result.output = example.call(backbone)
    for calls in result.calls.values():
        for call in calls:
            call.finish()
    return result


class _Recorder:
    """The hooks of one dry run."""

    def __init__(
        self, result: Trace, running: list[Call], clock: Iterator[int], fingerprints: bool
    ) -> None:
        self.result = result
        self.running = running
        self.clock = clock
        self.fingerprints = fingerprints

    def watch(self, name: str, module: nn.Module, stack: ExitStack) -> None:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.running.append(Call(name))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            call = self.running.pop()
            while call.name != name:  # a call below was left by an exception that was caught
                call = self.running.pop()
            call.end = next(self.clock)
            if args and _is_real(args[0]):
                call.input, call.version = args[0], args[0]._version
                call.input_shape = tuple(args[0].shape)
                if self.fingerprints and args[0].ndim > 1:
                    call.rows = _fingerprint(args[0])
            if _is_real(output):
                call.output_shape = tuple(output.shape)
            self.result.calls.setdefault(name, []).append(call)

        stack.callback(module.register_forward_pre_hook(before).remove)
        stack.callback(module.register_forward_hook(after).remove)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_complex()


def _fingerprint(features: Tensor) -> Tensor:
    """Reduce every row to one number. Not its mean, which layer norm makes the same for all."""
    rows = features.detach().flatten(1)
    step = rows.shape[1] // SAMPLES | 1  # odd, so that it falls on all channels
    rows = rows[:, ::step].float()
    pattern = torch.arange(rows.shape[1], device=rows.device, dtype=torch.float32).cos()
    return rows @ pattern


def weight_like_images(backbone: nn.Module) -> Tensor:
    """Return a weight of the dtype and device that a backbone's images have.

    That of its first dense layer: other parameters may be kept in another precision.
    """
    layers = (module for module in backbone.modules() if is_dense(module))
    for module in itertools.chain(layers, [backbone]):
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return parameter
    return torch.empty(0)


def find_image(output: Any, batch: int) -> Tensor:
    """Find the restored image in what a backbone returned: the largest (B, C, H, W) tensor.

    Tuples, lists, mappings and dataclasses are searched in their own order; of stages of one size
    the first is taken, of images at several scales the full one.

    Raises:
        BackboneError: there is none.
    """
    images = [
        tensor
        for tensor in tensors_in(output)
        if tensor.ndim == 4 and tensor.shape[0] == batch and tensor.is_floating_point()
    ]
    if images:
        return max(images, key=lambda image: image.shape[-2:].numel())
    raise BackboneError(
        f"the backbone returned {_describe(output)}, and no floating-point tensor "
        f"({batch}, C, H, W) is in it; wrap a network that maps a degraded to a restored image"
    )


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in what a network returned: a tensor, or a nest of containers."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (t for value in output.values() for t in tensors_in(value))
    elif isinstance(output, Sequence) and not isinstance(output, str):
        yield from (t for value in output for t in tensors_in(value))
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        yield from (
            t for f in dataclasses.fields(output) for t in tensors_in(getattr(output, f.name))
        )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return "None" if value is None else f"a {type(value).__name__}"


def check_image(image: Any, channels: int | None, where: str) -> Tensor:
    """Return ``image`` if it is a batch of images that a backbone can take.

    Raises:
        ImageError: wrong type, dimensions, dtype, channels, or no image at all.
    """
    expected = f"a floating-point tensor (B, {channels or 'C'}, H, W)"
    if not isinstance(image, Tensor):
        raise ImageError(f"{where} is {_describe(image)}; expected {expected}")
    wrong = (
        image.ndim != 4
        or not image.is_floating_point()
        or (channels is not None and image.shape[1] != channels)
    )
    if wrong:
        raise ImageError(
            f"{where} is {_describe(image)}; expected {expected}; restore() takes other kinds of "
            "images, such as uint8, gray or PIL"
        )
    if 0 in image.shape:
        raise ImageError(f"{where} is empty, {tuple(image.shape)}; expected at least one pixel")
    return image
