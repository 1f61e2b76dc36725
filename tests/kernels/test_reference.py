"""The oracle: on cases worked out by hand, and against the loops of `tests/support/oracles.py`."""

import math

import pytest
import torch
from torch import Tensor

import rollout
from rollout import Method
from tests.support.cases import random_gradients, random_maps, random_qk, random_weights
from tests.support.oracles import assert_close, rollout_matrices, softmax_maps, take_rows

ONE_HEAD = Method()


def maps_of(*layers: list[list[list[float]]]) -> list[Tensor]:
    """Layers of heads of rows, for one sample."""
    return [torch.tensor([heads], dtype=torch.float64) for heads in layers]


def oracle(attentions: list[Tensor], **arguments: object) -> Tensor:
    return rollout.attention_rollout(attentions, backend="reference", **arguments)  # type: ignore[arg-type]


def oracle_qk(queries: list[Tensor], keys: list[Tensor], **arguments: object) -> Tensor:
    return rollout.attention_rollout_qk(queries, keys, backend="reference", **arguments)  # type: ignore[arg-type]


def assert_equals(actual: Tensor, rows: object) -> None:
    """Equal to numbers worked out by hand, to the rounding of float64."""
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual[0], torch.tensor(rows, dtype=torch.float64), rtol=1e-14, atol=1e-15)


def test_one_layer_two_heads():
    maps = maps_of([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.25, 0.75]]])
    # Ā = [[.5, .5], [.375, .625]], rows sum to 1
    assert_equals(oracle(maps), [[0.75, 0.25], [0.1875, 0.8125]])


def test_the_product_has_the_input_side_on_the_right():
    first, second = [[[1.0, 0.0], [0.5, 0.5]]], [[[0.0, 1.0], [1.0, 0.0]]]
    # M_1 = [[1, 0], [¼, ¾]], M_2 = [[½, ½], [½, ½]]; M_2·M_1, where M_1·M_2 would be ½ everywhere
    assert_equals(oracle(maps_of(first, second)), [[0.625, 0.375], [0.625, 0.375]])
    assert_equals(oracle(maps_of(second, first)), [[0.5, 0.5], [0.5, 0.5]])


def test_max_and_min_fusion_are_renormalised():
    maps = maps_of([[[0.8, 0.2], [0.4, 0.6]], [[0.1, 0.9], [0.7, 0.3]]])
    # max: ½(I + [[.8, .9], [.7, .6]]) = [[.9, .45], [.35, .8]]
    # min: ½(I + [[.1, .2], [.4, .3]]) = [[.55, .1], [.2, .65]]
    assert_equals(oracle(maps, method=Method(head_fusion="max")), [[2 / 3, 1 / 3], [0.35 / 1.15, 0.8 / 1.15]])
    assert_equals(
        oracle(maps, method=Method(head_fusion="min")), [[0.55 / 0.65, 0.1 / 0.65], [0.2 / 0.85, 0.65 / 0.85]]
    )


def test_without_renormalisation_row_sums_stay():
    maps = maps_of([[[2.0, 1.0], [0.0, 4.0]]])
    assert_equals(oracle(maps, method="pyhealth"), [[1.5, 0.5], [0.0, 2.5]])
    assert_equals(oracle(maps, method="rollout"), [[0.75, 0.25], [0.0, 1.0]])


def test_residual_and_attention_weights():
    maps = maps_of([[[0.0, 1.0], [1.0, 0.0]]])
    assert_equals(oracle(maps, method=Method(residual=0.2)), [[0.2, 0.8], [0.8, 0.2]])
    assert_equals(oracle(maps, method="chefer_rollout"), [[0.5, 0.5], [0.5, 0.5]])
    plain = Method(residual=3.0, attention=2.0, renormalize=False)
    assert_equals(oracle(maps, method=plain), [[3.0, 2.0], [2.0, 3.0]])


def test_gradient_methods():
    maps = maps_of([[[0.5, 0.5], [0.25, 0.75]], [[1.0, 0.0], [0.5, 0.5]]])
    slopes = maps_of([[[2.0, -4.0], [0.0, 4.0]], [[-1.0, 1.0], [2.0, 6.0]]])
    # A∘G: [[1, −2], [0, 3]] and [[−1, 0], [1, 3]]
    # clamped, then averaged: [[.5, 0], [.5, 3]]; averaged, then clamped: [[0, 0], [.5, 3]]
    assert_equals(oracle(maps, gradients=slopes, method="chefer"), [[1.5, 0.0], [0.5, 4.0]])
    assert_equals(oracle(maps, gradients=slopes, method="grad_rollout"), [[1.0, 0.0], [1 / 9, 8 / 9]])
    assert_equals(oracle(maps, gradients=slopes, method="chefer_normalised"), [[1.0, 0.0], [0.5 / 7, 1 - 0.5 / 7]])


def test_a_row_of_attention_that_sums_to_0_is_the_residuals():
    maps = maps_of([[[0.5, 0.5], [0.25, 0.75]], [[1.0, 0.0], [0.5, 0.5]]])
    slopes = maps_of([[[-2.0, -4.0], [0.0, 4.0]], [[-1.0, 1.0], [2.0, 6.0]]])
    # A∘G clamped and averaged: [[0, 0], [.5, 3]]
    assert_equals(oracle(maps, gradients=slopes, method="chefer_normalised"), [[1.0, 0.0], [0.5 / 7, 1 - 0.5 / 7]])
    plain = Method(gradients="clamp_then_fuse", normalize_attention=True, renormalize=False)
    assert_equals(oracle(maps, gradients=slopes, method=plain), [[0.5, 0.0], [0.5 / 7, 1 - 0.5 / 7]])


def test_chefer_follows_the_published_update():
    """Equations 5 and 6: R starts as I and R ← R + E_h[(∇A∘A)⁺]·R, layer by layer from the input."""
    maps = random_maps(2, 3, 6, dtype=torch.float64)
    slopes = random_gradients(maps)
    relevance = torch.eye(6, dtype=torch.float64).repeat(2, 1, 1)
    for attention, gradient in zip(maps, slopes, strict=True):
        cam = (gradient * attention).clamp(min=0).mean(dim=1)
        relevance = relevance + cam @ relevance
    assert_close(oracle(maps, gradients=slopes, method="chefer"), relevance)


def test_discard_drops_the_smallest_and_spares_the_corner():
    maps = maps_of([[[0.1, 0.2, 0.7], [0.3, 0.3, 0.4], [0.6, 0.25, 0.15]]])
    # ⌊.5·9⌋ = 4 smallest: .1 (spared, it is [0, 0]), .15, .2, .25
    method = Method(discard_ratio=0.5, renormalize=False)
    assert_equals(oracle(maps, method=method), [[0.55, 0.0, 0.35], [0.15, 0.65, 0.2], [0.3, 0.0, 0.5]])


def test_discard_breaks_ties_by_flat_index():
    maps = maps_of([[[0.25, 0.75, 0.25], [0.25, 0.25, 0.5], [0.25, 0.5, 0.25]]])
    # six entries are .25; ⌊.45·9⌋ = 4 go in flat order: 0 (spared), 2, 3, 4
    method = Method(discard_ratio=0.45, residual=0.0, renormalize=False)
    assert_equals(oracle(maps, method=method), [[0.25, 0.75, 0.0], [0.0, 0.0, 0.5], [0.25, 0.5, 0.25]])


def test_supplied_matrices_are_only_multiplied():
    first = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], dtype=torch.float64)
    second = torch.tensor([[[0.0, 1.0], [-1.0, 2.0]]], dtype=torch.float64)
    assert_equals(oracle([first, second], method="product"), [[3.0, 4.0], [5.0, 6.0]])


def test_start_layer_leaves_out_the_input_side():
    first, second = [[[1.0, 0.0], [0.5, 0.5]]], [[[0.5, 0.5], [1.0, 0.0]]]
    assert_equals(oracle(maps_of(first, second), method=Method(start_layer=1)), [[0.75, 0.25], [0.5, 0.5]])


def test_every_form_of_query():
    maps = maps_of([[[1.0, 0.0], [0.5, 0.5]]])  # R = [[1, 0], [¼, ¾]]
    assert_equals(oracle(maps, query=1), [0.25, 0.75])
    assert_equals(oracle(maps, query=-2), [1.0, 0.0])
    assert_equals(oracle(maps, query=torch.tensor([1])), [0.25, 0.75])
    assert_equals(oracle(maps, query=torch.tensor([[2.0, -4.0]])), [1.0, -3.0])
    assert_equals(oracle(maps, query=torch.tensor([[[0.0, 4.0], [1.0, 0.0]]])), [[1.0, 3.0], [1.0, 0.0]])


def test_padding_is_zero_and_outside_the_chain():
    maps = maps_of([[[0.5, 0.5, 9.0], [1.0, 0.0, 9.0], [9.0, 9.0, 9.0]]])
    expected = [[0.75, 0.25, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    assert_equals(oracle(maps, lengths=torch.tensor([2])), expected)
    assert_equals(oracle(maps, lengths=torch.tensor([2]), query=-1), expected[1])


def test_softmax_of_queries_and_keys():
    # keys ln 1, ln 2, ln 5: query 1 gives 1 : 2 : 5, query 0 is uniform, query −1 gives 1 : ½ : ⅕
    queries = [torch.tensor([[[[1.0], [0.0], [-1.0]]]], dtype=torch.float64)]
    keys = [torch.tensor([[[[0.0], [math.log(2)], [math.log(5)]]]], dtype=torch.float64)]
    matrix = Method(residual=0.0)
    rows = [[1 / 8, 2 / 8, 5 / 8], [1 / 3, 1 / 3, 1 / 3], [10 / 17, 5 / 17, 2 / 17]]
    assert_equals(oracle_qk(queries, keys, method=matrix), rows)
    assert_equals(oracle_qk(queries, keys, method=matrix, scale=2.0, query=0), [1 / 30, 4 / 30, 25 / 30])

    causal = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], rows[2]]
    assert_equals(oracle_qk(queries, keys, method=matrix, causal=True), causal)
    banded = [[1 / 3, 2 / 3, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]
    assert_equals(oracle_qk(queries, keys, method=matrix, window=(0, 1)), banded)
    masked = torch.tensor([[True, False, True]])
    expected = [[1 / 6, 0.0, 5 / 6], [0.5, 0.0, 0.5], [5 / 6, 0.0, 1 / 6]]
    assert_equals(oracle_qk(queries, keys, method=matrix, key_mask=masked), expected)
    bias = torch.tensor([[math.log(4), -math.inf, 0.0]], dtype=torch.float64)
    expected = [[4 / 9, 0.0, 5 / 9], [0.8, 0.0, 0.2], [20 / 21, 0.0, 1 / 21]]
    assert_equals(oracle_qk(queries, keys, method=matrix, bias=bias), expected)


def test_a_row_without_keys_is_uniform_over_its_sample():
    queries, keys = random_qk(1, 2, 4, layers=1, dtype=torch.float64)
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    result = oracle_qk(queries, keys, key_mask=nothing, lengths=torch.tensor([3]), method=Method(residual=0.0))
    assert_equals(result, [[1 / 3, 1 / 3, 1 / 3, 0.0]] * 3 + [[0.0] * 4])


def test_grouped_heads_share_neighbouring_keys():
    """Heads 0, 1 read key head 0 and heads 2, 3 key head 1."""
    queries = [torch.ones(1, 4, 2, 1, dtype=torch.float64)]
    keys = [torch.tensor([[[[0.0], [math.log(3)]], [[0.0], [0.0]]]], dtype=torch.float64)]
    by_head = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert_equals(oracle_qk(queries, keys, method=Method(residual=0.0, head_fusion=by_head)), [[0.25, 0.75]] * 2)
    assert_equals(oracle_qk(queries, keys, method=Method(residual=0.0)), [[0.375, 0.625]] * 2)


METHODS = {
    **{name: method for name, method in rollout.METHODS.items() if not (method.matrices or method.values)},
    "mean-alpha": Method(residual=0.3),
    "min": Method(head_fusion="min", residual=0.7, renormalize=False),
    "weights": Method(head_fusion=torch.tensor([1.0, 3.0, -0.5])),
    "weights-by-layer": Method(head_fusion=torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 3.0], [0.5, 0.25, 0.0]])),
    "start": Method(start_layer=2),
    "max-grad": Method(head_fusion="max", gradients="clamp_then_fuse"),
}


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.values is None])
@pytest.mark.parametrize("lengths", [None, [9, 1, 5]], ids=["whole", "ragged"])
def test_oracle_equals_loops(name: str, lengths: list[int] | None):
    method = METHODS[name]
    maps = random_maps(3, 3, 9, dtype=torch.float64)
    slopes = random_gradients(maps) if method.gradients else None
    ends = None if lengths is None else torch.tensor(lengths)
    full = rollout_matrices(maps, method, lengths, slopes)
    for query in (
        None,
        0,
        -1,
        torch.tensor([3, 0, -2]) if lengths is None else torch.tensor([8, 0, 2]),
        random_weights(3, 2, 9),
    ):
        result = oracle(maps, query=query, lengths=ends, gradients=slopes, method=method)
        assert_close(result, take_rows(full, query, lengths))


def test_oracle_from_queries_and_keys_equals_loops():
    queries, keys = random_qk(2, 4, 8, groups=2, dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True, False, True, True, True], [False] * 8])
    bias = [random_weights(4, 8, 8).double(), None, random_weights(8).double()]
    lengths = [8, 5]
    given = {"key_mask": mask, "causal": True, "window": (4, None), "bias": bias, "scale": 0.4}
    maps, sums = softmax_maps(queries, keys, lengths, **given)  # type: ignore[arg-type]
    full = rollout_matrices(maps, Method(), lengths)
    for lse in (None, [torch.from_numpy(layer) for layer in sums]):
        for query in (None, -1):
            result = oracle_qk(queries, keys, lengths=torch.tensor(lengths), query=query, logsumexp=lse, **given)
            assert_close(result, take_rows(full, query, lengths), "qk")
