"""How far ONNX Runtime is from torch: wrapped networks, exported once each for images of any size.

    python benchmarks/export.py

Perceived inside the graph by perceive-tiny, given a perception, or folded for one perception. The
prompts are randomised, so that none is the identity; the images are random, in [0, 1].
"""

import io
import logging
import warnings

import onnxruntime
import torch
from environment import describe
from half_precision import nafnet, prepare, restormer, swinir
from torch import Tensor

from perceive_adapter import PerceiveModel

EXAMPLE = (72, 104)
SIZES = ((64, 64), (72, 96), (96, 128), (320, 520))
NETWORKS = {"NAFNet": nafnet, "Restormer": restormer, "SwinIR": swinir}
WAYS = ("perception inside", "as an input", "folded")


class Session:
    """An ONNX file as a user runs it."""

    def __init__(self, model: PerceiveModel, image: Tensor, *, steered: bool = False) -> None:
        sides = {axis: 8 * torch.export.Dim(name, max=128) for axis, name in ((2, "h"), (3, "w"))}
        shapes: dict[str, object] = {"args": (sides,)}
        kwargs: dict[str, object] = {}
        if steered:
            seen = model.perceive(image).detach()
            kwargs, shapes["perception"] = {"perception": seen}, [None] * len(seen.known())
        program = torch.onnx.export(
            model, (image,), kwargs=kwargs, dynamo=True, dynamic_shapes=shapes, verbose=False
        )
        file = io.BytesIO()
        program.save(file)
        self.session = onnxruntime.InferenceSession(file.getvalue())

    def __call__(self, *tensors: Tensor) -> Tensor:
        names = [given.name for given in self.session.get_inputs()]
        arrays = {name: value.numpy() for name, value in zip(names, tensors, strict=True)}
        return torch.from_numpy(self.session.run(None, arrays)[0])


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(1, 3, *size, generator=generator) for size in SIZES]


def differences(model: PerceiveModel) -> list[float]:
    """Largest difference to torch over all sizes, for each way to perceive."""
    example = torch.rand(1, 3, *EXAMPLE, generator=torch.Generator().manual_seed(1))
    found = []
    inside = Session(model, example)
    found.append(max(largest(inside(image), model(image)) for image in images()))
    steered = Session(model, example, steered=True)
    seen = [model.perceive(image) for image in images()]
    found.append(
        max(
            largest(steered(image, *one.known().values()), model(image, perception=one))
            for image, one in zip(images(), seen, strict=True)
        )
    )
    with model.fold(seen[0]):
        folded = Session(model, example)
        found.append(max(largest(folded(image), model(image)) for image in images()))
    return found


def largest(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max())


@torch.no_grad()
def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    print(f"{describe()}, ONNX Runtime {onnxruntime.__version__}\n")
    print(f"| network | {' | '.join(WAYS)} |")
    print("|---" * (1 + len(WAYS)) + "|")
    for name, build in NETWORKS.items():
        cells = [f"{value:.1e}" for value in differences(prepare(build))]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
