"""What samples held, in 32 bits each: a dataset is known again by it, sample by sample, when a run goes on.

Of a sample that was changed, one in 4 · 10⁹ changes goes unseen.
"""

import base64
import functools
import hashlib
import json
import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from torch import Tensor

from rollout.cohort.digest import digest_of
from rollout.results.manifest import PartRecord

UNKNOWN = 0
"""Of a sample that could not be read, or that failed: it may be mended."""

SPOT_CHECKS = 1024
"""Samples of the parts that are done whose content a resumed run looks at."""

_PLAIN = (int, float, bool, type(None))


def sample_digest(sample: Mapping[str, Any]) -> int:
    """32 bits of the SHA-256 of a sample's keys and values; `UNKNOWN` if they cannot be told.

    The same in every process: it is made of the bytes of tensors and arrays, with their dtypes and shapes, and of plain
    values; of other objects, of what they say of themselves.
    """
    found: list[bytes] = []
    try:
        for key in sorted(sample):
            _add(found, key)
            _add(found, sample[key])
    except Exception:
        return UNKNOWN
    return int.from_bytes(hashlib.sha256(b"".join(found)).digest()[:4], "little") or 1


def _add(found: list[bytes], value: Any) -> None:
    """Add a value: fast for what PyHealth's processors give, else as `digest_of` does."""
    kind = type(value)
    if kind is str:
        found.append(b"s%d:" % len(value) + value.encode(errors="surrogatepass"))
    elif kind is Tensor:
        try:
            array = value.numpy()
        except (RuntimeError, TypeError):  # of a dtype NumPy does not have, on a GPU, sparse, with gradients
            found.append(b"o" + digest_of(value).encode())
        else:
            found.append(_heading(array.dtype, array.shape))
            found.append(array.tobytes())
    elif kind is tuple:
        found.append(b"(%d:" % len(value))
        for item in value:
            _add(found, item)
    elif kind in _PLAIN:
        found.append(b"p" + repr(value).encode() + b";")
    elif kind is list and value and type(value[0]) in (int, float, str, list):
        found.append(b"j" + _listed(value) + b";")
    else:
        found.append(b"o" + digest_of(value).encode())


@functools.lru_cache(4096)
def _heading(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    return f"t{dtype.str}{shape}:".encode()


def _listed(value: list[Any]) -> bytes:
    try:
        return json.dumps(value, allow_nan=True).encode()
    except (TypeError, ValueError, RecursionError):
        return digest_of(value).encode()


def known_digest(samples: Any, number: int) -> int:
    """The digest of sample `number`, `UNKNOWN` if it cannot be read now."""
    try:
        sample = samples[number]
    except Exception:  # a failure of its own, where it is read to be attributed
        return UNKNOWN
    return sample_digest(sample)


def pack(digests: Sequence[int]) -> str:
    """Digests as a commit record holds them: base64 of 4 bytes each."""
    return base64.b64encode(np.asarray(digests, dtype="<u4").tobytes()).decode()


def unpack(record: PartRecord) -> np.ndarray:
    """The digests of a part's samples, uint32 [samples].

    Raises:
        ValueError: If the record does not hold one for each sample.
    """
    if not record.content:
        return np.zeros(record.samples, dtype=np.uint32)
    try:
        digests = np.frombuffer(base64.b64decode(record.content, validate=True), dtype="<u4")
    except ValueError:
        digests = np.empty(0, dtype="<u4")
    if len(digests) != record.samples:
        raise ValueError(f"the record of part {record.part} must hold content of {record.samples} samples")
    return digests


def changed(samples: Any, records: Iterable[PartRecord], numbers: Sequence[int] | None = None) -> Iterator[int]:
    """The samples whose content is another than when they were attributed.

    Args:
        samples: Gives sample i by `samples[i]`.
        records: Of the parts to look at.
        numbers: Look at these only, in order; None: at every sample. One that cannot be read now is no change.
    """
    for record in records:
        wanted: Sequence[int] = range(record.start, record.stop)
        if numbers is not None:
            wanted = numbers[bisect_left(numbers, record.start) : bisect_left(numbers, record.stop)]
        before = unpack(record).tolist() if wanted else []
        for number in wanted:
            then = before[number - record.start]
            if then != UNKNOWN and known_digest(samples, number) not in (UNKNOWN, then):
                yield number


def spot_checks(records: Sequence[PartRecord]) -> list[int]:
    """`SPOT_CHECKS` samples of these parts in order, drawn anew each time; all of them if there are no more."""
    held = [range(record.start, record.stop) for record in sorted(records, key=lambda record: record.start)]
    ends = list(accumulate(map(len, held), initial=0))
    places = sorted(random.Random().sample(range(ends[-1]), min(SPOT_CHECKS, ends[-1])))
    return [held[k][place - ends[k]] for place in places for k in [bisect_right(ends, place) - 1]]


def differing(before: PartRecord, now: PartRecord) -> list[int]:
    """The samples whose content differs between two records of one part, where both know it."""
    if (before.start, before.stop) != (now.start, now.stop):
        return []
    one, other = unpack(before), unpack(now)
    places = np.flatnonzero((one != other) & (one != UNKNOWN) & (other != UNKNOWN))
    return (places + before.start).tolist()
