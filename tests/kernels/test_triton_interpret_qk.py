"""The kernels from Q and K against the float64 oracle, in Triton's interpreter; see test_triton_interpret.py."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rollout_kernels import _problem, ops
from rollout_kernels.method import Method
from tests.support.triton_cases import (
    DTYPES,
    INTERPRETING,
    MARKS,
    QUERIES,
    bounds_of_loops,
    error,
    make_query,
    pairwise,
    poison,
)

pytestmark = MARKS
__all__ = ["bounds_of_loops", "poison"]  # fixtures
if INTERPRETING:
    from rollout_kernels import _triton

QK_BOUND = 3e-6  # max|err| / max|ref|, the project's bound from Q and K
MASKS = {
    "none": {},
    "causal": {"causal": True},
    "window": {"window": (5, 3)},
    "left": {"window": (20, None)},
    "causal window": {"causal": True, "window": (9, None)},
}
KEY_MASKS = ("none", "random", "first keys masked", "nothing valid")
QK_METHODS = {
    "mean": Method(),
    "weights": Method(head_fusion=torch.tensor([0.5, 2.0, -0.25, 1.0])),
    "renormalized": Method(residual=1.0, attention=0.5),
    "plain": Method(residual=1.0, attention=0.5, renormalize=False),
}
QK_SHAPES = {  # B, H, H_kv, S, D, L
    "B1-H4-Hkv4-S1-D16-L1": (1, 4, 4, 1, 16, 1),
    "B2-H4-Hkv2-S33-D16-L2": (2, 4, 2, 33, 16, 2),
    "B2-H4-Hkv1-S64-D32-L3": (2, 4, 1, 64, 32, 3),
    "B1-H4-Hkv4-S130-D64-L2": (1, 4, 4, 130, 64, 2),
    "B1-H4-Hkv2-S40-D128-L2": (1, 4, 2, 40, 128, 2),  # in float32 multiplied in two halves of D
}
FLAGS = [False, True]
QK = [list(QK_METHODS), list(DTYPES), list(QK_SHAPES), list(QUERIES), list(MASKS), list(KEY_MASKS), FLAGS, FLAGS, FLAGS]


def key_mask(kind: str, batch: int, seq: int) -> Tensor | None:
    if kind == "none":
        return None
    mask = torch.rand(batch, seq) < 0.6
    if kind == "first keys masked":
        mask[:, : seq // 3] = False
    if kind == "nothing valid":
        mask[-1] = False
    return mask


def qk_problem(queries: list[Tensor], keys: list[Tensor], query: object, **options: object) -> _problem.QKProblem:
    return ops.qk_problem(queries, keys, query=query, **options)


def true_logsumexp(problem: _problem.QKProblem) -> list[Tensor]:
    """The log-sum-exp from float64 maps' definition, as a model's fused attention would return it."""
    batch, heads, seq, _ = problem.queries[0].shape
    i, j = torch.arange(seq)[:, None], torch.arange(seq)[None, :]
    allowed = torch.ones(batch, seq, seq, dtype=torch.bool)
    if problem.causal:
        allowed &= j <= i
    left, right = problem.window
    if left is not None:
        allowed &= j >= i - left
    if right is not None:
        allowed &= j <= i + right
    if problem.key_mask is not None:
        allowed &= problem.key_mask[:, None]
    if problem.lengths is not None:
        allowed &= j < problem.lengths[:, None, None]
    values = []
    for q, k in zip(problem.queries, problem.keys, strict=True):
        scores = problem.scale * q.double() @ k.double().repeat_interleave(heads // k.shape[1], 1).transpose(-1, -2)
        values.append(scores.masked_fill(~allowed[:, None], -math.inf).logsumexp(-1).float())
    return values


def qk_case(
    method: str,
    dtype: str,
    shape: str,
    query: str,
    mask: str,
    keys_allowed: str,
    rows_masked: bool,
    ragged: bool,
    given: bool,
) -> _problem.QKProblem:
    batch, heads, kv_heads, seq, size, layers = QK_SHAPES[shape]
    torch.manual_seed(2)
    lengths = torch.tensor([max(1, seq - 17 * (b + 1)) for b in range(batch)]) if ragged else None
    queries = [torch.randn(batch, heads, seq, size).to(DTYPES[dtype]) for _ in range(layers)]
    keys = [torch.randn(batch, kv_heads, seq, size).to(DTYPES[dtype]) for _ in range(layers)]
    if lengths is not None:
        for tensor, (b, n) in itertools.product(queries + keys, enumerate(lengths.tolist())):
            tensor[b, :, n:] = math.nan
    problem = qk_problem(
        queries, keys, make_query(query, batch, seq, lengths), lengths=lengths, method=QK_METHODS[method],
        key_mask=key_mask(keys_allowed, batch, seq), query_mask=torch.rand(batch, seq) < 0.7 if rows_masked else None,
        **MASKS[mask],
    )  # fmt: skip
    return replace(problem, logsumexp=tuple(true_logsumexp(problem))) if given else problem


def check_qk(problem: _problem.QKProblem) -> None:
    assert _triton.refusals_qk(problem) == []
    result = _triton.rows_from_qk(problem)
    # Softmax rows sum to 1: a given log-sum-exp is taken at its word, so the oracle is asked without it.
    assert error(result, replace(problem, logsumexp=None)) <= QK_BOUND
    if problem.lengths is not None:
        for b, n in enumerate(problem.lengths.tolist()):
            assert torch.equal(result[b, ..., n:], torch.zeros_like(result[b, ..., n:]))
    assert torch.equal(result, _triton.rows_from_qk(problem))


QK_NAMES = ("method", "dtype", "shape", "query", "mask", "keys_allowed", "rows_masked", "ragged", "given")


@pytest.mark.parametrize(QK_NAMES, pairwise(*QK))
def test_rows_from_qk(
    method: str,
    dtype: str,
    shape: str,
    query: str,
    mask: str,
    keys_allowed: str,
    rows_masked: bool,
    ragged: bool,
    given: bool,
) -> None:
    check_qk(qk_case(method, dtype, shape, query, mask, keys_allowed, rows_masked, ragged, given))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("mask", list(MASKS))
def test_rows_from_qk_every_combination_of_masks(mask: str, dtype: str) -> None:
    for method, allowed, *flags in itertools.product(QK_METHODS, KEY_MASKS, *[[False, True]] * 3):
        check_qk(qk_case(method, dtype, "B2-H4-Hkv2-S33-D16-L2", "negative weights", mask, allowed, *flags))


def test_rows_from_qk_of_strided_tensors() -> None:
    """Queries and keys as a model has them: [B, S, H, D] transposed, and rows that do not start on 16 bytes."""
    torch.manual_seed(3)
    for make in (lambda: torch.randn(2, 40, 3, 16).transpose(1, 2), lambda: torch.randn(2, 3, 40, 17)[..., 1:]):
        queries, keys = [make() for _ in range(2)], [make() for _ in range(2)]
        check_qk(qk_problem(queries, keys, 0))


def test_rows_from_qk_of_large_scores() -> None:
    """Scores of several hundred: nothing overflows, in either kernel."""
    torch.manual_seed(4)
    queries, keys = ([30 * torch.randn(1, 2, 33, 16) for _ in range(2)] for _ in range(2))
    problem = qk_problem(queries, keys, -1)
    result = _triton.rows_from_qk(problem)
    assert torch.isfinite(result).all()
    assert error(result, problem) <= 1e-4  # float32 scores of size 1000 carry errors of 1e-4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": 80}, "head dimension 80 is not one of 16, 32, 64, 128"),
        ({"dtype": torch.float64}, "queries and keys are float64"),
        ({"method": Method(head_fusion="max")}, "head_fusion"),
        ({"method": Method(discard_ratio=0.5)}, "discard_ratio"),
        ({"bias": torch.zeros(4)}, "bias"),
        ({"query": None}, "full matrix"),
    ],
    ids=["size", "float64", "max", "discard", "bias", "full"],
)
def test_qk_refusals_give_a_reason(change: dict, reason: str) -> None:
    shape = (1, 2, 4, change.get("size", 16))
    tensors = [torch.zeros(shape, dtype=change.get("dtype", torch.float32))]
    options = {name: value for name, value in change.items() if name in ("bias", "method")}
    problem = qk_problem(tensors, tensors, change.get("query", 0), **options)
    reasons = _triton.refusals_qk(problem)
    assert len(reasons) == 1
    assert reason in reasons[0]
