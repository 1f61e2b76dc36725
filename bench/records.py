"""Batches of records for the benchmarks, among them the drugs of the MIMIC-IV tables that EHR_ROOT names."""

import os
import tempfile
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bench.machine import host
from rollout.bench.end_to_end import Batches

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


def batches_of(records: list[Tensor], batch: int, device: torch.device = host.DEVICE) -> Batches:
    """Batches of records, long [B, S], 0 where one has ended, with labels."""
    parts = [records[first : first + batch] for first in range(0, len(records), batch)]
    data = [{"codes": pad_sequence(part, batch_first=True), "label": torch.zeros(len(part), 1)} for part in parts]
    return [{key: part.to(device) for key, part in each.items()} for each in data]


def time_call(
    measure: Callable[..., None], run: Callable[[], Tensor], data: Batches, sizes: dict[str, int], **info: Any
) -> None:
    """Hands `measure` a call over batches, with how many samples they hold; `sizes` are those of the model."""
    ids = [batch["codes"] for batch in data]
    shape = {"B": len(ids[0]), "S": max(each.shape[1] for each in ids)} | sizes
    measure(run, samples=sum(map(len, ids)), shape=shape, **{"tolerance": 1e-5} | info)
