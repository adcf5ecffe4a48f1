"""How right the bundled perceiver is, on images and degradations that it was never trained on.

    pip install -e . --group benchmarks
    python benchmarks/perception.py --data DIR [--perceiver perceive-tiny|FOLDER] [--limit N]
        [--only own foreign noise correlation stability cost] [--out FILE.md]

Installing builds libsvm for BRISQUE, which needs a C++ compiler. DIR/test holds the photographs of
CBSD68 and real pairs of degraded and clean images, in the folders that
``perception_bars/photographs.py`` names; those that are missing are named and skipped.
scikit-image's photographs are added. What is measured, and why:

1. own: tiers, types and severities of the package's own degradations, on whole images and on
   patches, since patches are what training saw and what a quality map shows.
2. foreign: types of degradations by other generators and by the world; a perceiver that knows only
   its own generator's fingerprint fails here.
3. noise: uniform noise, which is nothing like a photograph, must not score well.
4. correlation: how well the score follows severity, beside two scores that need no training here.
5. stability: flips, lossless files and crops leave the quality as it was, and so the score.
6. cost: time and memory, which must not grow with a photograph's size.

Prints Markdown tables, a bar and a mark beside each figure that has one; misses are printed too.
"""

import argparse
import datetime
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from environment import processor
from perception_bars import correlation, cost, foreign, own, stability
from perception_bars.photographs import Subject, load_subject

SECTIONS: dict[str, tuple[str, Callable[[Subject], str]]] = {
    "own": ("Own degradations", own.report),
    "foreign": ("Foreign generators and real pairs", foreign.report),
    "noise": ("Uniform noise", stability.noise_report),
    "correlation": ("Correlation with severity", correlation.report),
    "stability": ("Stability", stability.report),
    "cost": ("Cost", cost.report),
}
PACKAGES = ("torch", "torchvision", "albumentations", "brisque", "opencv-python-headless")
PACKAGES += ("scikit-image", "pillow", "numpy")


def heading(subject: Subject, missing: list[str]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    counts = {"CBSD68": len(subject.clean), "scikit-image": len(subject.bundled)}
    counts |= {folder: len(pairs) for folder, pairs in subject.pairs.items()}
    lines = [
        f"# Perception of {subject.name}",
        f"{datetime.date.today().isoformat()}; weights {subject.perceiver.fingerprint()[:12]}; "
        f"CPU {processor()}, {torch.get_num_threads()} threads; {versions}.",
        f"Images: {', '.join(f'{name} {count}' for name, count in counts.items())}. "
        f"Missing: {', '.join(missing) or 'none'}.",
    ]
    return "\n\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with test/ in it")
    parser.add_argument("--perceiver", default="perceive-tiny", help="a name or a folder")
    parser.add_argument("--limit", type=int, help="images of each folder, for a quick look")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, help="Markdown file to write as well")
    options = parser.parse_args()
    subject, missing = load_subject(options.perceiver, options.data, options.limit)
    if not subject.perceiver.degradations:
        parser.error(f"{options.perceiver} has no degradation heads, which this measures")
    parts = [heading(subject, missing)]
    print(parts[0], flush=True)
    for name in options.only:
        title, report = SECTIONS[name]
        start = time.perf_counter()
        body = report(subject)
        parts.append(f"## {title}\n\n{body}\n\n{time.perf_counter() - start:.0f} s.")
        print(f"\n{parts[-1]}", flush=True)
        if options.out:  # after every section, so that a long run that breaks off leaves its start
            options.out.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
