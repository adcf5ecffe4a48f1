"""Perceive one size of image and print the cost as JSON; run by cost.py.

    python one_size.py PERCEIVER HEIGHT WIDTH RUNS

``before`` is the peak resident memory with the interpreter, torch and the perceiver, after a
perception of a small image; ``peak`` that of everything, the image included.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import peak_gib

from perceive_adapter import QualityPerceiver


def main() -> None:
    name, *numbers = sys.argv[1:]
    height, width, runs = map(int, numbers)
    perceiver = QualityPerceiver.from_pretrained(name)
    seconds = []
    with torch.no_grad():
        perceiver(torch.rand(1, 3, 64, 64))
        before = peak_gib()
        image = torch.rand(1, 3, height, width)
        for _ in range(runs + 1):
            start = time.perf_counter()
            perceiver(image)
            seconds.append(time.perf_counter() - start)
    quartiles = statistics.quantiles(seconds[1:], n=4)  # the first run warms up
    print(json.dumps({"seconds": quartiles, "before": before, "peak": peak_gib()}))


if __name__ == "__main__":
    main()
