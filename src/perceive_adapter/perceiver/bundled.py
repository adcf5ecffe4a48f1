"""Where a perceiver's files are, and the ones that come with the package."""

import os
from pathlib import Path

__all__ = ["ASSETS", "BUNDLED", "CONFIG_NAME", "PERCEIVE_TINY", "TENSORS_NAME", "locate"]

ASSETS = Path(__file__).parents[1] / "assets"
PERCEIVE_TINY = "perceive-tiny"
BUNDLED = (PERCEIVE_TINY,)
CONFIG_NAME = "perceiver_config.json"
TENSORS_NAME = "perceiver_model.safetensors"


def locate(name_or_path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return the folder of a bundled perceiver, even where one of that name lies here too."""
    bundled = isinstance(name_or_path, str) and name_or_path in BUNDLED
    return ASSETS / name_or_path if bundled else name_or_path
