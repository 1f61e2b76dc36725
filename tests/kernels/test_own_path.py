"""`Method(own_path=False)`: by hand, and against the chain with the never-attending product taken out."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rollout
from rollout import METHODS, Method
from tests.support.cases import BACKENDS, assert_refused, generator, random_gradients, random_maps, random_qk
from tests.support.oracles import softmax_maps

B, H, S, L = 3, 3, 9, 3
LENGTHS = [9, 4, 6]
QUERIES: dict[str, Any] = {
    "full": None, "row": 0, "last": -1, "rows": torch.tensor([8, -1, 2]),
    "weights": torch.rand(B, S, generator=generator(3)), "weightings": torch.rand(B, 2, S, generator=generator(4)),
}  # fmt: skip


def without(method: str | Method, **fields: Any) -> Method:
    return replace(METHODS[method] if isinstance(method, str) else method, own_path=False, **fields)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    """One layer, ½ and ½: what is left of row 0 is its attention. Two: row 0 of M² less ¼ at its own place."""
    map_ = torch.tensor([[[0.2, 0.8], [0.6, 0.4]]], dtype=torch.float64)
    options: dict[str, Any] = {"method": without("rollout"), "backend": backend}
    one = rollout.attention_rollout([map_], query=0, **options)
    assert float((one - torch.tensor([[0.2, 0.8]], dtype=torch.float64)).abs().max()) <= 1e-15
    # M = [[.6, .4], [.3, .7]]; row 0 of M·M is [.36 + .12, .24 + .28]; less .25: [.23, .52] of .75.
    two = rollout.attention_rollout([map_, map_], query=0, **options)
    assert float((two - torch.tensor([[0.23, 0.52]], dtype=torch.float64) / 0.75).abs().max()) <= 1e-15


def wanted(matrices: list[Tensor], residuals: list[Tensor], query: Any, lengths: list[int]) -> Tensor:
    """Rows of the product of M_l [B, S, S] less that of the residuals [B, S] on the diagonal, over their sums."""
    full = torch.zeros(B, S, S, dtype=torch.float64)
    for b, n in enumerate(lengths):
        product, own = torch.eye(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
        for matrix, residual in zip(matrices, residuals, strict=True):
            product, own = matrix[b, :n, :n] @ product, own * residual[b, :n]
        full[b, :n, :n] = product - own.diag()
    if query is None:
        rows = full
    elif isinstance(query, Tensor) and query.is_floating_point():
        rows = (query if query.dim() == 3 else query[:, None]).double() @ full
        rows = rows if query.dim() == 3 else rows[:, 0]
    else:
        at = torch.full((B,), query) if isinstance(query, int) else query
        rows = full[torch.arange(B), torch.where(at < 0, at + torch.tensor(lengths), at)]
    sums = rows.sum(-1, keepdim=True)
    return torch.where(sums == 0, 0.0, rows / sums)


RENORMALISED = {
    "rollout": without("rollout"), "max": without(Method(head_fusion="max", residual=0.3)),
    "weights": without(Method(head_fusion=torch.tensor([1.0, 2.0, 3.0]))), "plain": without("pyhealth"),
    "chefer_rollout": without("chefer_rollout"), "discard": without("discard"), "grad_rollout": without("grad_rollout"),
    "chefer": without("chefer"), "function": without(Method(head_fusion=lambda maps, gradients: maps.amax(1))),
    "value_norm": without("value_norm"), "start": without(Method(start_layer=1)),
}  # fmt: skip


def parts(maps: list[Tensor], slopes: list[Tensor], given: dict[str, list[Tensor]], method: Method, lengths: list[int]):
    """M_l and the residual's share of each row, layer by layer, from one chain of one layer at a time."""
    matrices, residuals = [], []
    plain = replace(method, own_path=True, start_layer=0)
    for layer in range(method.start_layer, len(maps)):
        values = {name: tensors[layer : layer + 1] for name, tensors in given.items()}
        options: dict[str, Any] = {"lengths": torch.tensor(lengths), "backend": "reference", **values}
        one = rollout.attention_rollout([maps[layer]], gradients=[slopes[layer]], method=plain, **options)
        bare = replace(plain, renormalize=False)
        sums = rollout.attention_rollout([maps[layer]], gradients=[slopes[layer]], method=bare, **options).sum(-1)
        alone = method.residual * torch.ones(B, S, dtype=torch.float64)
        if method.values is not None:
            alone = alone * values["inputs"][0].norm(dim=-1)
        matrices.append(one.double())
        residuals.append(alone / torch.where(sums == 0, 1.0, sums) if method.renormalize else alone)
    return matrices, residuals


@pytest.mark.parametrize("name", RENORMALISED)
def test_what_is_left_is_the_chain_less_the_path_that_never_attends(name: str) -> None:
    method, source = RENORMALISED[name], generator(5)
    maps = random_maps(B, H, S, dtype=torch.float64)
    slopes = random_gradients(maps)
    given = {
        "values": [torch.randn(B, H, S, 4, generator=source).double() for _ in maps],
        "output_weights": [torch.randn(H, 4, 5, generator=source).double() for _ in maps],
        "inputs": [torch.randn(B, S, 5, generator=source).double() for _ in maps],
    }
    for query, lengths in ((q, n) for q in QUERIES.values() for n in ([S] * B, LENGTHS)):
        if isinstance(query, Tensor) and not query.is_floating_point() and lengths == LENGTHS:
            query = torch.tensor([8, -1, 2])
        expected = wanted(*parts(maps, slopes, given, method, lengths), query, lengths)
        for backend in BACKENDS:
            result = rollout.attention_rollout(
                maps, query=query, lengths=torch.tensor(lengths), gradients=slopes, method=method, backend=backend,
                **given,
            )  # fmt: skip
            assert float((result - expected).abs().max()) <= 1e-12


@pytest.mark.parametrize("name", ["rollout", "max", "plain", "discard", "start"])
def test_from_queries_and_keys(name: str) -> None:
    method = RENORMALISED[name]
    queries, keys = random_qk(B, H, S, dtype=torch.float64)
    for lengths, masks in ((LENGTHS, {}), ([S] * B, {"causal": True})):
        maps = [torch.from_numpy(m) for m in softmax_maps(queries, keys, lengths, **masks)[0]]
        for query in QUERIES.values():
            options: dict[str, Any] = {"query": query, "lengths": torch.tensor(lengths), "method": method}
            expected = rollout.attention_rollout(maps, backend="reference", **options)
            for backend in BACKENDS:
                result = rollout.attention_rollout_qk(queries, keys, backend=backend, **masks, **options)
                assert float((result - expected).abs().max()) <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", [0.5, 0.3, 1.0], ids=lambda r: f"a{r}")
def test_a_row_of_nothing_else_is_zero(backend: str, residual: float) -> None:
    """Row 1 takes nothing from anyone in any layer; the others do."""
    maps = random_maps(2, H, 5)
    for layer in maps:
        layer[:, :, 1] = 0.0
    method = Method(residual=residual, attention=0.5, own_path=False)
    for query in (None, 1):
        result = rollout.attention_rollout(maps, query=query, method=method, backend=backend)
        row = result[:, 1] if query is None else result
        assert torch.equal(row, torch.zeros(2, 5))
    assert torch.allclose(
        result.new_ones(2, 4), rollout.attention_rollout(maps, method=method)[:, [0, 2, 3, 4]].sum(-1)
    )


def test_one_position_attends_to_itself() -> None:
    result = rollout.attention_rollout([torch.ones(1, 2, 1, 1)] * 4, query=0, method=without("rollout"))
    assert torch.equal(result, torch.ones(1, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_keeps_its_digits(backend: str) -> None:
    maps = random_maps(B, H, S, layers=6)
    for query in (0, None, QUERIES["weightings"]):
        options: dict[str, Any] = {"query": query, "lengths": torch.tensor(LENGTHS), "method": without("rollout")}
        result = rollout.attention_rollout(maps, backend=backend, **options)
        exact = rollout.attention_rollout([m.double() for m in maps], backend="reference", **options)
        assert float((result.double() - exact).abs().max()) <= 1e-6
        for b, n in enumerate(LENGTHS):
            assert not result[b, ..., n:].any()


def test_the_default_has_its_own_path() -> None:
    assert all(method.own_path for method in METHODS.values())
    maps = random_maps(B, H, S)
    kept, left = (rollout.attention_rollout(maps, query=0, method=m) for m in ("rollout", without("rollout")))
    assert float((kept - left)[:, 0].min()) > 0.05


def test_wrong_fields_and_weightings_are_refused() -> None:
    assert_refused(TypeError, ("Method: own_path must be True or False, got 0",), lambda: Method(own_path=0))
    weights = torch.tensor([[0.5, -0.5, 0.0]])
    said = ("query must be a weighting of 0 or more with own_path=False",)
    maps, method = random_maps(1, H, 3), without("rollout")
    assert_refused(ValueError, said, lambda: rollout.attention_rollout(maps, query=weights, method=method))
    queries, keys = random_qk(1, H, 3)
    assert_refused(ValueError, said, lambda: rollout.attention_rollout_qk(queries, keys, query=weights, method=method))
