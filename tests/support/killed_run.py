"""A cohort run in a process of its own, to be killed."""

from pathlib import Path

import polars  # noqa: F401 - loaded here once, for all that are forked
import pyarrow.parquet  # noqa: F401
import torch

import rollout.cohort  # noqa: F401
from tests.support.toy_cohort import attribute


def run(out: str, count: int) -> None:
    """Attribute the test cohort."""
    torch.set_num_threads(1)
    attribute(Path(out), count)
