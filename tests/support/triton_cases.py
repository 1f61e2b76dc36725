"""What the interpreter lane's modules share: cases, poisoned memory, pairwise tables, the error against the oracle."""

import itertools
import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from rollout_kernels import _problem, reference

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
MARKS = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1 and its own process"),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUERIES = ("row", "last", "rows", "weights", "negative weights")


def bounds_are_arrays() -> bool:
    """Triton 3.6's interpreter turns an array of one element into a bound of a loop, which numpy 2.4 refuses; later
    ones take the element out first."""
    from triton import __version__

    return tuple(map(int, __version__.split(".")[:2])) < (3, 7)


@pytest.fixture(autouse=True)
def bounds_of_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are arrays, the element is taken out."""
    if not bounds_are_arrays():
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not initialised holds NaN, so an element no program writes shows."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        memory = empty(*args, **kwargs)
        return memory.fill_(math.nan) if memory.is_floating_point() else memory

    monkeypatch.setattr(torch, "empty", poisoned)


def pairwise(*factors: list) -> list[tuple]:
    """A few tuples in which every two values of two factors meet at least once: each new tuple takes, factor by
    factor, the value that meets the most it has not met yet."""
    missing = {
        (i, a, j, b) for i, j in itertools.combinations(range(len(factors)), 2) for a in factors[i] for b in factors[j]
    }
    chosen = []
    while missing:
        i, a, j, b = min(missing, key=repr)
        row = {i: a, j: b}
        for k in set(range(len(factors))) - {i, j}:
            row[k] = max(factors[k], key=lambda value: len(missing & pairs_of({**row, k: value})))
        chosen.append(tuple(row[k] for k in range(len(factors))))
        missing -= pairs_of(row)
    return chosen


def pairs_of(row: dict[int, object]) -> set[tuple]:
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(sorted(row), 2)}


def make_query(kind: str, batch: int, seq: int, lengths: Tensor | None) -> int | Tensor:
    limit = lengths if lengths is not None else torch.full((batch,), seq)
    if kind == "row":
        return 0
    if kind == "last":
        return -1
    if kind == "rows":
        return (torch.arange(batch) * 7 + 3) % limit
    weights = torch.rand(batch, seq) if kind == "weights" else torch.randn(batch, 2, seq)
    return weights


def error(result: Tensor, problem: _problem.Problem) -> float:
    """max|err| / max|ref| against the oracle; infinite for a NaN."""
    wanted = reference.rollout(problem)
    assert result.shape == wanted.shape
    assert result.dtype == torch.float32
    worst = float((result.double() - wanted).abs().max() / wanted.abs().max())
    return worst if math.isfinite(worst) else math.inf


def handed_on(problem: _problem.QKProblem, groups: int, size: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Values of `groups` heads of `size` numbers and gradients at the outputs of every layer, NaN beyond each sample's
    end.

    The sign of ⟨dO_i, v_j⟩ is that of i and head times that of j, and no sum cancels: an entry that is all rounding
    would be all of a row whose other entries are clamped. Of row 2 of the first sample nothing is left.
    """
    layers = []
    for queries in problem.queries:
        batch, heads, seq, _ = queries.shape
        sign = torch.randn(batch, heads, seq, 1).sign()
        sign[0, :, 2:3] = -1
        slopes = torch.rand(batch, heads, seq, size).add(0.1) * sign
        values = torch.rand(batch, groups, seq, size).add(0.1) * torch.randn(batch, 1, seq, 1).sign()
        values[0] = values[0].abs()
        for b, n in enumerate([] if problem.lengths is None else problem.lengths.tolist()):
            values[b, :, n:], slopes[b, :, n:] = math.nan, math.nan
        layers.append((values.to(queries), slopes.to(queries)))
    return tuple(layers)
