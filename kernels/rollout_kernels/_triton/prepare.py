"""What a call hands its kernels beside tensors, written on the device by one small launch.

Addresses and head weights are known on the host when a kernel is launched. As parameters of a launch they need no copy
from host memory, hence no wait for the stream; a CUDA graph keeps them in its node, and the memory they are written to
comes from the graph's own pool, or the side stream's. The same launch zeroes the counters of kernels whose programs
wait for one another, and writes where each sample's chain starts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rollout_kernels._problem import Problem
from rollout_kernels._triton import launch
from rollout_kernels._triton.run import run

CHUNK = 128  # values a launch carries in each of its two lists: 1.5 KiB of the 4 that parameters may take
BLOCK = 1024
Flags = tuple[bool, bool, bool, bool]  # STARTS, HAS_ROWS, HAS_LENGTHS, ONE_HOT
_BIAS = 1 << 61
BIAS = tl.constexpr(_BIAS)


@triton.jit(
    do_not_specialize=["row", "batch", "seq", "counters"],
    do_not_specialize_on_alignment=["asked_ptr", "lengths_ptr"],
)
def prepare_kernel(
    # pointers
    table_ptr,  # int64, filled from `integers`
    weights_ptr,  # float32, filled from `weights`
    asked_ptr,  # int64 [B] when HAS_ROWS: rows as the caller gave them
    lengths_ptr,  # int64 [B] when HAS_LENGTHS
    start_ptr,  # int64 [B]: rows, none negative
    one_hot_ptr,  # float32 [B, S]: the same rows as weights
    counters_ptr,  # int32, zeroed
    # values
    integers,  # as `encode` gives them
    weights,
    row, batch, seq, counters,
    # flags
    STARTS: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_LENGTHS: tl.constexpr, ONE_HOT: tl.constexpr,
    # blocks
    BLOCK: tl.constexpr,
):  # fmt: skip
    """This program zeroes BLOCK counters and writes the starts of BLOCK samples; the first one fills the tables."""
    pid = tl.program_id(0)
    if pid == 0:
        for i in tl.static_range(len(integers)):
            tl.store(table_ptr + i, (integers[i] - BIAS) >> 2)
        for i in tl.static_range(len(weights)):
            tl.store(weights_ptr + i, weights[i])

    offs = pid * BLOCK + tl.arange(0, BLOCK)
    tl.store(counters_ptr + offs, tl.zeros((BLOCK,), tl.int32), mask=offs < counters)
    if STARTS:
        start = start_of(asked_ptr, lengths_ptr, offs, row, batch, seq, HAS_ROWS, HAS_LENGTHS)
        tl.store(start_ptr + offs, start, mask=offs < batch)
    if ONE_HOT:
        samples = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        sample = samples // seq
        start = start_of(asked_ptr, lengths_ptr, sample, row, batch, seq, HAS_ROWS, HAS_LENGTHS)
        here = (samples % seq == start).to(tl.float32)
        tl.store(one_hot_ptr + samples, here, mask=sample < batch)


@triton.jit
def start_of(asked_ptr, lengths_ptr, sample, row, batch, seq, HAS_ROWS: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """The row where each sample's chain starts, int64; a negative one counts from the sample's own end."""
    start = tl.zeros(sample.shape, tl.int64) + row
    if HAS_ROWS:
        start = tl.load(asked_ptr + sample, mask=sample < batch, other=0)
    end = tl.zeros(sample.shape, tl.int64) + seq
    if HAS_LENGTHS:
        end = tl.load(lengths_ptr + sample, mask=sample < batch, other=0)
    return tl.where(start < 0, start + end, start)


def encode(value: int) -> int:
    """A number from 0 to 2⁵⁸ as 64 bits that no compiler looks into: Triton makes another kernel for a value that is
    1, or a multiple of 16, or fits in 32 bits."""
    return _BIAS + 4 * value + 3


class Values(NamedTuple):
    """What one call writes; see `Prepared` for where.

    Attributes:
        integers: rows of the tables one after another, each number as `encode` gives it.
        weights: head weights, row after row.
    """

    integers: tuple[int, ...]
    weights: tuple[float, ...] = ()


class Prepared(NamedTuple):
    """What one launch wrote, on the device and its current stream.

    Attributes:
        table: int64, `Values.integers` decoded.
        weights: float32, `Values.weights`.
        start: int64 [B], the start rows, none negative; not written for weightings.
        ticket: int32, its first element 0.
        ready: int32, zeros.
    """

    table: Tensor
    weights: Tensor
    start: Tensor
    ticket: Tensor
    ready: Tensor


def prepare(problem: Problem, values: Values, counters: int = 0, one_hot: Tensor | None = None) -> Prepared:
    """Writes the tables, `counters` zeros and the start rows: one launch for every CHUNK numbers.

    Args:
        problem: its start rows, lengths and device.
        values: the numbers.
        counters: how many a kernel's programs count with, beside a ticket.
        one_hot: float32 [B, S] that gets the start rows as weights, or None.

    No memory of the host is read by the device. Not yet run on a GPU.
    """
    device, batch, rows, lengths = problem.device, problem.batch, problem.rows, problem.lengths
    table = torch.empty(len(values.integers), dtype=torch.int64, device=device)
    weights = torch.empty(len(values.weights), dtype=torch.float32, device=device) if values.weights else table
    start = table if rows is None else torch.empty(batch, dtype=torch.int64, device=device)
    # The ticket stands first, and the others 16 bytes after it: their alignment does not hang on how many there are.
    size = counters + 4 if counters else 0
    numbers = torch.empty(size, dtype=torch.int32, device=device) if counters else table
    given, row = (rows.contiguous(), 0) if isinstance(rows, Tensor) else (table, rows or 0)
    flags = (rows is not None, isinstance(rows, Tensor), lengths is not None, one_hot is not None)
    elements = max(1, batch, size, 0 if one_hot is None else batch * problem.seq)
    _launch(
        -(-elements // BLOCK),
        (
            table, weights, given, table if lengths is None else lengths.contiguous(), start,
            table if one_hot is None else one_hot, numbers,
        ),
        values, 0, (row, batch, problem.seq, size), flags,
    )  # fmt: skip
    for first in range(CHUNK, max(len(values.integers), len(values.weights)), CHUNK):
        pointers = (table[first:], weights[first:] if values.weights else table, *[table] * 5)
        _launch(1, pointers, values, first, (0, 0, 0, 0), (False,) * 4)
    return Prepared(table, weights, start, numbers, numbers[4:] if counters else numbers)


def _launch(
    programs: int, pointers: tuple[Tensor, ...], values: Values, first: int, sizes: tuple[int, ...], flags: Flags
) -> None:
    integers, weights = values.integers[first : first + CHUNK], values.weights[first : first + CHUNK]
    run(
        prepare_kernel, programs, (*pointers, integers, weights, *sizes),
        (len(integers), len(weights), bool(values.weights), sizes[3] > 0, flags),
        lambda: {
            **dict(zip(("STARTS", "HAS_ROWS", "HAS_LENGTHS", "ONE_HOT"), flags, strict=True)),
            "BLOCK": BLOCK, **launch.PREPARE,
        },
    )  # fmt: skip


def flatten(weights: Sequence[Tensor]) -> tuple[tuple[float, ...], int]:
    """Head weights [L, H] row after row, those of fewer heads filled with 0; and H."""
    width = max(w.numel() for w in weights)
    rows = [w.tolist() for w in weights]
    return tuple(value for row in rows for value in (*row, *[0.0] * (width - len(row)))), width
