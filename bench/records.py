"""Real records for the benchmarks: the drugs of the MIMIC-IV tables that EHR_ROOT names, with their repeats."""

import os
import tempfile
from functools import cache

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

ROOT = os.environ.get("EHR_ROOT")
CASE = "MIMIC-IV drugs"


@cache
def drugs() -> tuple[list[Tensor], int]:
    """The records of `MortalityPredictionMIMIC4`, long [S] each, in PyHealth's order, and how many codes there are."""
    from rollout.data.mimic import mortality_samples

    assert ROOT is not None, "EHR_ROOT names a folder of MIMIC-IV tables"
    with tempfile.TemporaryDirectory(prefix="rollout-bench-") as cache_folder:
        samples = mortality_samples(ROOT, cache_folder)
        records = [torch.as_tensor(samples[i]["drugs"]) for i in range(len(samples))]
    return records, 1 + max(int(record.max()) for record in records)


def batches_of(records: list[Tensor], batch: int) -> list[Tensor]:
    """Batches of records, long [B, S], 0 where one has ended."""
    parts = [records[first : first + batch] for first in range(0, len(records), batch)]
    return [pad_sequence(part, batch_first=True) for part in parts]
