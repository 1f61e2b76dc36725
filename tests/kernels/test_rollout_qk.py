"""`attention_rollout_qk` on every backend against the loops: masks, grouped heads, log-sum-exp, tiling, memory."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import rollout
from rollout import Method
from rollout_kernels._torch import qk
from tests.support.cases import (
    BACKENDS,
    DTYPES,
    generator,
    peak_bytes,
    poison,
    poisoned_memory,
    random_qk,
    random_weights,
    same_bits,
    shape_params,
)
from tests.support.oracles import array, assert_close, rollout_matrices, softmax_maps, take_rows

ROLLOUT = rollout.METHODS["rollout"]
SHAPES = ((1, 1, 1), (2, 4, 7), (1, 2, 33), (2, 2, 32), (0, 2, 5))


def random_mask(batch: int, seq: int, seed: int = 3) -> Tensor:
    """Keys masked anywhere; all of the last sample's."""
    mask = torch.rand(batch, seq, generator=generator(seed)) < 0.6
    mask[-1] = False
    return mask


def band_bias(seq: int) -> Tensor:
    """−inf off a band, and on the whole of row 1."""
    i, j = torch.arange(seq)[:, None], torch.arange(seq)
    bias = random_weights(seq, seq, seed=8).masked_fill((i - j).abs() > 3, -math.inf)
    bias[1] = -math.inf
    return bias


B, H, S, L = 3, 4, 12, 3
MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (2, 3)},
    "left-window": {"window": (1, None)},
    "right-window": {"window": (-1, 0)},
    "diagonal": {"window": (0, 0)},
    "key-mask": {"key_mask": random_mask(B, S)},
    "key-mask-causal": {"key_mask": random_mask(B, S), "causal": True},
    "key-mask-window": {"key_mask": random_mask(B, S), "window": (1, 1)},
    "query-mask": {"query_mask": random_mask(B, S)},
    "both-masks": {"key_mask": random_mask(B, S), "query_mask": random_mask(B, S, seed=4), "lengths": [12, 9, 7]},
    "lengths": {"lengths": [12, 1, 7]},
    "lengths-key-mask": {"lengths": [5, 12, 9], "key_mask": random_mask(B, S, seed=5)},
    "lengths-causal-window": {"lengths": [12, 1, 7], "causal": True, "window": (4, None)},
    "bias-one": {"bias": random_weights(B, H, S, S)},
    "bias-broadcast": {"bias": random_weights(H, 1, S)},
    "bias-per-layer": {"bias": [random_weights(S, S), None, random_weights(B, 1, 1, S, seed=6)]},
    "bias-inf": {"bias": band_bias(S)},
    "bias-inf-lengths": {"bias": band_bias(S), "lengths": [12, 1, 7], "causal": True},
    "alibi": {"alibi_slopes": torch.tensor([1.0, 0.5, 0.25, 0.125])},
    "alibi-per-layer": {"alibi_slopes": [None, torch.tensor([0.3, 0.0, -0.2, 2.0]), None], "lengths": [12, 1, 7]},
    "scale": {"scale": 0.11},
    "softcap": {"softcap": 0.8},
    "softcap-bias": {"softcap": 1.5, "bias": band_bias(S), "causal": True, "scale": 0.4},
    "sinks": {"sinks": [random_weights(H, seed=layer) for layer in range(L)]},
    "sinks-masks": {
        "sinks": [random_weights(H, seed=layer) for layer in range(L)],
        "softcap": 2.0,
        "lengths": [12, 3, 8],
        "key_mask": random_mask(B, S, seed=7),
        "causal": True,
    },
    "scale-negative": {"scale": -0.3, "causal": True},
    "everything": {
        "lengths": [12, 3, 8],
        "key_mask": random_mask(B, S, seed=7),
        "query_mask": random_mask(B, S, seed=6),
        "causal": True,
        "window": (5, None),
        "bias": [None, random_weights(H, S, S), band_bias(S)],
        "alibi_slopes": torch.tensor([0.3, 0.2, 0.1, 0.0], dtype=torch.float64),
        "scale": 0.2,
    },
}
FUSIONS = {
    "mean": ROLLOUT,
    "mean-plain": rollout.METHODS["pyhealth"],
    "max": Method(head_fusion="max"),
    "min-plain": Method(head_fusion="min", renormalize=False),
    "weights": Method(head_fusion=torch.tensor([1.0, 2.0, 0.0, -0.5])),
    "weights-by-layer": Method(head_fusion=torch.arange(1.0, 13.0).view(3, 4)),
    "discard": rollout.METHODS["discard"],
    "chefer_rollout": rollout.METHODS["chefer_rollout"],
    "start": Method(start_layer=1),
}


def expected_maps(queries: list[Tensor], keys: list[Tensor], given: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    given = dict(given)
    slopes, bias = given.pop("alibi_slopes", None), given.get("bias")
    per_layer = [bias] * len(queries) if isinstance(bias, Tensor) else bias
    if slopes is not None:
        per_layer = [
            distance_bias(slopes if isinstance(slopes, Tensor) else slopes[layer], None if bias is None else one)
            for layer, one in enumerate(per_layer or [None] * len(queries))
        ]
    window = tuple(None if side == -1 else side for side in given.get("window", (None, None)))
    return softmax_maps(queries, keys, **{**given, "bias": per_layer, "window": window})


def distance_bias(slopes: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """What ALiBi's slopes add to the scores, entry by entry, beside a bias."""
    if slopes is None:
        return bias
    distance = torch.tensor([[abs(i - j) for j in range(S)] for i in range(S)])
    added = -slopes.double()[:, None, None] * distance
    return added if bias is None else bias + added


def call(queries: list[Tensor], keys: list[Tensor], given: dict[str, Any], **arguments: Any) -> Tensor:
    lengths = given.get("lengths")
    ends = None if lengths is None else torch.tensor(lengths)
    return rollout.attention_rollout_qk(queries, keys, **{**given, "lengths": ends}, **arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "heads", "seq", "dtype"), shape_params(SHAPES, list(DTYPES)))
def test_matches_loops(batch: int, heads: int, seq: int, dtype: torch.dtype, backend: str):
    queries, keys = random_qk(batch, heads, seq, dtype=dtype)
    full = rollout_matrices(softmax_maps(queries, keys)[0], ROLLOUT)
    for query in (None, 0, -1, torch.arange(batch) % seq, random_weights(batch, seq), random_weights(batch, 3, seq)):
        result = rollout.attention_rollout_qk(queries, keys, query=query, backend=backend)
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(result, take_rows(full, query), "qk")


@pytest.mark.parametrize("given_lse", [False, True], ids=["alone", "with-lse"])
@pytest.mark.parametrize("groups", [4, 2, 1], ids=lambda g: f"Hkv{g}")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, backend: str, groups: int, given_lse: bool):
    given = MASKS[mask]
    queries, keys = random_qk(B, H, S, groups=groups, dtype=torch.float64)
    maps, sums = expected_maps(queries, keys, given)
    lse = [torch.from_numpy(s) for s in sums] if given_lse else None
    full = rollout_matrices(maps, ROLLOUT, given.get("lengths"))
    if given_lse and "sinks" in given:
        with pytest.raises(ValueError, match="logsumexp must be left out with sinks"):
            call(queries, keys, given, backend=backend, logsumexp=lse)
        return
    for query in (None, 0, -1, random_weights(B, S), random_weights(B, 2, S)):
        result = call(queries, keys, given, query=query, backend=backend, logsumexp=lse)
        assert_close(result, take_rows(full, query, given.get("lengths")), "qk")


# With 4 heads a whole sample of 12 rows is 2304 bytes.
@pytest.mark.parametrize("tile_bytes", [1, 4 * 4 * 12 * 5, 2304 - 1, 2304, 3 * 2304, 4 << 20], ids=lambda n: f"tile{n}")
@pytest.mark.parametrize(
    "mask", ["plain", "causal", "lengths", "both-masks", "bias-inf-lengths", "sinks-masks", "everything"]
)
def test_any_tiling_gives_the_same(monkeypatch: pytest.MonkeyPatch, mask: str, tile_bytes: int):
    monkeypatch.setattr(qk, "CPU_TILE_BYTES", tile_bytes)
    given = MASKS[mask]
    queries, keys = random_qk(B, H, S, groups=2)
    maps, sums = expected_maps(queries, keys, given)
    lse = [torch.from_numpy(s).float() for s in sums]
    for method in FUSIONS.values():
        full = rollout_matrices(maps, method, given.get("lengths"))
        for query in (None, -1, random_weights(B, 2, S)):
            with poisoned_memory():
                result = call(queries, keys, given, query=query, method=method, backend="torch")
                assert_close(result, take_rows(full, query, given.get("lengths")), "qk")
                if method.discard_ratio or "sinks" in given:
                    continue  # equal entries are told apart by its rounding; with sinks there is none
                result = call(queries, keys, given, query=query, method=method, backend="torch", logsumexp=lse)
                assert_close(result, take_rows(full, query, given.get("lengths")), "qk")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_methods(fusion: str, backend: str):
    given = MASKS["lengths-key-mask"]
    queries, keys = random_qk(B, H, S, dtype=torch.float64)
    full = rollout_matrices(expected_maps(queries, keys, given)[0], FUSIONS[fusion], given["lengths"])
    for query in (None, 0, random_weights(B, 2, S)):
        result = call(queries, keys, given, query=query, method=FUSIONS[fusion], backend=backend)
        assert_close(result, take_rows(full, query, given["lengths"]), "qk")


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_may_differ_per_layer(backend: str):
    few, many = random_qk(2, 2, 9, layers=1, dim=5), random_qk(2, 6, 9, groups=3, layers=1, dim=16, seed=1)
    queries, keys = few[0] + many[0], few[1] + many[1]
    maps, _ = softmax_maps(queries, keys, scale=0.25)
    for query in (None, 0):
        result = rollout.attention_rollout_qk(queries, keys, query=query, scale=0.25, backend=backend)
        assert_close(result, take_rows(rollout_matrices(maps, ROLLOUT), query), "qk")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_layout_of_a_model(backend: str, dtype: torch.dtype):
    """[B, S, H, D] seen as [B, H, S, D], cut out of one projection of queries and keys."""
    source = generator(0)
    both = [torch.randn(2, 10, 2, 3, 4, generator=source).to(dtype) for _ in range(3)]
    queries = [t[:, :, 0].transpose(1, 2) for t in both]
    keys = [t[:, :, 1].transpose(1, 2) for t in both]
    full = rollout_matrices(softmax_maps(queries, keys)[0], ROLLOUT)
    for query in (None, 3, random_weights(2, 10)):
        result = rollout.attention_rollout_qk(queries, keys, query=query, backend=backend)
        assert_close(result, take_rows(full, query), "qk")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", ["lengths", "lengths-causal-window", "lengths-key-mask", "bias-inf-lengths"])
def test_padding_is_zero_and_never_read(backend: str, mask: str):
    given = dict(MASKS[mask])
    lengths = given["lengths"]
    queries, keys = random_qk(B, H, S)
    maps, sums = expected_maps(queries, keys, given)
    lse = poison([torch.from_numpy(s).float() for s in sums], lengths, (-1,))
    if "bias" in given:
        given["bias"] = poison([given["bias"].expand(B, H, S, S)] * L, lengths, (-1, -2))
    full = rollout_matrices(maps, ROLLOUT, lengths)
    for given_lse in (None, lse):
        for query in (None, 0, -1, random_weights(B, S)):
            result = call(
                poison(queries, lengths, (-2,)), poison(keys, lengths, (-2,)), given,
                query=query, backend=backend, logsumexp=given_lse,
            )  # fmt: skip
            assert_close(result, take_rows(full, query, lengths), "qk")
            for b, n in enumerate(lengths):
                assert not result[b, ..., n:].any()
                assert query is not None or not result[b, n:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_may_hold_anything(backend: str):
    """NaN at a key that no row may attend to changes nothing."""
    queries, keys = random_qk(2, 2, 8)
    mask = torch.arange(8).expand(2, 8) != 5
    full = rollout_matrices(softmax_maps(queries, keys, key_mask=mask)[0], ROLLOUT)
    for key in keys:
        key[:, :, 5] = torch.nan
    for query in (None, 0, random_weights(2, 8)):
        result = rollout.attention_rollout_qk(queries, keys, query=query, key_mask=mask, backend=backend)
        assert_close(result, take_rows(full, query), "qk")


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend: str):
    queries, keys = random_qk(1, 2, 10, dtype=torch.float64)
    queries = [100.0 * q for q in queries]
    full = rollout_matrices(softmax_maps(queries, keys)[0], ROLLOUT)
    for query in (None, 0):
        result = rollout.attention_rollout_qk(queries, keys, query=query, backend=backend)
        assert_close(result, take_rows(full, query), "qk")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fusion", ["mean", "mean-plain", "weights", "max"])
def test_a_rounded_logsumexp_moves_the_result_no_further(backend: str, fusion: str):
    """One that is off by δ scales an entry of M by at most exp(δ), and a row sum too, so the chain by exp(2·L·δ)."""
    queries, keys = random_qk(2, 4, 9)
    maps, sums = softmax_maps(queries, keys)
    source, delta = generator(9), 1e-3
    noise = [delta * (2 * torch.rand(s.shape, generator=source, dtype=torch.float64) - 1) for s in sums]
    lse = [(torch.from_numpy(s) + e).float() for s, e in zip(sums, noise, strict=True)]
    start = random_weights(2, 2, 9).abs()
    expected = take_rows(rollout_matrices(maps, FUSIONS[fusion]), start)
    result = rollout.attention_rollout_qk(
        queries, keys, query=start, logsumexp=lse, method=FUSIONS[fusion], backend=backend
    )
    sign = 2.0 if fusion == "weights" else 1.0  # one head's weight is negative
    assert float(abs(array(result) - expected).max()) <= sign * (math.exp(2 * 3 * delta) - 1) * expected.max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("query", [None, 0, "weights"], ids=["full", "row", "weights"])
@pytest.mark.parametrize("name", ["rollout", "pyhealth", "chefer_rollout"])
def test_a_wrong_logsumexp_is_refused(backend: str, query: Any, name: str):
    queries, keys = random_qk(2, 2, 8)
    start = random_weights(2, 8).abs() if query == "weights" else query
    _, right = softmax_maps(queries, keys)
    given: dict[str, Any] = {"query": start, "method": name, "backend": backend}
    rollout.attention_rollout_qk(queries, keys, logsumexp=[torch.from_numpy(s).float() for s in right], **given)
    for wrong in (
        [torch.from_numpy(s / math.log(2)).float() for s in right],  # base 2
        [torch.zeros(2, 2, 8)] * 3,
        [torch.from_numpy(s).float() for s in softmax_maps(queries, keys, causal=True)[1]],  # another mask
    ):
        with pytest.raises(ValueError, match=r"attention_rollout_qk: logsumexp\[0\] .*natural log"):
            rollout.attention_rollout_qk(queries, keys, logsumexp=wrong, **given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_may_be_minus_infinity_where_no_key_is_allowed(backend: str):
    queries, keys = random_qk(2, 2, 6)
    mask = torch.tensor([[True] * 6, [False] * 6])
    maps, sums = softmax_maps(queries, keys, key_mask=mask)
    lse = [torch.from_numpy(s).float() for s in sums]
    assert all(bool((layer[1] == -math.inf).all()) for layer in lse)
    result = rollout.attention_rollout_qk(queries, keys, query=0, key_mask=mask, logsumexp=lse, backend=backend)
    assert_close(result, rollout_matrices(maps, ROLLOUT)[:, 0], "qk")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_with_no_key_is_0_where_the_sink_is_minus_infinity_too(backend: str):
    queries, keys = random_qk(1, 2, 4)
    sinks = [torch.tensor([0.5, -math.inf])] * 3
    attends = torch.tensor([[True, True, False, True]])
    result = rollout.attention_rollout_qk(queries, keys, query=2, query_mask=attends, sinks=sinks, backend=backend)
    assert result.tolist() == [[0.0, 0.0, 1.0, 0.0]]


def test_a_method_of_supplied_matrices_is_refused():
    queries, keys = random_qk(1, 2, 4)
    with pytest.raises(ValueError, match=r"attention_rollout_qk: method .*use attention_rollout"):
        rollout.attention_rollout_qk(queries, keys, method="product")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mode_of_the_caller_does_not_matter(backend: str):
    queries, keys = random_qk(2, 4, 9, groups=2)
    mask, bias = random_mask(2, 9), random_weights(9, 9)
    given: dict[str, Any] = {"key_mask": mask, "bias": bias, "backend": backend}
    for query in (None, 1, random_weights(2, 9)):
        before = [t.clone() for t in (*queries, *keys, mask, bias)]
        expected = rollout.attention_rollout_qk(queries, keys, query=query, **given)
        full = rollout_matrices(softmax_maps(queries, keys, key_mask=mask, bias=[bias] * 3)[0], ROLLOUT)
        assert_close(expected, take_rows(full, query), "qk")
        assert all(same_bits(a, b) for a, b in zip(before, (*queries, *keys, mask, bias), strict=True))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert same_bits(rollout.attention_rollout_qk(queries, keys, query=query, **given), expected)
        with torch.inference_mode():
            result = rollout.attention_rollout_qk([q.clone() for q in queries], keys, query=query, **given)
            assert same_bits(result, expected)
        leaves = [q.clone().requires_grad_() for q in queries]
        result = rollout.attention_rollout_qk(leaves, keys, query=query, **given)
        assert same_bits(result, expected)
        assert not result.requires_grad
        assert same_bits(rollout.attention_rollout_qk(queries, keys, query=query, validate=False, **given), expected)


def test_maps_and_queries_agree():
    """Handing over the softmax itself gives the same, in one precision."""
    queries, keys = random_qk(2, 4, 10, dtype=torch.float64)
    maps = [(q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1) for q, k in zip(queries, keys, strict=True)]
    for query in (None, 5):
        expected = rollout.attention_rollout(maps, query=query)
        assert_close(rollout.attention_rollout_qk(queries, keys, query=query), expected, "qk")


def extra_bytes(layers: int, batch: int, seq: int, dim: int, dtype: torch.dtype, given: dict[str, Any]) -> int:
    queries, keys = random_qk(batch, 4, seq, dim, groups=2, layers=1)
    # as a model lays them out, [B, S, H, D]
    queries = [q.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for q in queries] * layers
    keys = [k.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for k in keys] * layers
    return peak_bytes(lambda: rollout.attention_rollout_qk(queries, keys, query=0, backend="torch", **given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["plain", "causal", "max"])
def test_row_form_needs_a_tile_and_some_rows(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kind: str):
    """Extra memory is O(B·H·S) and a few tiles (with one sample's keys): nothing per layer, nothing of S² or B·S·D."""
    given: dict[str, Any] = {"plain": {}, "causal": {"causal": True}, "max": {"method": FUSIONS["max"]}}[kind]
    tile, batch, heads = 1 << 16, 24, 4
    monkeypatch.setattr(qk, "CPU_TILE_BYTES", tile)
    for seq, dim in ((128, 64), (256, 32)):
        shallow, deep = (extra_bytes(layers, batch, seq, dim, dtype, given) for layers in (2, 6))
        assert deep == shallow
        sample = heads * seq * dim * 4  # the queries of one sample, in float32
        assert deep <= 4 * tile + 2 * sample + 6 * batch * heads * seq * 4
        assert deep < batch * heads * seq * seq * 4 / 4


QUERY_MASKS: dict[str, dict[str, Any]] = {
    "alone": {"query_mask": random_mask(B, S)},
    "causal": {"query_mask": random_mask(B, S), "causal": True},
    "key-mask": {"query_mask": random_mask(B, S), "key_mask": random_mask(B, S, seed=5)},
    "lengths": {"query_mask": random_mask(B, S), "lengths": [12, 1, 7]},
    "bias": {"query_mask": random_mask(B, S), "bias": random_weights(H, 1, S), "window": (4, None)},
}


@pytest.mark.parametrize("tile_bytes", [1, 960, 4 << 20], ids=lambda n: f"tile{n}")
@pytest.mark.parametrize("given_lse", [False, True], ids=["alone", "with-lse"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", QUERY_MASKS)
def test_rows_that_attend_nothing_are_uniform(
    monkeypatch: pytest.MonkeyPatch, mask: str, backend: str, given_lse: bool, tile_bytes: int
):
    """A row left out by `query_mask` has 1/n on each of the n keys of its sample, masked keys among them."""
    monkeypatch.setattr(qk, "CPU_TILE_BYTES", tile_bytes)
    given = dict(QUERY_MASKS[mask])
    queries, keys = random_qk(B, H, S, groups=2, dtype=torch.float64)
    lengths, silent = given.get("lengths"), ~given["query_mask"]
    maps, sums = expected_maps(queries, keys, {name: given[name] for name in given if name != "query_mask"})
    for layer in maps:
        for b, i in silent.nonzero().tolist():
            n = S if lengths is None else lengths[b]
            layer[b, :, i] = 0.0
            layer[b, :, i, :n] = 1.0 / n if i < n else 0.0
    full = rollout_matrices(maps, ROLLOUT, lengths)
    lse = [torch.from_numpy(s) for s in sums] if given_lse else None
    for query in (None, 0, -1, random_weights(B, S), random_weights(B, 2, S)):
        result = call(queries, keys, given, query=query, backend=backend, logsumexp=lse)
        assert_close(result, take_rows(full, query, lengths), "qk")


@pytest.mark.parametrize("argument", ["key_mask", "query_mask"])
def test_a_wrong_mask_is_refused_by_name(argument: str):
    queries, keys = random_qk(2, 2, 5)
    for wrong, error in (
        (torch.ones(2, 4, dtype=torch.bool), ValueError),
        (torch.ones(2, 5), TypeError),
        ([True], TypeError),
    ):
        with pytest.raises(error, match=rf"attention_rollout_qk: {argument} must be"):
            rollout.attention_rollout_qk(queries, keys, **{argument: wrong})
