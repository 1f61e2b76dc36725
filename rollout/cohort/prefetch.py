"""Samples of a cohort read, cut into batches and collated in a thread, ahead of the model.

What the thread hands over it does not touch again: a part comes as its batches, then as what was found of it in
reading. So the thread that runs the model has all that it changes to itself.
"""

import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from rollout.cohort.content import sample_digest
from rollout.cohort.plan import Plan, sample_lengths
from rollout.cohort.source import Source
from rollout.data.collate import Sample

_NONE: Mapping[int, str] = MappingProxyType({})
AHEAD = 3
"""Items read ahead of the model."""


@dataclass(frozen=True)
class ReadBatch:
    """B samples on their way to the model.

    Attributes:
        part: The part they are of.
        index: Their numbers in the dataset, int64 [B].
        samples: As read.
        collated: As the model takes them, or what collating raised.
    """

    part: int
    index: np.ndarray
    samples: list[Sample]
    collated: Mapping[str, Any] | Exception

    @property
    def ready(self) -> Mapping[str, Any]:
        """`collated`; raises what collating raised."""
        if isinstance(self.collated, Exception):
            raise self.collated
        return self.collated


@dataclass(frozen=True)
class ReadPart:
    """The end of a part: it follows the part's batches.

    Attributes:
        number: Which part.
        numbers: The samples it has by the plan.
        unread: Sample → reason, of those that were not or could not be read, and are in no batch.
        content: Sample → digest of what it holds, of those read.
        tokens: Of those read, all features added.
        seconds: Spent reading and collating.
    """

    number: int
    numbers: range
    unread: Mapping[int, str]
    content: Mapping[int, int]
    tokens: int
    seconds: float


@dataclass(frozen=True)
class _End:
    """The last thing in the queue: of the items, or what reading them raised."""

    error: BaseException | None = None


Item = ReadBatch | ReadPart
Ready = queue.Queue[Item | _End]


@contextmanager
def read_ahead(
    source: Source, plan: Plan, numbers: Iterable[int], without: Mapping[int, str] = _NONE
) -> Iterator[Iterator[Item]]:
    """Give the items of the parts with these numbers, in order, read in a thread that ends with the context.

    What the thread raises is raised where its next item is asked for.

    Args:
        source: The samples.
        plan: How they are cut into parts and batches.
        numbers: Of the parts.
        without: Sample → reason, of those that are not to be read.
    """
    stop = threading.Event()
    ready: Ready = queue.Queue(AHEAD)
    items = _read_parts(source, plan, numbers, without, stop)
    thread = threading.Thread(target=_fill, args=(ready, items, stop), name="rollout-collate", daemon=True)
    thread.start()
    try:
        yield _drain(ready)
    finally:
        stop.set()
        thread.join()


def _fill(ready: Ready, items: Iterator[Item], stop: threading.Event) -> None:
    try:
        for item in items:
            _put(ready, item, stop)
            if stop.is_set():
                return
    except BaseException as error:
        _put(ready, _End(error), stop)
    else:
        _put(ready, _End(), stop)


def _put(ready: Ready, item: Item | _End, stop: threading.Event) -> None:
    """Wait for room in the queue, unless nobody will ask for the item."""
    while not stop.is_set():
        try:
            return ready.put(item, timeout=0.05)
        except queue.Full:
            continue


def _drain(ready: Ready) -> Iterator[Item]:
    while not isinstance(item := ready.get(), _End):
        yield item
    if item.error is not None:
        raise item.error


def _read_parts(
    source: Source, plan: Plan, numbers: Iterable[int], without: Mapping[int, str], stop: threading.Event
) -> Iterator[Item]:
    parts = plan.parts(len(source))
    for number in numbers:
        begun = time.perf_counter()
        read = _read(source, parts[number], without, stop)
        lengths = np.array(read.lengths, dtype=np.int64).reshape(len(read.samples), len(source.decoders))
        sizes = map(tuple, lengths if plan.equal_lengths else lengths[:, :0])  # a text has no size of its own
        groups = [(plan.group_of(sample), size) for sample, size in zip(read.samples, sizes, strict=True)]
        batches = plan.batches(lengths, groups)
        seconds = time.perf_counter() - begun
        for places in batches:
            begun = time.perf_counter()
            chosen = [read.samples[place] for place in places]
            batch = ReadBatch(number, np.array(read.index)[places], chosen, collate_or_error(source, chosen))
            seconds += time.perf_counter() - begun
            yield batch
        yield ReadPart(number, parts[number], read.unread, read.content, int(lengths.sum()), seconds)


@dataclass
class _Read:
    """The samples of a part that could be read, their numbers, lengths and digests, and why the others could not."""

    samples: list[Sample] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)
    content: dict[int, int] = field(default_factory=dict)
    unread: dict[int, str] = field(default_factory=dict)


def _read(source: Source, numbers: range, without: Mapping[int, str], stop: threading.Event) -> _Read:
    read = _Read(unread={number: without[number] for number in numbers if number in without})
    for number in numbers:
        if stop.is_set():  # nobody will ask for the rest
            break
        if number in read.unread:
            continue
        try:
            sample = source[number]
            read.lengths.append(sample_lengths(sample, source.decoders))
            read.content[number] = sample_digest(sample)
        except Exception as error:
            read.unread[number] = f"cannot be read: {reason_of(error)}"
            continue
        read.samples.append(sample)
        read.index.append(number)
    return read


def collate_or_error(source: Source, samples: Sequence[Sample]) -> Mapping[str, Any] | Exception:
    """A batch as the model takes it, or what collating raised: that is a failure of its samples, not of the thread."""
    try:
        return source.collate(samples)
    except Exception as error:
        return error


def reason_of(error: Exception) -> str:
    """An error as it stands in `failures/`: in characters that UTF-8 can hold."""
    return f"{type(error).__name__}: {error}".encode(errors="backslashreplace").decode()
