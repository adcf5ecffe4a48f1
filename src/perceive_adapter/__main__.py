"""``python -m perceive_adapter`` is ``perceive-adapter``, as launchers of processes want it."""

import sys

from perceive_adapter.cli import main

sys.exit(main())
