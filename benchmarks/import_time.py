"""Import time of perceive_adapter beyond torch, each import in a process of its own.

python benchmarks/import_time.py [--pairs 11]
"""

import argparse
import statistics
import subprocess
import sys

BAR_SECONDS = 0.3
SCRIPT = """
import sys, time
import torch
start = time.perf_counter()
import perceive_adapter
{more}
print(time.perf_counter() - start)
heavy = {{"timm", "open_clip", "torchvision", "huggingface_hub", "accelerate", "gradio"}}
heavy |= {{"spandrel"}}
print(",".join(sorted(heavy & set(sys.modules))) or "none")
"""
VARIANTS = {
    "import perceive_adapter": "",
    "... and every public name": "[getattr(perceive_adapter, n) for n in perceive_adapter.__all__]",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=11)
    runs = parser.parse_args().pairs
    for name, more in VARIANTS.items():
        results = [
            subprocess.run(
                [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT.format(more=more)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()
            for _ in range(runs)
        ]
        seconds = sorted(float(first) for first, _ in results)
        print(
            f"{name}: median {statistics.median(seconds):.3f} s beyond torch "
            f"({seconds[0]:.3f} to {seconds[-1]:.3f}, {runs} runs, bar {BAR_SECONDS}), heavy "
            f"packages imported: {results[0][1]}"
        )


if __name__ == "__main__":
    main()
