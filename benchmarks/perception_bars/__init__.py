"""The parts of ``benchmarks/perception.py``, one for each question that it answers."""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or its import asks the network
