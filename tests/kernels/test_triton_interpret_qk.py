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
    from rollout_kernels._triton import launch

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
    "max": Method(head_fusion="max"),
    "min": Method(head_fusion="min", residual=0.2, attention=0.7),
    "max plain": Method(head_fusion="max", renormalize=False),
}
BIASES = ("none", "one", "by key", "by layer and transposed", "−inf", "lowest")
QK_SHAPES = {  # B, H, H_kv, S, D, L
    "B1-H4-Hkv4-S1-D16-L1": (1, 4, 4, 1, 16, 1),
    "B2-H4-Hkv2-S33-D16-L2": (2, 4, 2, 33, 16, 2),
    "B2-H4-Hkv1-S64-D32-L3": (2, 4, 1, 64, 32, 3),
    "B1-H4-Hkv4-S70-D64-L2": (1, 4, 4, 70, 64, 2),
    "B1-H4-Hkv2-S40-D128-L2": (1, 4, 2, 40, 128, 2),  # in float32 multiplied in two halves of D
}
SCORES = {
    "plain": {},
    "capped": {"softcap": 1.5},
    "sinks": {"sinks": [torch.tensor([0.5, 3.0, -math.inf, -2.0]), torch.tensor([1.0, -1.0, 0.0, 8.0])]},
}
SCORES["both"] = {**SCORES["capped"], **SCORES["sinks"]}
FLAGS = [False, True]
FORMS = [*QUERIES, "full"]
QK = [
    list(QK_METHODS), list(DTYPES), list(QK_SHAPES), FORMS, list(MASKS), list(KEY_MASKS), list(BIASES),
    list(SCORES), FLAGS, FLAGS, FLAGS, FLAGS,
]  # fmt: skip


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of sm_90: the interpreter's time goes by the number of operations, not by their size."""
    monkeypatch.setattr(launch, "table_name", lambda device: "sm_90")


def key_mask(kind: str, batch: int, seq: int) -> Tensor | None:
    if kind == "none":
        return None
    mask = torch.rand(batch, seq) < 0.6
    if kind == "first keys masked":
        mask[:, : seq // 3] = False
    if kind == "nothing valid":
        mask[-1] = False
    return mask


def make_bias(kind: str, batch: int, heads: int, seq: int, layers: int) -> object:
    """Biases as models have them: whole, a number a key, turned over, of some layers, −inf and the lowest float."""
    lowest = torch.finfo(torch.float32).min
    if kind == "none":
        return None
    if kind == "one":
        return 2 * torch.randn(batch, heads, seq, seq)
    if kind == "by key":
        return torch.randn(heads, 1, seq).half()
    if kind == "by layer and transposed":
        return [None if layer == 1 else torch.randn(batch, 1, seq, seq).transpose(-1, -2) for layer in range(layers)]
    bias = torch.randn(heads, seq, seq)
    low = torch.rand(heads, seq, seq) < 0.4
    low[0, seq // 2] = True  # a row of one head that nothing is left of
    low[:, -1] = True
    return bias.masked_fill(low, -math.inf if kind == "−inf" else lowest)


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
    for layer, (q, k) in enumerate(zip(problem.queries, problem.keys, strict=True)):
        scores = problem.scale * q.double() @ k.double().repeat_interleave(heads // k.shape[1], 1).transpose(-1, -2)
        if problem.softcap is not None:
            scores = problem.softcap * (scores / problem.softcap).tanh()
        if problem.bias is not None and problem.bias[layer] is not None:
            scores = scores + problem.bias[layer]
        if problem.alibi_slopes is not None:
            scores = scores - problem.alibi_slopes[layer][:, None, None] * (i - j).abs()
        values.append(scores.masked_fill(~allowed[:, None], -math.inf).logsumexp(-1).float())
    return values


def qk_case(
    method: str,
    dtype: str,
    shape: str,
    query: str,
    mask: str,
    keys_allowed: str,
    biased: str,
    scores: str,
    sloped: bool,
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
    start = None if query == "full" else make_query(query, batch, seq, lengths)
    problem = qk_problem(
        queries, keys, start, lengths=lengths, method=QK_METHODS[method],
        bias=make_bias(biased, batch, heads, seq, layers),
        alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 0.0]) if sloped else None,
        key_mask=key_mask(keys_allowed, batch, seq), query_mask=torch.rand(batch, seq) < 0.7 if rows_masked else None,
        softcap=SCORES[scores].get("softcap"), sinks=sinks_of(scores, layers), **MASKS[mask],
    )  # fmt: skip
    with_sums = given and problem.sinks is None  # which a log-sum-exp is not given with
    return replace(problem, logsumexp=tuple(true_logsumexp(problem))) if with_sums else problem


def sinks_of(scores: str, layers: int) -> list[Tensor] | None:
    given = SCORES[scores].get("sinks")
    return None if given is None else [given[layer % 2] for layer in range(layers)]


def check_qk(problem: _problem.QKProblem) -> None:
    assert _triton.refusals_qk(problem) == []
    run = _triton.full_from_qk if problem.form == "full" else _triton.rows_from_qk
    result = run(problem)
    # Softmax rows sum to 1: a given log-sum-exp is taken at its word, so the oracle is asked without it.
    assert error(result, replace(problem, logsumexp=None)) <= QK_BOUND
    if problem.lengths is not None:
        for b, n in enumerate(problem.lengths.tolist()):
            assert not result[b, ..., n:].any()
            assert problem.form != "full" or not result[b, n:].any()


QK_NAMES = (
    "method", "dtype", "shape", "query", "mask", "keys_allowed", "biased", "scores", "sloped", "rows_masked", "ragged",
    "given",
)  # fmt: skip


@pytest.mark.parametrize(QK_NAMES, pairwise(*QK))
def test_rows_from_qk(
    method: str,
    dtype: str,
    shape: str,
    query: str,
    mask: str,
    keys_allowed: str,
    biased: str,
    scores: str,
    sloped: bool,
    rows_masked: bool,
    ragged: bool,
    given: bool,
) -> None:
    check_qk(qk_case(
        method, dtype, shape, query, mask, keys_allowed, biased, scores, sloped, rows_masked, ragged, given
    ))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("mask", list(MASKS))
def test_rows_from_qk_every_combination_of_masks(mask: str, dtype: str) -> None:
    cases = pairwise(
        list(QK_METHODS), ["negative weights", "full"], list(KEY_MASKS), list(BIASES), list(SCORES), *[FLAGS] * 4
    )
    for method, query, *rest in cases:
        check_qk(qk_case(method, dtype, "B2-H4-Hkv2-S33-D16-L2", query, mask, *rest))


def test_rows_from_qk_of_strided_tensors() -> None:
    """Queries and keys as a model has them: [B, S, H, D] transposed, and rows that do not start on 16 bytes."""
    torch.manual_seed(3)
    for make in (lambda: torch.randn(2, 40, 3, 16).transpose(1, 2), lambda: torch.randn(2, 3, 40, 17)[..., 1:]):
        queries, keys = [make() for _ in range(2)], [make() for _ in range(2)]
        problem = qk_problem(queries, keys, 0)
        check_qk(problem)
        assert torch.equal(_triton.rows_from_qk(problem), _triton.rows_from_qk(problem))


@pytest.mark.parametrize("query", [12, None], ids=["row", "full"])
def test_a_finite_fill_on_every_key_leaves_the_row_its_scores_share(query: int | None) -> None:
    """The lowest float swallows a score, and the logarithm of the sum: such a row is uniform over the keys that masks
    leave, and a log-sum-exp given with it would make each of them 1."""
    torch.manual_seed(5)
    queries, keys = ([torch.randn(1, 2, 33, 16) for _ in range(2)] for _ in range(2))
    fill = torch.zeros(33, 33)
    fill[3:20] = torch.finfo(torch.float32).min
    problem = qk_problem(queries, keys, query, bias=fill, causal=True)
    check_qk(problem)
    with_sums = replace(problem, logsumexp=tuple(true_logsumexp(problem)))
    check_qk(with_sums)


@pytest.mark.parametrize("query", [0, None], ids=["row", "full"])
def test_alibi_slopes_are_the_bias_of_the_same_numbers(query: int | None) -> None:
    torch.manual_seed(6)
    queries, keys = ([torch.randn(2, 2, 40, 16) for _ in range(2)] for _ in range(2))
    slopes = [torch.tensor([0.5, 0.0625]), None]
    i, j = torch.arange(40)[:, None], torch.arange(40)
    bias = [-slopes[0][:, None, None] * (i - j).abs(), None]
    run = _triton.full_from_qk if query is None else _triton.rows_from_qk
    problem = qk_problem(queries, keys, query, alibi_slopes=slopes)
    check_qk(problem)
    assert error(run(qk_problem(queries, keys, query, bias=bias)), problem) <= QK_BOUND


def test_rows_are_rows_of_the_full_matrix() -> None:
    torch.manual_seed(7)
    queries, keys = ([torch.randn(2, 2, 40, 16) for _ in range(2)] for _ in range(2))
    for method in QK_METHODS["mean"], QK_METHODS["max"]:
        full = _triton.full_from_qk(qk_problem(queries, keys, None, method=method))
        rows = _triton.rows_from_qk(qk_problem(queries, keys, torch.tensor([5, 39]), method=method))
        assert float((torch.stack([full[0, 5], full[1, 39]]) - rows).abs().max()) <= QK_BOUND


def test_the_dispatcher_hands_the_full_matrix_to_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = ([torch.randn(1, 2, 8, 16)] for _ in range(2))
    monkeypatch.setattr(_triton, "rows_from_qk", None)
    result = ops.attention_rollout_qk(queries, keys, method=Method(), backend="triton")
    assert error(result, qk_problem(queries, keys, None)) <= QK_BOUND


@pytest.mark.parametrize("bias", [None, torch.zeros(33)], ids=["base 2", "bias"])
@pytest.mark.parametrize("size", [1e-3, 0.02, 0.3, 1.0, 3.0, 40.0], ids=lambda size: f"x{size}")
def test_soft_capping_keeps_the_bits_of_scores_of_any_size(size: float, bias: Tensor | None) -> None:
    """The tanh of the kernels, of scores from a thousandth of the cap to forty times it."""
    torch.manual_seed(8)
    queries, keys = ([torch.randn(1, 2, 33, 16) for _ in range(2)] for _ in range(2))
    problem = qk_problem(queries, keys, -1, bias=bias, softcap=30.0, scale=30.0 * size / 4)
    check_qk(problem)
    assert error(_triton.rows_from_qk(replace(problem, softcap=None)), problem) > QK_BOUND or size < 0.01


@pytest.mark.parametrize("method", ["mean", "weights", "max", "plain"])
@pytest.mark.parametrize("query", [5, None], ids=["row", "full"])
def test_a_row_with_no_key_is_0_with_sinks(query: int | None, method: str) -> None:
    """Of heads whose sink is −inf too; what is left of the row is its residual."""
    torch.manual_seed(9)
    queries, keys = ([torch.randn(1, 4, 12, 16) for _ in range(2)] for _ in range(2))
    attends = (torch.arange(12) != 5)[None]
    for options in ({"query_mask": attends}, {"bias": torch.zeros(12, 12).masked_fill(~attends.T, -math.inf)}):
        options["sinks"] = SCORES["sinks"]["sinks"]
        problem = qk_problem(queries, keys, query, method=QK_METHODS[method], **options)
        check_qk(problem)
        row = (_triton.rows_from_qk if query else _triton.full_from_qk)(problem)[0]
        row = row if query else row[5]
        assert torch.equal(row, row[5] * (torch.arange(12) == 5))
        assert row[5] > 0


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
        ({"method": Method(head_fusion=lambda a, g: a.mean(1))}, "Python function"),
        ({"method": Method(discard_ratio=0.5)}, "discard_ratio needs the order of a whole map"),
        ({"bias": torch.zeros(4).double()}, "bias is float64"),
        ({"bias": [torch.zeros(4), torch.zeros(4).half()], "layers": 2}, "differ in the dtype of their bias"),
    ],
    ids=["size", "float64", "function", "discard", "bias", "biases"],
)
def test_qk_refusals_give_a_reason(change: dict, reason: str) -> None:
    shape = (1, 2, 4, change.get("size", 16))
    tensors = [torch.zeros(shape, dtype=change.get("dtype", torch.float32))] * change.get("layers", 1)
    options = {name: value for name, value in change.items() if name in ("bias", "method")}
    problem = qk_problem(tensors, tensors, 0, **options)
    reasons = _triton.refusals_qk(problem)
    assert len(reasons) == 1
    assert reason in reasons[0]
