"""The work itself: parts of a cohort read, collated ahead of the model, explained, and turned into files.

A batch that runs out of memory is halved. A batch that fails for another reason is halved too, down to the sample that
makes it fail: that sample is recorded with its reason, and the others go on.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rollout.cohort.content import pack, sample_digest
from rollout.cohort.explain import Explain, Explained
from rollout.cohort.plan import Plan, sample_lengths
from rollout.cohort.rows import attribution_table, parquet_bytes, prediction_table
from rollout.cohort.source import Source
from rollout.data.collate import Sample
from rollout.errors import CohortError
from rollout.results.layout import ATTRIBUTION_SCHEMA, FAILURE_SCHEMA, PREDICTION_SCHEMA, STAGES, TARGET
from rollout.stopwatch import stopwatch, timed

_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "_STATUS_ALLOC_FAILED")
_LOST = ("device-side assert", "illegal memory access", "unspecified launch failure")
AHEAD = 3
"""Batches collated ahead of the model."""


@dataclass
class Work:
    """What is done to which samples: all a worker needs.

    Attributes:
        model: On its device, in evaluation mode.
        source: The samples.
        explain: (model, batch) → ``Explained``.
        plan: How they are cut into parts and batches.
        class_specific: Whether predictions have a column for the class explained.
        without: Sample → reason, of those that are failures already and are not read.
    """

    model: Any
    source: Source
    explain: Explain
    plan: Plan
    class_specific: bool = False
    without: Mapping[int, str] = field(default_factory=dict)


@dataclass
class Part:
    """One part done: its files, and what its commit record says.

    Attributes:
        number: Of the part.
        files: Kind → content of a Parquet file.
        record: Counts, batches, halvings and seconds, plain values.
        first_failure: Reason of its first failed sample.
    """

    number: int
    files: dict[str, bytes]
    record: dict[str, Any]
    first_failure: str | None = None


@dataclass
class _Batch:
    """B samples on their way: numbers in the dataset, as read, and collated (or what collating raised)."""

    index: np.ndarray
    samples: list[Sample]
    collated: Mapping[str, Any] | Exception


@dataclass
class _Draft:
    """A part being made."""

    number: int
    numbers: range
    attributions: list[pa.Table] = field(default_factory=list)
    predictions: list[pa.Table] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    batches: list[int] = field(default_factory=list)
    halved: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    content: dict[int, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))


def _nothing(samples: int) -> None:
    """No bar to advance."""


def run_parts(
    work: Work, numbers: Iterable[int], advance: Callable[[int], None] = lambda samples: None
) -> Iterator[Part]:
    """Do the parts with these numbers, in order; collating goes ahead in a thread.

    Args:
        work: Of which cohort.
        numbers: Parts to do.
        advance: Called with the number of samples after each batch.
    """
    stop = threading.Event()
    with _ahead(_prepared(work, numbers, stop), AHEAD, stop) as prepared:
        for item in prepared:
            if isinstance(item, _Draft):
                draft = item
            elif isinstance(item, _Batch):
                _run_batch(work, draft, item)
                draft.batches.append(len(item.samples))
                advance(len(item.samples))
            else:
                advance(len(draft.numbers) - sum(draft.batches))  # those that could not be read
                yield _finish(work, draft)


def _prepared(work: Work, numbers: Iterable[int], stop: threading.Event) -> Iterator[Any]:
    """Of each part its draft, its batches, and None at its end."""
    parts = work.plan.parts(len(work.source))
    for number in numbers:
        draft = _Draft(number, parts[number])
        draft.failures = {sample: work.without[sample] for sample in draft.numbers if sample in work.without}
        yield draft
        begun = time.perf_counter()
        samples, lengths, index = _read(work.source, draft, stop)
        draft.tokens = int(lengths.sum())
        for places in work.plan.batches(lengths):
            chosen = [samples[place] for place in places]
            batch = _Batch(index[places], chosen, _collated(work.source, chosen))
            draft.seconds["collate"] += time.perf_counter() - begun
            yield batch
            begun = time.perf_counter()
        yield None


def _read(source: Source, draft: _Draft, stop: threading.Event) -> tuple[list[Sample], np.ndarray, np.ndarray]:
    """The samples of a part that can be read, their lengths [n, F] and their numbers [n]."""
    samples, lengths, index = [], [], []
    for number in draft.numbers:
        if stop.is_set():  # nobody will ask for the rest
            break
        if number in draft.failures:
            continue
        try:
            sample = source[number]
            lengths.append(sample_lengths(sample, source.decoders))
            draft.content[number] = sample_digest(sample)
        except Exception as error:
            draft.failures[number] = f"cannot be read: {_reason(error)}"
            continue
        samples.append(sample)
        index.append(number)
    shape = len(samples), len(source.decoders)
    return samples, np.array(lengths, dtype=np.int64).reshape(shape), np.array(index, dtype=np.int64)


def _collated(source: Source, samples: Sequence[Sample]) -> Mapping[str, Any] | Exception:
    try:
        return source.collate(samples)
    except Exception as error:
        return error


def _run_batch(work: Work, draft: _Draft, batch: _Batch) -> None:
    """Explain a batch and add it to its part; halve it where that fails."""
    try:
        if isinstance(batch.collated, Exception):
            raise batch.collated
        with stopwatch(draft.seconds), timed("forward"):
            explained = work.explain(work.model, batch.collated)
        _add(work, draft, batch, explained)
        return
    except Exception as error:
        failed, reason = _out_of_memory(error), _reason(error)
        if _device_lost(error):
            raise CohortError(
                f"attribute_cohort: the GPU can no longer be used, after samples {int(batch.index[0])} … of part "
                f"{draft.number}: {reason}. The parts written so far are good; the same call goes on in a new process, "
                "and with device='cpu' the sample at fault is set apart"
            ) from error
        size = len(batch.samples)
        if size == 1:
            draft.failures[int(batch.index[0])] = reason
            return
    # Outside the handler, so that the traceback no longer holds the tensors of the failed attempt.
    if failed:
        draft.halved.append({"batch": len(draft.batches), "samples": size, "reason": reason})
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    for half in (slice(None, size // 2), slice(size // 2, None)):
        samples = batch.samples[half]
        _run_batch(work, draft, _Batch(batch.index[half], samples, _collated(work.source, samples)))


def _add(work: Work, draft: _Draft, batch: _Batch, explained: Explained) -> None:
    """Add the rows of a batch; a sample with a number among them that is not finite is a failure."""
    begun = time.perf_counter()
    known = set(work.source.decoders)
    if not explained.relevance or not known.issuperset(explained.relevance):
        raise ValueError(f"explain must give relevance of {sorted(known)}, got {sorted(explained.relevance)}")
    tables = [
        attribution_table(batch.samples, batch.index, explained.relevance, work.source.decoders),
        _predictions(work, batch.samples, batch.index, explained),
    ]
    wrong = _not_finite(tables[0], explained.y_prob, batch.index)
    if wrong:
        draft.failures.update(wrong)
        tables = [table.filter(~np.isin(table["sample"].to_numpy(), list(wrong))) for table in tables]
    draft.attributions.append(tables[0])
    draft.predictions.append(tables[1])
    draft.seconds["write"] += time.perf_counter() - begun


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


def _predictions(work: Work, samples: Sequence[Sample], index: np.ndarray, explained: Explained) -> pa.Table:
    table = prediction_table(samples, index, explained.y_prob, explained.y_true)
    if work.class_specific:
        target = None if explained.target is None else explained.target.cpu().numpy()
        column = pa.nulls(len(samples), pa.int32()) if target is None else pa.array(target, pa.int32())
        table = table.append_column(TARGET, column)
    return table


def _finish(work: Work, draft: _Draft) -> Part:
    """Sort a part by sample, and make its files."""
    begun = time.perf_counter()
    predicted = PREDICTION_SCHEMA.append(TARGET) if work.class_specific else PREDICTION_SCHEMA
    attributions = _by_sample(draft.attributions, ATTRIBUTION_SCHEMA)
    predictions = _by_sample(draft.predictions, predicted)
    files = {"attributions": parquet_bytes(attributions), "predictions": parquet_bytes(predictions)}
    if draft.failures:
        rows = sorted(draft.failures.items())
        table = pa.table([[number for number, _ in rows], [reason for _, reason in rows]], schema=FAILURE_SCHEMA)
        files["failures"] = parquet_bytes(table)
    draft.seconds["write"] += time.perf_counter() - begun
    return Part(
        draft.number,
        files,
        {
            "start": draft.numbers.start,
            "stop": draft.numbers.stop,
            "samples": len(draft.numbers),
            "attributed": predictions.num_rows,
            "failed": len(draft.failures),
            "rows": attributions.num_rows,
            "tokens": draft.tokens,
            "batches": draft.batches,
            "halved": draft.halved,
            "seconds": {stage: round(spent, 4) for stage, spent in draft.seconds.items()},
            "content": pack([0 if n in draft.failures else draft.content.get(n, 0) for n in draft.numbers]),
        },
        next(iter(draft.failures.values()), None),
    )


def _by_sample(tables: list[pa.Table], schema: pa.Schema) -> pa.Table:
    if not tables:
        return schema.empty_table()
    table = pa.concat_tables(tables).combine_chunks()
    return table.take(pa.array(np.argsort(table["sample"].to_numpy(), kind="stable")))


def _out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on a GPU or not."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in _NO_MEMORY)


def _device_lost(error: Exception) -> bool:
    """Whether a GPU answers every further call with an error, as after an index out of range in a kernel."""
    if any(word in str(error) for word in _LOST):
        return True
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".encode(errors="backslashreplace").decode()


class _ahead:
    """Take items from an iterator in a thread, up to ``depth`` ahead; its exceptions are raised where they are read.

    ``stop`` is set on leaving, for an iterator that is at work on its next item.
    """

    def __init__(self, items: Iterator[Any], depth: int, stop: threading.Event) -> None:
        self._items, self._queue, self._stop = items, queue.Queue[Any](depth), stop
        self._thread = threading.Thread(target=self._fill, name="rollout-collate", daemon=True)

    def __enter__(self) -> Iterator[Any]:
        self._thread.start()
        return self._drain()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        while self._thread.is_alive():
            self._empty()
            self._thread.join(0.01)

    def _fill(self) -> None:
        try:
            for item in self._items:
                if not self._put(("item", item)):
                    return
            self._put(("end", None))
        except BaseException as error:
            self._put(("error", error))

    def _put(self, entry: tuple[str, Any]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _drain(self) -> Iterator[Any]:
        while True:
            kind, value = self._queue.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value

    def _empty(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            return
