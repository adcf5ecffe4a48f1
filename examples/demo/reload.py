"""Load a saved adapter in a fresh process and check that it restores as it did when saved.

python examples/demo/reload.py out/demo/adapter out/demo/example.safetensors
"""

import sys

import torch
from denoiser import load_denoiser
from safetensors.torch import load_file

from perceive_adapter import wrap

TOLERANCE = 1e-5


def main(adapter: str, example: str) -> int:
    model = wrap(load_denoiser(), adapter)
    images = load_file(example)
    with torch.no_grad():
        restored = model(images["degraded"])
    difference = (restored - images["restored"]).abs().max().item()
    if difference > TOLERANCE:
        print(f"Loaded in a fresh process, its output DIFFERS by {difference:.2g}", file=sys.stderr)
        return 1
    agreement = "identical, bit for bit" if difference == 0 else f"the same within {difference:.1g}"
    print(f"Loaded in a fresh process, its output is {agreement}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
