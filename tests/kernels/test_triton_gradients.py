"""Gradient-weighted methods from Q, K, V and the gradient at the attention's output in the kernels, in the interpreter
against the oracle."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import rollout
from rollout_kernels import Method, _problem, ops
from tests.kernels.test_triton_interpret_qk import (
    BIASES,
    FLAGS,
    FORMS,
    KEY_MASKS,
    MASKS,
    QK_BOUND,
    SCORES,
    large_tiles,
    qk_case,
    true_logsumexp,
)
from tests.support.triton_cases import MARKS, bounds_of_loops, error, handed_on, pairwise, poison

pytestmark = MARKS
__all__ = ["bounds_of_loops", "large_tiles", "poison"]  # fixtures
HEADS = 4
WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
METHODS = {
    **{name: rollout.METHODS[name] for name in ("chefer", "chefer_normalised", "grad_rollout")},
    "weights": Method(head_fusion=WEIGHTS, residual=0.3, gradients="clamp_then_fuse"),
    "weights, clamped last": Method(head_fusion=WEIGHTS, gradients="fuse_then_clamp", normalize_attention=True),
    "max": Method(head_fusion="max", gradients="clamp_then_fuse", normalize_attention=True, renormalize=False),
    "min": Method(head_fusion="min", gradients="fuse_then_clamp", attention=2.0),
}
SHAPES = {  # of `qk_case`, and H_v and D_v beside it
    "B2-H4-Hkv2-S33-D16-L2": (2, 32),
    "B1-H4-Hkv4-S70-D64-L2": (1, 16),
    "B1-H4-Hkv4-S1-D16-L1": (4, 128),
}


def check(problem: _problem.QKProblem) -> None:
    from rollout_kernels import _triton

    assert _triton.refusals_qk(problem) == []
    run = _triton.full_from_qk if problem.form == "full" else _triton.rows_from_qk
    assert error(run(problem), replace(problem, logsumexp=None)) <= QK_BOUND


CASES = pairwise(
    list(METHODS), ["fp32", "bf16"], list(SHAPES), FORMS, list(MASKS), list(KEY_MASKS), list(BIASES), list(SCORES),
    FLAGS, FLAGS, FLAGS, FLAGS,
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_gradient_weighted_from_qk(case: tuple) -> None:
    name, dtype, shape, query, mask, keys_allowed, biased, scores, sloped, rows_masked, ragged, given = case
    problem = qk_case(
        "mean", dtype, shape, query, mask, keys_allowed, biased, scores, sloped, rows_masked, ragged, given
    )
    method, handed = METHODS[name], handed_on(problem, *SHAPES[shape])
    weights = [WEIGHTS / WEIGHTS.sum()] * problem.layers if isinstance(method.head_fusion, Tensor) else None
    check(replace(problem, method=method, head_weights=weights, handed_on=handed))


def problem_of(method: Method, query: object = 3, **options: object) -> _problem.QKProblem:
    """Two samples, two heads, S 20, D 16; entries whose sums do cancel."""
    torch.manual_seed(3)
    drawn = [[torch.randn(2, HEADS, 20, 16) for _ in range(2)] for _ in range(4)]
    names = ("queries", "keys", "values", "output_gradients")
    return ops.qk_problem(query=query, method=method, **(dict(zip(names, drawn, strict=True)) | options))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (4, 2)}], ids=["none", "causal", "window"])
@pytest.mark.parametrize("name", ["chefer", "chefer_normalised", "grad_rollout"])
@pytest.mark.parametrize("form", ["row", "full"])
def test_a_row_that_attends_no_key_is_weighted_as_a_uniform_one(form: str, name: str, options: dict) -> None:
    """It reaches beyond the window; and where it starts the chain it is all there is."""
    attends = torch.arange(20).remainder(7).ne(3).expand(2, 20).clone()
    for masks in ({"query_mask": attends}, {"query_mask": attends, "key_mask": torch.rand(2, 20) < 0.6}):
        check(problem_of(rollout.METHODS[name], 3 if form == "row" else None, **masks, **options))


@pytest.mark.parametrize("name", ["chefer", "chefer_normalised", "grad_rollout", "max"])
def test_a_row_of_zeros_keeps_its_residual_alone(name: str) -> None:
    """Nothing of A∘G is left of row 3: what divides it is 1."""
    from rollout_kernels import _triton

    problem = problem_of(METHODS[name])
    handed = tuple((v.abs(), d.abs().where(torch.arange(20)[:, None] != 3, -d.abs())) for v, d in problem.handed_on)
    problem = replace(problem, handed_on=handed)
    check(problem)
    row = _triton.rows_from_qk(problem)
    kept = problem.method.residual if not problem.method.renormalize else 1.0
    assert torch.equal(row, kept**2 * (torch.arange(20) == 3).float().expand(2, 20))


@pytest.mark.parametrize("name", ["chefer", "chefer_normalised"])
def test_values_and_gradients_as_a_model_has_them(name: str) -> None:
    """Transposed; not on 16 bytes; a gradient of a sum, whose strides are all 0."""
    problem = problem_of(rollout.METHODS[name])
    (values, slopes), _ = problem.handed_on
    turned = values.transpose(1, 2).contiguous().transpose(1, 2), slopes.transpose(1, 2).contiguous().transpose(1, 2)
    off = torch.nn.functional.pad(values, (1, 0))[..., 1:], torch.nn.functional.pad(slopes, (1, 0))[..., 1:]
    one = torch.ones(()).expand(2, HEADS, 20, 16)
    for pair in (turned, off, (values, one)):
        check(replace(problem, handed_on=(pair, problem.handed_on[1])))


def test_a_nan_in_the_gradients_of_a_row_that_is_read_shows() -> None:
    from rollout_kernels import _triton

    for name in ("chefer", "grad_rollout"):
        problem = problem_of(METHODS[name])
        problem.handed_on[1][1][0, 0, 3, 0] = math.nan
        result = _triton.rows_from_qk(problem)
        assert result[0].isnan().any()
        assert result[1].isfinite().all()


@pytest.mark.parametrize("name", ["max", "min"])
@pytest.mark.parametrize("query", [3, None], ids=["row", "full"])
def test_plain_methods_that_normalise_attention(query: int | None, name: str) -> None:
    """Softmax rows of a mean sum to 1; those of other fusions, or with sinks, do not."""
    method = Method(head_fusion=name, normalize_attention=True, renormalize=name == "max", residual=0.3, attention=0.9)
    check(problem_of(method, query))
    check(problem_of(replace(method, head_fusion="mean"), query))
    check(problem_of(replace(method, head_fusion="mean"), query, sinks=[torch.randn(HEADS)] * 2, causal=True))


@pytest.mark.parametrize("name", ["chefer", "chefer_normalised", "grad_rollout"])
@pytest.mark.parametrize("query", [3, None, torch.rand(2, 2, 20)], ids=["row", "full", "weights"])
def test_a_call_takes_the_own_path_out_after_the_kernels(query: int | Tensor | None, name: str) -> None:
    problem = problem_of(rollout.METHODS[name])
    values, slopes = zip(*problem.handed_on, strict=True)
    given = {
        "queries": problem.queries, "keys": problem.keys, "values": values, "output_gradients": slopes,
        "query": query, "method": replace(problem.method, own_path=False),
    }  # fmt: skip
    result = ops.attention_rollout_qk(backend="triton", **given)
    assert float((result - ops.attention_rollout_qk(backend="reference", **given)).abs().max()) <= QK_BOUND


def test_a_given_logsumexp_is_taken_and_layers_below_the_start_are_left_out() -> None:
    problem = problem_of(replace(rollout.METHODS["chefer"], start_layer=1))
    assert problem.layers == len(problem.handed_on) == 1
    check(problem)
    check(replace(problem, logsumexp=tuple(true_logsumexp(problem))))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"values": [torch.zeros(2, 4, 20, 24)] * 2, "output_gradients": [torch.zeros(2, 4, 20, 24)] * 2},
         "head dimension of values 24 is not one of 16, 32, 64, 128"),
        ({"output_gradients": [torch.zeros(2, 4, 20, 16).half()] * 2},
         "queries, keys, values and output gradients have different dtypes (float16, float32)"),
        ({"values": [torch.zeros(2, 4, 20, 16), torch.zeros(2, 1, 20, 16)]},
         "layers differ in the shape of their values"),
        ({"method": Method(gradients="clamp_then_fuse", discard_ratio=0.5)},
         "discard_ratio needs the order of a whole map, and from Q and K no map is held"),
    ],
    ids=["size", "dtype", "shapes", "discard"],
)  # fmt: skip
def test_refusals_give_a_reason(change: dict, reason: str) -> None:
    from rollout_kernels import _triton

    given = {"method": METHODS["chefer"]} | change
    assert _triton.refusals_qk(problem_of(given.pop("method"), **given)) == [reason]
