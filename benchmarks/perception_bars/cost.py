"""Seconds and memory of one perception, each size in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

from perception_bars.photographs import Subject
from perception_bars.report import table

PROCESS = Path(__file__).with_name("one_size.py")
SIZES = {
    "256 x 256": (256, 256, 21),
    "512 x 512": (512, 512, 21),
    "12 megapixels, 3000 x 4000": (3000, 4000, 5),
    "24 megapixels, 4000 x 6000": (4000, 6000, 5),
}


def report(subject: Subject) -> str:
    """Medians, quartiles and peaks; there is no bar."""
    rows = []
    for name, size in SIZES.items():
        command = [sys.executable, str(PROCESS), subject.name, *map(str, size)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = json.loads(output)
        low, middle, high = (1000 * seconds for seconds in found["seconds"])
        rows.append(
            (
                name,
                f"{middle:.0f} ms ({low:.0f} to {high:.0f})",
                f"{found['before']:.2f} GiB",
                f"{found['peak']:.2f} GiB",
            )
        )
    columns = ("image", "time, median (quartiles)", "peak before", "peak, image included")
    return table(columns, rows)
