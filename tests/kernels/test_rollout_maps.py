"""`attention_rollout` on every backend against the loops: dtypes, shapes, layouts, queries, lengths, memory."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

import rollout
from rollout import Method
from rollout_kernels import _native
from rollout_kernels._torch import maps as maps_source
from tests.support.cases import (
    DTYPES,
    MAP_BACKENDS,
    SHAPES,
    peak_bytes,
    poison,
    poisoned_memory,
    random_gradients,
    random_maps,
    random_weights,
    same_bits,
    shape_params,
)
from tests.support.oracles import assert_close, rollout_matrices, take_rows

ROLLOUT = rollout.METHODS["rollout"]
QUERIES = ("full", "first", "last", "per-sample", "weights", "weights-rows")


@cache
def grid_case(batch: int, heads: int, seq: int, dtype: torch.dtype) -> tuple[list[Tensor], np.ndarray]:
    maps = random_maps(batch, heads, seq, dtype=dtype)
    return maps, rollout_matrices(maps, ROLLOUT)


def make_query(form: str, batch: int, seq: int) -> int | Tensor | None:
    return {
        "full": None,
        "first": 0,
        "last": -1,
        "per-sample": torch.arange(batch) * 2 % seq - (torch.arange(batch) % 2),
        "weights": random_weights(batch, seq),
        "weights-rows": random_weights(batch, 3, seq),
    }[form]


@pytest.mark.parametrize("form", QUERIES)
@pytest.mark.parametrize("backend", MAP_BACKENDS)
@pytest.mark.parametrize(("batch", "heads", "seq", "dtype"), shape_params(SHAPES, list(DTYPES)))
def test_matches_loops(batch: int, heads: int, seq: int, dtype: torch.dtype, backend: str, form: str):
    maps, full = grid_case(batch, heads, seq, dtype)
    query = make_query(form, batch, seq)
    result = rollout.attention_rollout(maps, query=query, backend=backend)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(result, take_rows(full, query))


# One sample is 16 rows of 64 bytes: budgets for part of a row, some rows, all but one, all, and three samples.
@pytest.mark.parametrize(
    "tile_bytes", [1, 4 * 16 * 5, 4 * 16 * 15, 4 * 16 * 16, 4 * 16 * 16 * 3], ids=lambda n: f"tile{n}"
)
@pytest.mark.parametrize("lengths", [None, [16, 1, 7, 15, 16, 2, 2, 2]], ids=["whole", "ragged"])
@pytest.mark.parametrize("form", QUERIES)
def test_any_tiling_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, tile_bytes: int, lengths: list[int] | None, form: str
):
    monkeypatch.setattr(maps_source, "CPU_TILE_BYTES", tile_bytes)
    maps = random_maps(8, 2, 16)
    ends = None if lengths is None else torch.tensor(lengths)
    query = torch.tensor([3, 0, -1, -7, 15, 1, -2, 0]) if form == "per-sample" else make_query(form, 8, 16)
    for method in (Method(head_fusion="max"), Method(renormalize=False), Method(discard_ratio=0.5, head_fusion="max")):
        full = rollout_matrices(maps, method, lengths)
        with poisoned_memory():
            result = rollout.attention_rollout(maps, query=query, lengths=ends, method=method, backend="torch")
        assert_close(result, take_rows(full, query, lengths))


@pytest.mark.parametrize("backend", MAP_BACKENDS)
def test_mixed_ranks_and_dtypes(backend: str):
    maps = [
        *random_maps(2, None, 11, layers=1, dtype=torch.float16),
        *random_maps(2, 3, 11, layers=1, dtype=torch.bfloat16, seed=4),
        *random_maps(2, 5, 11, layers=1, seed=5),
    ]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        chosen = [maps[i] for i in order]
        for method in (ROLLOUT, Method(head_fusion="max")):
            full = rollout_matrices(chosen, method)
            for query in (None, 0, random_weights(2, 11)):
                result = rollout.attention_rollout(chosen, query=query, method=method, backend=backend)
                assert result.dtype == torch.float32
                assert_close(result, take_rows(full, query))
    assert rollout.attention_rollout([maps[0], maps[2].double()], query=0, backend=backend).dtype == torch.float64


def layouts(maps: list[Tensor]) -> dict[str, list[Tensor]]:
    """The same values with other strides."""
    batch, heads, seq, _ = maps[0].shape
    wide = [torch.full((batch, heads, seq + 3, 2 * seq), torch.nan) for _ in maps]
    for padded, m in zip(wide, maps, strict=True):
        padded[:, :, 1 : seq + 1, ::2] = m
    return {
        "keys-first": [m.transpose(-1, -2).contiguous().transpose(-1, -2) for m in maps],
        "heads-last": [m.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1) for m in maps],
        "sliced": [padded[:, :, 1 : seq + 1, ::2] for padded in wide],
        "flipped-batch": [m.flip(0).contiguous().flip(0) for m in maps],
        "tuple-member": list(torch.stack(maps, dim=1).unbind(1)),
    }


@pytest.mark.parametrize("backend", MAP_BACKENDS)
@pytest.mark.parametrize("layout", ["keys-first", "heads-last", "sliced", "flipped-batch", "tuple-member"])
def test_strides_do_not_matter(backend: str, layout: str):
    maps = random_maps(3, 2, 10)
    full = rollout_matrices(maps, ROLLOUT)
    strided = layouts(maps)[layout]
    for query in (None, 4, random_weights(3, 10)):
        assert_close(rollout.attention_rollout(strided, query=query, backend=backend), take_rows(full, query))


@pytest.mark.parametrize("backend", MAP_BACKENDS)
def test_expanded_maps(backend: str):
    """One map for all samples and heads, by strides of 0."""
    one = random_maps(1, 1, 6, layers=2)
    expanded = [m.expand(3, 4, 6, 6) for m in one]
    full = np.repeat(rollout_matrices(one, ROLLOUT), 3, axis=0)
    for query in (None, -1):
        assert_close(rollout.attention_rollout(expanded, query=query, backend=backend), take_rows(full, query))


@pytest.mark.parametrize("backend", MAP_BACKENDS)
@pytest.mark.parametrize("dtype", list(DTYPES), ids=list(DTYPES.values()))
def test_padding_is_zero_and_never_read(backend: str, dtype: torch.dtype):
    lengths = [9, 1, 4, 12]
    clean = random_maps(4, 2, 12, dtype=dtype)
    maps = poison(clean, lengths, (-1, -2))
    full = rollout_matrices(clean, ROLLOUT, lengths)
    weights = random_weights(4, 2, 12)
    for b, n in enumerate(lengths):
        weights[b, :, n:] = torch.nan
    for query in (None, 0, -1, torch.tensor([8, -1, 3, -12]), weights):
        result = rollout.attention_rollout(maps, query=query, lengths=torch.tensor(lengths), backend=backend)
        assert_close(result, take_rows(full, query, lengths))
        for b, n in enumerate(lengths):
            assert not result[b, ..., n:].any()
            assert query is not None or not result[b, n:].any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_lengths_and_rows_of_any_integer_dtype(dtype: torch.dtype):
    maps = random_maps(2, 2, 6)
    lengths, query = torch.tensor([6, 3], dtype=dtype), torch.tensor([5, 2], dtype=dtype)
    result = rollout.attention_rollout(maps, query=query, lengths=lengths)
    assert_close(result, take_rows(rollout_matrices(maps, ROLLOUT, [6, 3]), query, [6, 3]))


def test_an_int_query_may_be_a_numpy_integer():
    maps = random_maps(2, 2, 6)
    expected = rollout.attention_rollout(maps, query=3)
    assert same_bits(rollout.attention_rollout(maps, query=np.int64(3)), expected)
    assert_close(expected, rollout_matrices(maps, ROLLOUT)[:, 3])


@pytest.mark.parametrize("form", QUERIES)
def test_auto_on_the_cpu_is_native_where_it_was_built_and_serves(form: str):
    maps, query = random_maps(2, 3, 9), make_query(form, 2, 9)
    auto = rollout.attention_rollout(maps, query=query)
    served = form != "full" and _native.unusable() is None
    assert same_bits(auto, rollout.attention_rollout(maps, query=query, backend="native" if served else "torch"))
    assert_close(auto, take_rows(rollout_matrices(maps, ROLLOUT), query))


@pytest.mark.parametrize("backend", MAP_BACKENDS)
def test_the_mode_of_the_caller_does_not_matter(backend: str):
    """Grad mode, inference mode, autocast and `validate=False` give the same bits, detached."""
    maps = random_maps(2, 3, 9)
    for query in (None, 1, random_weights(2, 9)):
        expected = rollout.attention_rollout(maps, query=query, backend=backend)
        assert_close(expected, take_rows(rollout_matrices(maps, ROLLOUT), query))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert same_bits(rollout.attention_rollout(maps, query=query, backend=backend), expected)
        with torch.inference_mode():
            copies = [m.clone() for m in maps]
            assert same_bits(rollout.attention_rollout(copies, query=query, backend=backend), expected)
        leaves = [m.clone().requires_grad_() for m in maps]
        result = rollout.attention_rollout(leaves, query=query, backend=backend)
        assert same_bits(result, expected)
        assert not result.requires_grad
        assert all(leaf.grad is None for leaf in leaves)
        assert torch.is_grad_enabled()
        assert same_bits(rollout.attention_rollout(maps, query=query, backend=backend, validate=False), expected)


@pytest.mark.parametrize("backend", MAP_BACKENDS)
@pytest.mark.parametrize("name", ["rollout", "discard", "chefer", "grad_rollout", "product"])
def test_inputs_keep_their_bits(backend: str, name: str):
    heads = None if name == "product" else 1
    lengths, weights = torch.tensor([7, 4]), random_weights(2, 7)
    maps = random_maps(2, heads, 7)
    slopes = random_gradients(maps)
    before = [t.clone() for t in (*maps, *slopes, lengths, weights)]
    for query in (None, 0, weights):
        result = rollout.attention_rollout(
            maps, query=query, lengths=lengths, gradients=slopes, method=name, backend=backend
        )
        result.fill_(7.0)  # the result is no view of an input either
        assert all(same_bits(a, b) for a, b in zip(before, (*maps, *slopes, lengths, weights), strict=True))


def test_no_start_rows_give_an_empty_result():
    result = rollout.attention_rollout(random_maps(2, 2, 5), query=torch.zeros(2, 0, 5))
    assert result.shape == (2, 0, 5)
    assert result.dtype == torch.float32


def extra_bytes(layers: int, batch: int, heads: int, seq: int, dtype: torch.dtype, ragged: bool, method: Method) -> int:
    maps = random_maps(batch, heads, seq, layers=1, dtype=dtype) * layers
    lengths = torch.arange(batch) % (seq // 2) + seq // 2 if ragged else None
    return peak_bytes(lambda: rollout.attention_rollout(maps, query=0, lengths=lengths, method=method, backend="torch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
@pytest.mark.parametrize("shape", [(8, 4, 256), (128, 2, 64)], ids=["few-long", "many-short"])
def test_row_form_needs_a_tile_whatever_the_depth(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, ragged: bool, shape: tuple[int, int, int]
):
    """Extra memory beyond the maps: a tile, one more for the upcast, and O(B·H·S); nothing per layer, nothing of S²."""
    tile = 1 << 16
    monkeypatch.setattr(maps_source, "CPU_TILE_BYTES", tile)
    for method in (ROLLOUT, Method(head_fusion="max")):
        shallow, deep = (extra_bytes(layers, *shape, dtype, ragged, method) for layers in (2, 8))
        assert deep == shallow
        batch, heads, seq = shape
        assert deep <= 2 * tile + 3 * batch * heads * seq * 4


def test_row_form_needs_a_few_megabytes_as_shipped():
    """At this size one fused map is 12 MiB."""
    assert extra_bytes(3, 48, 2, 256, torch.float32, False, ROLLOUT) <= 6 << 20
