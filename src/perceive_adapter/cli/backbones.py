"""The network that a command is given: a checkpoint of a known architecture, or code."""

from __future__ import annotations

import importlib
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from perceive_adapter.cli.options import device, integer, name_or_path
from perceive_adapter.errors import BackboneError, MissingDependencyError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from perceive_adapter.evaluation.measure import Restore
    from perceive_adapter.injection.model import PerceiveModel

__all__ = [
    "add_backbone",
    "add_network",
    "add_restoring",
    "load_network",
    "load_wrapped",
    "side_by_side",
]

_BACKBONE_HELP: Final = (
    "a checkpoint file (.pth, .pt, .ckpt, .safetensors) of an architecture that spandrel knows, or "
    "MODULE:FUNCTION, which is imported from the current folder or the environment and called for "
    "the network with its weights"
)


def add_backbone(parser: ArgumentParser) -> None:
    """Declare ``--backbone``."""
    parser.add_argument(
        "--backbone",
        metavar="FILE_OR_CODE",
        type=name_or_path,
        required=True,
        help=_BACKBONE_HELP,
    )


def add_network(parser: ArgumentParser, *, without_adapter: str) -> None:
    """Declare ``--backbone`` and ``--adapter``, and say what stands in for an adapter."""
    add_backbone(parser)
    parser.add_argument(
        "--adapter",
        metavar="NAME_OR_FOLDER",
        type=name_or_path,
        help=f"a saved adapter's folder, or user/repo of the Hub; without it {without_adapter}",
    )


def add_restoring(parser: ArgumentParser) -> None:
    """Declare ``--tile`` and ``--device``: how images are restored, and where."""
    add = parser.add_argument
    add(
        "--tile",
        type=integer(96, 2**16),
        metavar="PX",
        help="side of tiles, 96 or more, for large images",
    )
    add("--device", type=device, default="auto", help="cpu, cuda, cuda:1 or auto (default)")


def load_network(told: str, option: str = "--backbone") -> nn.Module:
    """Return the network that ``told`` names.

    Args:
        told: a file, or module and function.
        option: of the command line, which errors name.

    Raises:
        BackboneError: there is no such file, module or function, or it gives no network.
        MissingDependencyError: a checkpoint is given and spandrel is not installed.
    """
    if Path(told).suffix in (".pth", ".pt", ".ckpt", ".safetensors"):
        return _from_checkpoint(Path(told))
    module, separator, function = told.partition(":")
    if not separator or not module or not function:
        raise BackboneError(f"{option} {told}: expected {_BACKBONE_HELP}.")
    return _from_code(module, function, option)


def load_wrapped(arguments: Namespace) -> PerceiveModel:
    """Return the network with its adapter on the device; without one, it is to be ``disabled()``.

    Raises:
        As :func:`load_network` and :func:`~perceive_adapter.wrap`.
    """
    from perceive_adapter.injection.wrap import wrap

    backbone = load_network(arguments.backbone).to(arguments.device).eval()
    alone = arguments.adapter is None
    return wrap(backbone, arguments.adapter, perceiver=False if alone else None)


def side_by_side(model: PerceiveModel, tile: int | None = None) -> dict[str, Restore]:
    """Return the backbone alone and the wrapped one, whole or in tiles, for an evaluation."""

    def wrapped(image: Tensor) -> Tensor:
        restored: Tensor = model.restore(image, tile=tile)
        return restored

    def bare(image: Tensor) -> Tensor:
        with model.disabled():
            return wrapped(image)

    return {"backbone": bare, "wrapped": wrapped}


def _from_checkpoint(file: Path) -> nn.Module:
    if not file.is_file():
        raise BackboneError(f"there is no checkpoint {str(file)!r}; check the path.")
    try:
        import spandrel
    except ImportError as error:
        raise MissingDependencyError(
            "a checkpoint's architecture is found by spandrel, which is not installed: "
            "pip install spandrel, or give MODULE:FUNCTION instead."
        ) from error
    try:
        import spandrel_extra_arches

        spandrel_extra_arches.install(ignore_duplicates=True)
    except ImportError:
        pass  # architectures with other licences, which the user may have installed
    try:
        network: nn.Module = spandrel.ModelLoader(device="cpu").load_from_file(file).model
    except Exception as error:  # whatever a file that is none makes of it
        raise BackboneError(
            f"{str(file)!r} is no checkpoint of an architecture that spandrel knows ({error}). "
            "Give MODULE:FUNCTION, a function of yours that returns the network with its weights."
        ) from error
    return network


def _from_code(module: str, function: str, option: str) -> nn.Module:
    from torch import nn

    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` has it
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever is wrong with the user's code, or a path for a module
        raise BackboneError(
            f"{option} {module}:{function} cannot be imported ({type(error).__name__}: {error}): "
            "expected a function "
            f"{function!r} in a module {module!r} of the current folder or the environment."
        ) from error
    try:
        network = found() if callable(found) and not isinstance(found, nn.Module) else found
    except Exception as error:  # whatever is wrong with the user's code
        raise BackboneError(
            f"{option} {module}:{function} raised {type(error).__name__}: {error}. It is called "
            "without arguments, and should return the network with its weights."
        ) from error
    if not isinstance(network, nn.Module):
        raise BackboneError(
            f"{option} {module}:{function} gave a {type(network).__name__}: expected a "
            "torch.nn.Module with its weights."
        )
    return network.eval()
