"""Inputs of the tests: shapes with readable ids, random maps, queries and keys, and how a call is watched."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rollout_kernels import _native

BACKENDS = ("torch", "reference")
NEEDS_NATIVE = pytest.mark.skipif(_native.unusable() is not None, reason=f"no native kernel: {_native.unusable()}")
# From maps also what `"auto"` takes on a CPU: native for all it can, and torch for the rest.
MAP_BACKENDS = (*BACKENDS, pytest.param("auto", id="native", marks=NEEDS_NATIVE))
DTYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}

# B, H, S: a single everything, odd, one below, at and above a power of two, an empty batch.
SHAPES = ((1, 1, 1), (2, 3, 7), (2, 3, 63), (1, 2, 64), (2, 1, 65), (0, 2, 5))


def shape_params(shapes: Sequence[tuple[int, int, int]], dtypes: Sequence[torch.dtype]) -> list[Any]:
    """(B, H, S, dtype) with the id `B2-H3-S63-bf16`."""
    return [pytest.param(*shape, t, id="B{}-H{}-S{}-".format(*shape) + DTYPES[t]) for shape in shapes for t in dtypes]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_maps(
    batch: int, heads: int | None, seq: int, *, layers: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """Softmax maps [B, H, S, S], or [B, S, S] when `heads` is None, far from uniform."""
    shape = (batch, seq, seq) if heads is None else (batch, heads, seq, seq)
    source = generator(seed)
    return [(2.0 * torch.randn(shape, generator=source)).softmax(-1).to(dtype) for _ in range(layers)]


def random_gradients(maps: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients of both signs, shaped like the maps."""
    source = generator(seed)
    return [torch.randn(m.shape, generator=source).to(m.dtype) for m in maps]


def random_qk(
    batch: int,
    heads: int,
    seq: int,
    dim: int = 8,
    *,
    groups: int | None = None,
    layers: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[list[Tensor], list[Tensor]]:
    """Queries [B, H, S, D] and keys [B, H_kv, S, D] whose softmax is far from uniform."""
    source = generator(seed)
    queries = [1.5 * torch.randn(batch, heads, seq, dim, generator=source) for _ in range(layers)]
    keys = [1.5 * torch.randn(batch, groups or heads, seq, dim, generator=source) for _ in range(layers)]
    return [q.to(dtype) for q in queries], [k.to(dtype) for k in keys]


def random_weights(*shape: int, seed: int = 2) -> Tensor:
    """Start weights of both signs."""
    return torch.randn(shape, generator=generator(seed))


def poison(tensors: Sequence[Tensor], lengths: Sequence[int], axes: Sequence[int]) -> list[Tensor]:
    """Copies with NaN beyond each sample's length along `axes` (counted without the batch)."""
    copies = [t.clone() for t in tensors]
    for tensor in copies:
        for b, n in enumerate(lengths):
            for axis in axes:
                tensor[b].narrow(axis, n, tensor[b].shape[axis] - n).fill_(torch.nan)
    return copies


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal shape, dtype and bits; NaN equals itself, 0 differs from −0."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    raw = [t.contiguous().flatten().view(torch.uint8) if t.numel() else t for t in (first, second)]
    return torch.equal(*raw)


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory alive at once that `call` allocated, counted by the allocator and so the same every time."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    assert record.profiler is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "the profiler saw no allocation"
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised buffer starts as NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def assert_refused(error: type[Exception], said: Sequence[str], call: Callable[[], object]) -> None:
    """`call` raises exactly `error`, and its message has every part in `said`."""
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error
    for part in said:
        assert part in str(caught.value)
