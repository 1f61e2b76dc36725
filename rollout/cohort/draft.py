"""A part being made: what its batches gave, gathered, then turned into the files of the part."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rollout.cohort.content import UNKNOWN, pack
from rollout.cohort.prefetch import ReadBatch, ReadPart
from rollout.cohort.rows import parquet_bytes
from rollout.cohort.source import Source
from rollout.results.layout import FAILURE_SCHEMA


@dataclass
class Part:
    """One part done: its files, and what its commit record says.

    Attributes:
        number: Which part.
        files: Kind → content of a Parquet file.
        record: Counts, batches, halvings and seconds, plain values.
        first_failure: Reason of its first failed sample.
    """

    number: int
    files: dict[str, bytes]
    record: dict[str, Any]
    first_failure: str | None = None


class Draft(ABC):
    """A part being made, by one thread: a task says what of.

    Args:
        source: The samples.

    Attributes:
        failures: Sample → reason.
        batches: Sizes of the batches done.
        halved: Batches that ran out of memory, plain values.
        seconds: Stage → seconds spent.
    """

    schemas: Mapping[str, pa.Schema]
    """Kind → the columns of its file; the first is the one whose rows a record counts."""
    stages: ClassVar[Sequence[str]]

    def __init__(self, source: Source) -> None:
        self.source = source
        self.failures: dict[int, str] = {}
        self.batches: list[int] = []
        self.halved: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = dict.fromkeys(self.stages, 0.0)
        self._tables: dict[str, list[pa.Table]] = {kind: [] for kind in self.schemas}

    @abstractmethod
    def run(self, model: Any, batch: ReadBatch) -> None:
        """Have a batch done by the model, and add its rows; whatever it raises is a failure of the batch."""

    def padding(self, predictions: pa.Table) -> dict[str, Any]:
        """What a record says of relevance on padding."""
        return {}

    def keep(self, tables: Mapping[str, pa.Table], wrong: Mapping[int, str]) -> None:
        """Add the rows of a batch, those of samples that went wrong left out."""
        self.failures.update(wrong)
        for kind, table in tables.items():
            self._tables[kind].append(without(table, wrong))

    def finish(self, read: ReadPart) -> Part:
        """Sort the part by sample, and make its files."""
        begun = time.perf_counter()
        tables = {kind: _by_sample(self._tables[kind], schema) for kind, schema in self.schemas.items()}
        files = {kind: parquet_bytes(table) for kind, table in tables.items()}
        failed = {**read.unread, **self.failures}
        failures = sorted(failed.items())
        if failures:
            columns = [[number for number, _ in failures], [reason for _, reason in failures]]
            files["failures"] = parquet_bytes(pa.table(columns, schema=FAILURE_SCHEMA))
        seconds = {**self.seconds, "collate": self.seconds["collate"] + read.seconds}
        seconds["write"] += time.perf_counter() - begun
        record = {
            "start": read.numbers.start,
            "stop": read.numbers.stop,
            "samples": len(read.numbers),
            "attributed": tables["predictions"].num_rows,
            "failed": len(failures),
            "rows": next(iter(tables.values())).num_rows,
            "tokens": read.tokens,
            "batches": self.batches,
            "halved": self.halved,
            "padding": self.padding(tables["predictions"]),
            "content": pack([UNKNOWN if n in failed else read.content.get(n, UNKNOWN) for n in read.numbers]),
            "seconds": {stage: round(spent, 4) for stage, spent in seconds.items()},
        }
        return Part(read.number, files, record, failures[0][1] if failures else None)


class Task(Protocol):
    """What is done to the samples of a cohort; it travels to the processes that do it."""

    done: str
    """In words, of a sample: "attributed"."""

    def begin(self, source: Source) -> Draft:
        """A part that begins."""


def unfinite_predictions(y_prob: Tensor | None, index: np.ndarray) -> Iterable[tuple[int, str]]:
    """Sample and reason, of those whose prediction is not finite."""
    if y_prob is None:
        return []
    finite = torch.isfinite(y_prob.detach().reshape(len(index), -1)).all(1).cpu().numpy()
    return [(number, "the prediction is not finite") for number in index[~finite].tolist()]


def without(table: pa.Table, samples: Mapping[int, str]) -> pa.Table:
    """A table without the rows of some samples."""
    return table.filter(~np.isin(table["sample"].to_numpy(), list(samples))) if samples else table


def _by_sample(tables: list[pa.Table], schema: pa.Schema) -> pa.Table:
    if not tables:
        return schema.empty_table()
    table = pa.concat_tables(tables).combine_chunks()
    return table.take(pa.array(np.argsort(table["sample"].to_numpy(), kind="stable")))
