"""Which axis is which: told by changing the batch, then the size, and looking at the shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perceive_adapter.injection.plan import Layout
from perceive_adapter.injection.probe import Call, Trace
from perceive_adapter.injection.prompts import weight_shape

__all__ = ["Feature", "Traces", "layer_layout", "level_feature"]

MIN_CHANNELS = 5


@dataclass(frozen=True)
class Traces:
    """Dry runs of one backbone that differ in one thing each; None where it refused the input.

    Args:
        base: on the example.
        size: on an image of ``other_size``.
        single: the one of these two that ``batch`` compares with.
        batch: on two images.
        image_size: height and width of the example.
        other_size: height and width that ``size`` was tried with.
    """

    base: Trace
    size: Trace | None
    single: Trace
    batch: Trace | None
    image_size: tuple[int, int]
    other_size: tuple[int, int]


@dataclass(frozen=True)
class Feature:
    """A module's output as a feature map."""

    layout: Layout
    channels: int
    stride: float
    input_stride: float


def level_feature(name: str, traces: Traces) -> Feature | str:
    """Read a module's output as a feature map, or say in words why it is none."""
    calls = traces.base.calls.get(name, [])
    if not calls:
        return "its hook never fires in a forward pass"
    if len(calls) > 1:
        return f"it runs {len(calls)} times in one forward pass"
    shape = calls[0].output_shape
    if shape is None:
        return "its output is not a single real tensor"
    if len(shape) not in (3, 4) or shape[0] != 1:
        return f"its output {shape} is no feature map"
    other = _only_call(traces.size, name)
    if other is None and len(shape) == 4:
        return _guess_feature(shape, calls[0], traces)
    sizes = other.output_shape if other is not None else None
    if sizes is None or len(sizes) != len(shape):
        return f"the layout of its output {shape} cannot be told"
    if not _keeps_batch(name, traces):
        return f"its output {shape} does not grow with the batch in its first axis"
    spatial = [i for i in range(1, len(shape)) if shape[i] != sizes[i]]
    channel = [i for i in range(1, len(shape)) if i not in spatial]
    if len(spatial) != len(shape) - 2:
        return f"its output {shape} does not grow with the image"
    axis = 1 if channel == [1] else -1
    if axis == -1 and channel != [len(shape) - 1]:
        return f"its output {shape} has its channels neither first nor last"
    return _feature(shape, axis, calls[0], traces, other)


def _keeps_batch(name: str, traces: Traces) -> bool:
    """Tell whether twice the images give twice the output, as far as that could be tried."""
    one, two = _only_call(traces.single, name), _only_call(traces.batch, name)
    if one is None or one.output_shape is None or traces.batch is None:
        return True
    return two is not None and two.output_shape == (2, *one.output_shape[1:])


def _guess_feature(shape: tuple[int, ...], call: Call, traces: Traces) -> Feature | str:
    """Read a 4-D output of a network that takes one size only: space is what has its aspect."""
    height, width = traces.image_size
    first = shape[2] * width == shape[3] * height and shape[2] <= height
    last = shape[1] * width == shape[2] * height and shape[1] <= height
    if first == last:
        return f"the layout of its output {shape} is ambiguous, NCHW or NHWC"
    return _feature(shape, 1 if first else -1, call, traces, None)


def _feature(
    shape: tuple[int, ...], axis: int, call: Call, traces: Traces, other: Call | None
) -> Feature | str:
    channels = shape[axis]
    if channels < MIN_CHANNELS:
        return f"its output {shape} is an image, not features"
    stride = _stride(shape, other.output_shape if other else None, axis, traces)
    inputs = call.input_shape
    known = inputs is not None and len(inputs) == len(shape) and inputs[0] == 1
    if not known:
        return Feature(Layout(0, axis), channels, stride, stride)
    before = _stride(inputs, other.input_shape if other else None, axis, traces)
    return Feature(Layout(0, axis), channels, stride, before)


def _stride(
    shape: tuple[int, ...] | None, other: tuple[int, ...] | None, axis: int, traces: Traces
) -> float:
    """Return the input pixels per position.

    Networks that pad the image, or do not pad before a convolution, have some positions more or
    less than that says: there it is the growth from one image size to the other that counts.
    """
    whole, side = _side(traces.image_size), _side(shape, axis)
    ratio = whole / side
    if other is None or abs(max(ratio, 1 / ratio) % 1 - 0.5) > 0.49:  # nearly an integer
        return round(ratio, 3)
    grown = side - _side(other, axis)
    return round((whole - _side(traces.other_size)) / grown if grown else ratio, 3)


def _side(shape: tuple[int, ...] | None, axis: int | None = None) -> float:
    """Return the side of a square of as many positions."""
    positions = torch.Size(shape or ()).numel() / (shape[axis] if shape and axis is not None else 1)
    return float(max(positions, 1) ** 0.5)


def layer_layout(name: str, module: nn.Module, traces: Traces) -> Layout | str:
    """Tell where a dense layer's input has the batch, or say in words why nothing can go there."""
    calls = traces.base.calls.get(name, [])
    if not calls:
        return "its hook never fires in a forward pass"
    if any(call.input_shape is None or call.output_shape is None for call in calls):
        return "it is not called with one real tensor, or does not give one"
    if any(call.input_changed for call in calls):
        return "its input is changed in place afterwards"
    if any(_pads_by_itself(module, call) for call in calls):
        return "it pads its input by itself, which a branch beside it would not"
    axis = -1 if isinstance(module, nn.Linear) else 1
    if any(not _gives_channels(module, call, axis) for call in calls):
        return "its output has other channels than its weight"
    if traces.batch is None:
        return Layout(0, axis)
    single, doubled = traces.single.calls.get(name, []), traces.batch.calls.get(name, [])
    if len(doubled) != len(single):
        return "it runs more often for a larger batch"
    found = {_batch_axis(one, two, axis) for one, two in zip(single, doubled, strict=True)}
    if len(found) > 1:
        return "its calls differ in where they have the batch"
    return found.pop()


def _gives_channels(module: nn.Module, call: Call, axis: int) -> bool:
    """Tell whether a dense layer's output is what its weight makes of its input."""
    before, after = call.input_shape or (), call.output_shape or ()
    return len(before) == len(after) and after[axis] == weight_shape(module)[0]


def _pads_by_itself(module: nn.Module, call: Call) -> bool:
    """Tell whether a convolution gives another size than its geometry says."""
    if not isinstance(module, nn.Conv2d) or isinstance(module.padding, str):
        return False
    given, found = call.input_shape or (), call.output_shape or ()
    walks = zip(module.kernel_size, module.stride, module.padding, module.dilation, strict=True)
    sides = [
        (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for side, (kernel, stride, padding, dilation) in zip(given[-2:], walks, strict=True)
    ]
    return tuple(sides) != found[-2:]


def _batch_axis(one: Call, two: Call, axis: int) -> Layout | str:
    before, after = one.input_shape or (), two.input_shape or ()
    grown = [i for i, (a, b) in enumerate(zip(before, after, strict=False)) if b == 2 * a]
    if len(before) != len(after) or len(grown) != 1 or before == after:
        return "it does not see one image of the batch each"
    if grown == [1] and axis == -1 and len(before) == 3:
        return Layout(1, axis)
    if grown != [0]:
        return "it does not have the batch in its first axis"
    rows, both = one.rows, two.rows
    if rows is None or both is None:
        return "its input has one dimension only"
    if len(rows) == 1:
        return Layout(0, axis)
    if _alike(both[: len(rows)], rows):
        return Layout(0, axis, "major")
    if _alike(both[::2], rows):
        return Layout(0, axis, "minor")
    return "the order of images in its batch axis cannot be told"


def _alike(left: Tensor, right: Tensor) -> bool:
    scale = float(right.abs().max().clamp_min(1e-6))
    return bool(torch.allclose(left, right, rtol=1e-2, atol=1e-2 * scale))


def _only_call(trace: Trace | None, name: str) -> Call | None:
    calls = trace.calls.get(name, []) if trace is not None else []
    return calls[0] if len(calls) == 1 else None
