"""A run whose worker hangs, as a program: `python -m tests.support.hanging_run FOLDER HOW`, to be interrupted."""

import os
import sys
from pathlib import Path

from tests.support import deadly, toy_cohort

FOLDER, HOW = Path(sys.argv[1]), sys.argv[2]


def explain(model, batch):  # travels by value: it is of `__main__`, which has no guard
    """Say which process is at work, and hang there."""
    (FOLDER / f"pid-{os.getpid()}").touch()
    deadly.die(HOW)


toy_cohort.attribute(FOLDER / "out", count=20, explain=explain, workers=2)
