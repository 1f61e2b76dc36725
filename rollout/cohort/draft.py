"""A part being made: the rows of its batches gathered, then turned into the files of the part."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rollout.cohort.content import UNKNOWN, pack
from rollout.cohort.explain import Explained
from rollout.cohort.prefetch import ReadBatch, ReadPart
from rollout.cohort.rows import measured_rows, parquet_bytes, prediction_table
from rollout.cohort.shares import Measured, wrong_sums
from rollout.cohort.source import Source
from rollout.results.layout import ATTRIBUTION_SCHEMA, FAILURE_SCHEMA, PREDICTION_SCHEMA, STAGES, TARGET
from rollout.results.padding import count_padding


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


@dataclass
class Draft:
    """A part being made, by one thread.

    Attributes:
        source: The samples.
        class_specific: Whether predictions have a column for the class explained.
        failures: Sample → reason.
        batches: Sizes of the batches done.
        halved: Batches that ran out of memory, plain values.
        seconds: Stage → seconds spent.
    """

    source: Source
    class_specific: bool
    failures: dict[int, str] = field(default_factory=dict)
    batches: list[int] = field(default_factory=list)
    halved: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    _attributions: list[pa.Table] = field(default_factory=list)
    _predictions: list[pa.Table] = field(default_factory=list)

    def add(self, batch: ReadBatch, explained: Explained) -> None:
        """Add the rows of a batch.

        A sample with a number among them that is not finite is a failure, and so is one with a row that does not sum to
        1 where `explained` says that rows do.
        """
        begun = time.perf_counter()
        known = set(self.source.decoders)
        if not explained.relevance or not known.issuperset(explained.relevance):
            raise ValueError(f"explain must give relevance of {sorted(known)}, got {sorted(explained.relevance)}")
        attributions, rows = measured_rows(batch.samples, batch.index, explained.relevance, self.source.decoders)
        predictions = self._predicted(batch, explained, rows)
        wrong = wrong_sums(rows, batch.index, zero_rows=explained.zero_rows) if explained.row_sums else {}
        wrong |= _not_finite(attributions, explained.y_prob, batch.index)
        self.failures.update(wrong)
        self._attributions.append(_without(attributions, wrong))
        self._predictions.append(_without(predictions, wrong))
        self.seconds["write"] += time.perf_counter() - begun

    def _predicted(self, batch: ReadBatch, explained: Explained, rows: Mapping[str, Measured]) -> pa.Table:
        size = len(batch.samples)
        unknown = np.full(size, np.nan)
        shares = [rows[feature].share if feature in rows else unknown for feature in self.source.decoders]
        table = prediction_table(
            batch.samples, batch.index, explained.y_prob, explained.y_true, np.stack(shares, axis=1)
        )
        if not self.class_specific:
            return table
        target = None if explained.target is None else explained.target.cpu().numpy()
        column = pa.nulls(size, pa.int32()) if target is None else pa.array(target, pa.int32())
        return table.append_column(TARGET, column)

    def finish(self, read: ReadPart) -> Part:
        """Sort the part by sample, and make its files."""
        begun = time.perf_counter()
        predicted = PREDICTION_SCHEMA.append(TARGET) if self.class_specific else PREDICTION_SCHEMA
        attributions = _by_sample(self._attributions, ATTRIBUTION_SCHEMA)
        predictions = _by_sample(self._predictions, predicted)
        files = {"attributions": parquet_bytes(attributions), "predictions": parquet_bytes(predictions)}
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
            "attributed": predictions.num_rows,
            "failed": len(failures),
            "rows": attributions.num_rows,
            "tokens": read.tokens,
            "batches": self.batches,
            "halved": self.halved,
            "padding": count_padding(predictions, list(self.source.decoders)),
            "content": pack([UNKNOWN if n in failed else read.content.get(n, UNKNOWN) for n in read.numbers]),
            "seconds": {stage: round(spent, 4) for stage, spent in seconds.items()},
        }
        return Part(read.number, files, record, failures[0][1] if failures else None)


def _not_finite(attributions: pa.Table, y_prob: Tensor | None, index: np.ndarray) -> dict[int, str]:
    """Sample → reason, of the samples that have a NaN or an infinity in a row."""
    wrong: dict[int, str] = {}
    rows = attributions.filter(~np.isfinite(attributions["attribution"].to_numpy()))
    for number, feature in zip(rows["sample"].to_pylist(), rows["feature"].to_pylist(), strict=True):
        wrong.setdefault(number, f"the attribution of feature {feature!r} is not finite")
    if y_prob is not None:
        finite = torch.isfinite(y_prob.detach().reshape(len(index), -1)).all(1).cpu().numpy()
        for number in index[~finite].tolist():
            wrong.setdefault(number, "the prediction is not finite")
    return wrong


def _without(table: pa.Table, samples: dict[int, str]) -> pa.Table:
    return table.filter(~np.isin(table["sample"].to_numpy(), list(samples))) if samples else table


def _by_sample(tables: list[pa.Table], schema: pa.Schema) -> pa.Table:
    if not tables:
        return schema.empty_table()
    table = pa.concat_tables(tables).combine_chunks()
    return table.take(pa.array(np.argsort(table["sample"].to_numpy(), kind="stable")))
