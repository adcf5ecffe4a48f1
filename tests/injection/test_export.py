"""A wrapped network leaves as torch.export's graph or as ONNX, for images of any size.

The perception is made inside the graph, given to it, or folded into its weights.
"""

from __future__ import annotations

import io
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from wrapping import wrapped
from zoo import REAL

from perceive_adapter import AdapterConfig, Perception

onnxruntime = pytest.importorskip("onnxruntime")

any_size_inside = pytest.mark.newer_torch("exports no perception of images of any size")
EXAMPLE = torch.rand(1, 3, 72, 104, generator=torch.Generator().manual_seed(0))
SIZES = [(64, 64), (96, 128), (264, 520)]  # one view, one view, several
NETWORKS = ["nafnet", pytest.param("restormer", marks=pytest.mark.slow)]
NETWORKS += [pytest.param("swinir", marks=pytest.mark.slow)]
TOLERANCE = 1e-4


def any_size() -> dict[int, Any]:
    """Multiples of 8, which all three networks take without padding."""
    return {2: 8 * torch.export.Dim("h", max=128), 3: 8 * torch.export.Dim("w", max=128)}


def photograph(size: tuple[int, int]) -> Tensor:
    """Something that gets darker and noisier to one side, as views should tell apart."""
    generator = torch.Generator().manual_seed(sum(size))
    image = torch.rand(1, 3, *size, generator=generator)
    return image * torch.linspace(0.2, 1, size[1])


class Session:
    """An ONNX file as a user runs it."""

    def __init__(self, program: Any) -> None:
        file = io.BytesIO()
        program.save(file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            file.getvalue(), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [given.name for given in self.session.get_inputs()]
        self.operators = [node.op_type for node in program.model.graph]

    def __call__(self, *tensors: Tensor) -> Tensor:
        arrays: list[numpy.ndarray] = [tensor.numpy() for tensor in tensors]
        feeds = dict(zip(self.inputs, arrays, strict=True))
        return torch.from_numpy(self.session.run(None, feeds)[0])


def to_onnx(model: torch.nn.Module, **options: Any) -> Session:
    return Session(torch.onnx.export(model, (EXAMPLE,), dynamo=True, verbose=False, **options))


def steered(model: torch.nn.Module, seen: Perception) -> Session:
    """With the perception as an input."""
    fixed = [None] * len(seen.known())  # these keep their shapes
    shapes = {"args": (any_size(),), "perception": fixed}
    return to_onnx(model, kwargs={"perception": seen}, dynamic_shapes=shapes)


def largest(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).detach().abs().max())


# Perception inside


@pytest.mark.parametrize("case", NETWORKS)
@any_size_inside
def test_onnx_perceives_images_of_any_size(case: str) -> None:
    model = wrapped(case, perceiver=None)
    session = to_onnx(model, dynamic_shapes={"args": (any_size(),)})
    with torch.no_grad():
        for size in SIZES:
            image = photograph(size)
            expected = model(image)
            assert largest(session(image), expected) < TOLERANCE
            with model.disabled():
                assert largest(model(image), expected) > 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("options", [{}, {"config": AdapterConfig(level="cross_attention")}])
@any_size_inside
def test_onnx_with_the_compact_features_alone(case: str, options: dict[str, Any]) -> None:
    model = wrapped(case, **options)
    session = to_onnx(model, dynamic_shapes={"args": (any_size(),)})
    with torch.no_grad():
        for size in SIZES:
            assert largest(session(photograph(size)), model(photograph(size))) < TOLERANCE


@pytest.mark.slow
@any_size_inside
def test_onnx_with_semantic_guidance() -> None:
    model = wrapped("u_shape", config=AdapterConfig(semantic="perceive-tiny"))
    session = to_onnx(model, dynamic_shapes={"args": (any_size(),)})
    for size in SIZES:
        assert largest(session(photograph(size)), model(photograph(size))) < TOLERANCE


def test_a_graph_limited_to_what_it_treats() -> None:
    model = wrapped("isotropic", perceiver=None)
    model.treat("low_light")
    program = torch.export.export(model, (EXAMPLE,), strict=False).module()
    dark, bright = 0.05 * photograph((72, 104)), photograph((72, 104)).clamp(min=0.3)
    changes = []
    for image in (dark, bright):
        assert largest(program(image), model(image)) < TOLERANCE
        with model.disabled():
            changes.append(largest(program(image), model(image)))
    assert changes[0] > 10 * changes[1]


# Perception as an input


@pytest.mark.newer_torch("writes no addcmul to ONNX where sizes vary")
def test_onnx_takes_a_perception_as_input() -> None:
    model = wrapped("u_shape", perceiver=None)
    seen = model.perceive(EXAMPLE).detach()
    session = steered(model, seen)
    assert session.inputs[1:] == [f"perception_{name}" for name in seen.known()]
    image = photograph((96, 128))
    for perceived in (seen, model.perceive(image).detach()):
        actual = session(image, *perceived.known().values())
        assert largest(actual, model(image, perception=perceived)) < TOLERANCE
    assert largest(actual, model(image, perception=seen)) > TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", REAL)
def test_onnx_of_real_networks_takes_a_perception_as_input(case: str) -> None:
    model = wrapped(case, perceiver=None)
    session = steered(model, model.perceive(EXAMPLE).detach())
    for size in SIZES:
        image = photograph(size)
        perceived = model.perceive(image).detach()
        actual = session(image, *perceived.known().values())
        assert largest(actual, model(image, perception=perceived)) < TOLERANCE


def test_an_exported_graph_is_saved_and_takes_a_perception(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = AdapterConfig(sources={"degradations": 2})
    model = wrapped("isotropic", config=config)
    told = [Perception(degradations=row) for row in torch.eye(2)[:, None]]
    program = torch.export.export(model, (EXAMPLE,), {"perception": told[0]}, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    outputs = [loaded(EXAMPLE, perception=one) for one in told]
    for one, output in zip(told, outputs, strict=True):
        assert largest(output, model(EXAMPLE, perception=one)) < TOLERANCE
    assert largest(*outputs) > TOLERANCE
    assert "weights_only" not in caplog.text  # nothing was unpickled that need not be


# Folded


@pytest.mark.parametrize(
    "case", ["u_shape", *(pytest.param(n, marks=pytest.mark.slow) for n in REAL)]
)
def test_a_folded_graph_is_the_bare_network_with_other_weights(case: str) -> None:
    model = wrapped(case, perceiver=None, config=AdapterConfig(level=None))
    dense = {"Conv", "MatMul", "Gemm"}
    with model.disabled():
        bare = to_onnx(model, dynamic_shapes={"args": (any_size(),)})
    with model.fold(model.perceive(EXAMPLE)):
        folded = to_onnx(model, dynamic_shapes={"args": (any_size(),)})
        for size in SIZES:
            image = photograph(size)
            assert largest(folded(image), model(image)) < TOLERANCE
            assert largest(bare(image), model(image)) > TOLERANCE
    count = [sum(kind in dense for kind in graph.operators) for graph in (bare, folded)]
    assert count[0] == count[1]
