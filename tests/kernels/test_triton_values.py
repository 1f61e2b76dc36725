"""`value_norm` from Q and K in the kernels, and rows without their own path, in the interpreter against the oracle."""

from dataclasses import replace

import pytest
import torch

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
from tests.support.triton_cases import MARKS, bounds_of_loops, error, pairwise, poison

pytestmark = MARKS
__all__ = ["bounds_of_loops", "large_tiles", "poison"]  # fixtures
METHODS = {
    "value_norm": rollout.METHODS["value_norm"],
    "plain": Method(residual=0.5, attention=0.25, renormalize=False, values="norm_then_sum"),
}


def with_values(problem: _problem.QKProblem, method: Method, groups: int, lengths_hide: bool) -> _problem.QKProblem:
    """The problem with values of `groups` heads of 3 numbers, and a width of 5; NaN beyond each sample's end."""
    layers = []
    for queries in problem.queries:
        batch, heads, seq, _ = queries.shape
        values, inputs = torch.randn(batch, groups, seq, 3), torch.randn(batch, seq, 5)
        for b, n in enumerate(problem.lengths.tolist() if lengths_hide else []):
            values[b, :, n:], inputs[b, n:] = torch.nan, torch.nan
        layers.append(_problem.LayerValues(values, torch.randn(heads, 3, 5), inputs))
    return replace(problem, method=method, values=tuple(layers))


CASES = pairwise(
    list(METHODS), ["fp32", "bf16"], ["B2-H4-Hkv2-S33-D16-L2", "B1-H4-Hkv4-S70-D64-L2", "B1-H4-Hkv4-S1-D16-L1"], FORMS,
    list(MASKS), list(KEY_MASKS), list(BIASES), list(SCORES), FLAGS, FLAGS, FLAGS, FLAGS,
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_value_norm_from_qk(case: tuple) -> None:
    from rollout_kernels import _triton

    name, dtype, shape, query, mask, keys_allowed, biased, scores, sloped, rows_masked, ragged, given = case
    problem = qk_case(
        "mean", dtype, shape, query, mask, keys_allowed, biased, scores, sloped, rows_masked, ragged, given
    )
    problem = with_values(problem, METHODS[name], 2, ragged)
    assert _triton.refusals_qk(problem) == []
    run = _triton.full_from_qk if problem.form == "full" else _triton.rows_from_qk
    assert error(run(problem), replace(problem, logsumexp=None)) <= QK_BOUND


def tensors(layers: int = 2) -> dict[str, list[torch.Tensor]]:
    torch.manual_seed(3)
    shapes = {"queries": (2, 2, 20, 16), "keys": (2, 2, 20, 16), "values": (2, 2, 20, 4), "output_weights": (2, 4, 6)}
    return {
        name: [torch.randn(shape) for _ in range(layers)] for name, shape in (shapes | {"inputs": (2, 20, 6)}).items()
    }


@pytest.mark.parametrize("name", ["value_norm", "rollout", "max"])
@pytest.mark.parametrize("query", [3, None], ids=["row", "full"])
def test_a_call_takes_the_own_path_out_after_the_kernels(query: int | None, name: str) -> None:
    method = Method(head_fusion="max") if name == "max" else rollout.METHODS[name]
    given = {"query": query, "method": replace(method, own_path=False), **tensors()}
    result = ops.attention_rollout_qk(backend="triton", **given)
    assert float((result - ops.attention_rollout_qk(backend="reference", **given)).abs().max()) <= QK_BOUND
    if name != "value_norm":
        maps = [(q @ k.mT / 4).softmax(-1) for q, k in zip(given.pop("queries"), given.pop("keys"), strict=True)]
        result = ops.attention_rollout(maps, backend="triton", **given)
        assert float((result - ops.attention_rollout(maps, backend="reference", **given)).abs().max()) <= QK_BOUND


def test_a_given_logsumexp_is_taken() -> None:
    from rollout_kernels import _triton

    problem = ops.qk_problem(query=0, method=METHODS["value_norm"], **tensors())
    problem = replace(problem, logsumexp=tuple(true_logsumexp(problem)))
    assert error(_triton.rows_from_qk(problem), replace(problem, logsumexp=None)) <= QK_BOUND


def test_refusals_give_a_reason() -> None:
    from rollout_kernels import _triton

    given = tensors()
    problem = ops.qk_problem(method=rollout.METHODS["kobayashi"], **given)
    assert _triton.refusals_qk(problem) == ["the norm of a sum over heads is not supported"]
    del given["queries"], given["keys"]
    problem = ops.maps_problem([torch.rand(2, 2, 20, 20)] * 2, method=METHODS["value_norm"], **given)
    assert _triton.refusals_maps(problem) == ["values are read beside queries and keys only"]
