"""Where a perceiver's files are, and the ones that come with the package."""

import os
from pathlib import Path

__all__ = ["ASSETS", "BUNDLED", "CONFIG_NAME", "TENSORS_NAME", "locate"]

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = ("perceive-tiny",)
CONFIG_NAME = "perceiver_config.json"
TENSORS_NAME = "perceiver_model.safetensors"


def locate(name_or_path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return the folder of a bundled perceiver; a folder of the same name comes first."""
    if isinstance(name_or_path, str) and name_or_path in BUNDLED:
        return name_or_path if Path(name_or_path).is_dir() else ASSETS / name_or_path
    return name_or_path
