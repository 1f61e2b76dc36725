"""Every method against its paper's formula, and every field of `Method`."""

import re
from collections.abc import Callable
from dataclasses import replace
from math import floor

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import rollout
from rollout import METHODS, Method
from tests.support.cases import (
    BACKENDS,
    MAP_BACKENDS,
    generator,
    random_gradients,
    random_maps,
    random_weights,
    same_bits,
)
from tests.support.oracles import assert_close, rollout_matrices, take_rows

B, H, S, L = 2, 3, 10, 3
LENGTHS = [10, 7]


def any_maps(heads: int | None = H, layers: int = L) -> list[Tensor]:
    """Positive maps whose rows do not sum to 1."""
    shape, source = ((B, heads, S, S) if heads else (B, S, S)), generator(11)
    return [3.0 * torch.rand(shape, generator=source, dtype=torch.float64) for _ in range(layers)]


def rownorm(matrix: Tensor) -> Tensor:
    return matrix / matrix.sum(-1, keepdim=True)


def drop_smallest(fused: Tensor, ratio: float) -> Tensor:
    """Sample by sample, the smallest ⌊ratio·n²⌋ entries, the first of equals first, but never the first entry."""
    kept = fused.clone()
    for sample in kept:
        values = sample.flatten().tolist()
        order = sorted(range(len(values)), key=lambda flat: values[flat])  # stable
        for flat in order[: floor(ratio * len(values))]:
            if flat:
                sample.view(-1)[flat] = 0.0
    return kept


FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "rollout": lambda a, g, eye: rownorm(0.5 * a.mean(1) + 0.5 * eye),
    "pyhealth": lambda a, g, eye: 0.5 * a.mean(1) + 0.5 * eye,
    "chefer_rollout": lambda a, g, eye: rownorm(a.mean(1) + eye),
    "discard": lambda a, g, eye: rownorm(0.5 * drop_smallest(a.amax(1), 0.9) + 0.5 * eye),
    "grad_rollout": lambda a, g, eye: rownorm(0.5 * (a * g).mean(1).clamp(min=0) + 0.5 * eye),
    "chefer": lambda a, g, eye: eye + (a * g).clamp(min=0).mean(1),
    "chefer_normalised": lambda a, g, eye: rownorm(0.5 * rownorm((a * g).clamp(min=0).mean(1)) + 0.5 * eye),
    "product": lambda a, g, eye: a[:, 0],
}


def test_names_and_papers():
    assert set(METHODS) == {*FORMULAS, "value_norm", "kobayashi"}  # the last two: test_values.py
    assert all(len(method.paper) > 20 for method in METHODS.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("backend", MAP_BACKENDS)
@pytest.mark.parametrize("name", FORMULAS)
def test_published_formula(name: str, backend: str, dtype: torch.dtype):
    maps = [m.to(dtype) for m in any_maps(1 if name == "product" else H)]
    slopes = random_gradients(maps)
    given = [m[:, 0] for m in maps] if name == "product" else maps
    for lengths in ([S, S], LENGTHS):
        full = torch.zeros(B, S, S, dtype=torch.float64)
        for b, n in enumerate(lengths):
            eye = torch.eye(n, dtype=torch.float64)
            chain = eye[None]
            for a, g in zip(maps, slopes, strict=True):
                blocks = (t[b : b + 1, :, :n, :n].double() for t in (a, g))
                chain = FORMULAS[name](*blocks, eye) @ chain
            full[b, :n, :n] = chain[0]
        for query in (None, 0, -1, random_weights(B, 2, S)):
            result = rollout.attention_rollout(
                given, query=query, lengths=torch.tensor(lengths), gradients=slopes, method=name, backend=backend
            )
            assert_close(result, take_rows(full.numpy(), query, lengths))


FIELDS = {
    "residual": Method(residual=0.25),
    "residual-negative": Method(residual=-0.2, attention=1.5),
    "no-residual": Method(residual=0.0),
    "attention": Method(residual=0.5, attention=2.0),
    "no-attention": Method(residual=0.5, attention=0.0),
    "max-plain": Method(head_fusion="max", renormalize=False),
    "min": Method(head_fusion="min"),
    "clamp-max": Method(head_fusion="max", gradients="clamp_then_fuse"),
    "clamp-weights": Method(head_fusion=torch.tensor([1.0, 2.0, 3.0]), gradients="clamp_then_fuse", renormalize=False),
    "fuse-weights": Method(head_fusion=torch.tensor([1.0, -2.0, 3.0]), gradients="fuse_then_clamp"),
    "fuse-min": Method(head_fusion="min", gradients="fuse_then_clamp", residual=1.0, attention=1.0),
    "discard-gradients": Method(gradients="clamp_then_fuse", discard_ratio=0.3, head_fusion="max"),
    "normalize": Method(residual=0.25, normalize_attention=True, head_fusion="max", renormalize=False),
    "normalize-weights": Method(head_fusion=torch.tensor([1.0, 2.0, 3.0]), normalize_attention=True, attention=2.0),
    "normalize-discard": Method(normalize_attention=True, discard_ratio=0.5, head_fusion="max", renormalize=False),
    "normalize-gradients": Method(gradients="fuse_then_clamp", normalize_attention=True, start_layer=1),
    "start": Method(start_layer=1),
    "start-discard": Method(start_layer=2, discard_ratio=0.5, head_fusion="max"),
    "start-gradients": Method(start_layer=1, gradients="fuse_then_clamp"),
    "start-weights": Method(
        start_layer=1, head_fusion=torch.tensor([[1.0, 2.0, 3.0], [5.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    ),
}


@pytest.mark.parametrize("backend", MAP_BACKENDS)
@pytest.mark.parametrize("name", FIELDS)
def test_fields(name: str, backend: str):
    method, maps = FIELDS[name], any_maps()
    slopes = random_gradients(maps)
    full = rollout_matrices(maps, method, LENGTHS, slopes)
    for query in (None, 0, -1, random_weights(B, S)):
        result = rollout.attention_rollout(
            maps, query=query, lengths=torch.tensor(LENGTHS), gradients=slopes, method=method, backend=backend
        )
        assert_close(result, take_rows(full, query, LENGTHS))


@pytest.mark.parametrize("backend", MAP_BACKENDS)
@pytest.mark.parametrize("ratio", [0.0, 0.009, 0.011, 0.3, 0.5, 0.9, 0.999])
def test_discard_counts_by_the_valid_block(backend: str, ratio: float):
    """⌊q·n²⌋ entries go, n the sample's own length: maps without ties and a corner that is large."""
    values = torch.randperm(B * S * S, generator=generator(5)).view(B, S, S) + 1.0
    values[:, 0, 0] = 1000.0
    values[1, 7:], values[1, :, 7:] = 0.5, 0.5  # padding that would go first
    method = Method(residual=0.0, renormalize=False, discard_ratio=ratio)
    result = rollout.attention_rollout([values], lengths=torch.tensor(LENGTHS), method=method, backend=backend)
    for b, n in enumerate(LENGTHS):
        kept, block = result[b, :n, :n].flatten(), values[b, :n, :n].flatten()
        gone = kept == 0
        assert int(gone.sum()) == floor(ratio * n * n)
        assert not gone.any() or float(block[gone].max()) < float(block[~gone].min())
        assert torch.equal(kept[~gone], block[~gone])


@pytest.mark.parametrize("backend", MAP_BACKENDS)
def test_discard_takes_equal_entries_in_order(backend: str):
    """Constant maps: everything ties, the first ⌊q·n²⌋ go, save the corner; n = 4 and 3 in one batch."""
    maps = torch.full((2, 2, 4, 4), 0.25)
    method = Method(residual=0.0, renormalize=False, discard_ratio=0.5, head_fusion="max")
    result = rollout.attention_rollout([maps], lengths=torch.tensor([4, 3]), method=method, backend=backend)
    first = torch.tensor([[0.25, 0.0, 0.0, 0.0], [0.0] * 4, [0.25] * 4, [0.25] * 4])
    second = torch.tensor([[0.25, 0.0, 0.0, 0.0], [0.0, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.0], [0.0] * 4])
    assert torch.equal(result, torch.stack([first, second]))


@pytest.mark.parametrize("backend", MAP_BACKENDS)
@pytest.mark.parametrize("corner", [0.0, 9.0], ids=["smallest", "largest"])
def test_discard_spares_the_corner_and_takes_nothing_instead(backend: str, corner: float):
    maps = torch.arange(1.0, 17.0).view(1, 4, 4)
    maps[0, 0, 0] = corner
    if not corner:
        maps += 1.0
    method = Method(residual=0.0, renormalize=False, discard_ratio=0.25)
    result = rollout.attention_rollout([maps], method=method, backend=backend)
    expected = maps.clone()
    expected.view(-1)[1:4] = 0.0  # of the 4 smallest: the corner when it is one of them, else also entry 4
    expected.view(-1)[4] = maps[0, 1, 0] if not corner else 0.0
    assert torch.equal(result, expected)


@pytest.mark.parametrize("backend", MAP_BACKENDS)
def test_discard_keeps_the_top_layer_whole(backend: str):
    """Its threshold needs the whole map, so the one-hot row must not take the short cut."""
    maps = any_maps(layers=1)
    full = rollout_matrices(maps, METHODS["discard"])
    for row in range(S):
        assert_close(rollout.attention_rollout(maps, query=row, method="discard", backend=backend), full[:, row])


@pytest.mark.parametrize("backend", MAP_BACKENDS)
def test_layers_below_the_start_are_never_read(backend: str):
    maps = random_maps(B, H, S)
    alone = rollout.attention_rollout(maps[2:], query=0, backend=backend)
    assert_close(alone, rollout_matrices(maps[2:], METHODS["rollout"])[:, 0])
    maps[0].fill_(torch.nan)
    maps[1].fill_(torch.inf)
    assert same_bits(rollout.attention_rollout(maps, query=0, method=Method(start_layer=2), backend=backend), alone)


@pytest.mark.parametrize("backend", MAP_BACKENDS)
def test_head_weights(backend: str):
    maps = random_maps(B, H, S, dtype=torch.float64)

    def run(weights: Tensor) -> Tensor:
        return rollout.attention_rollout(maps, query=1, method=Method(head_fusion=weights), backend=backend)

    weights = torch.tensor([1.0, 2.0, 5.0])
    expected = rollout_matrices([(m * (weights / 8).view(3, 1, 1)).sum(1) for m in maps], METHODS["rollout"])[:, 1]
    for same in (
        weights,
        10 * weights,
        -weights,
        weights.int(),
        weights.bfloat16(),
        weights.expand(L, H),
        weights.requires_grad_(),
    ):
        assert_close(run(same), expected)
    assert_close(run(torch.ones(H)), rollout.attention_rollout(maps, query=1, backend=backend))
    one_head = rollout_matrices([maps[0][:, 2], maps[1][:, 0], maps[2][:, 1]], METHODS["rollout"])[:, 1]
    assert_close(run(torch.eye(3)[[2, 0, 1]]), one_head)


@pytest.mark.parametrize("backend", MAP_BACKENDS)
def test_head_weights_do_not_touch_a_fused_layer(backend: str):
    maps = [random_maps(B, None, S, layers=1)[0], *random_maps(B, H, S, layers=2, seed=3)]
    for weights in (torch.tensor([1.0, 0.0, 3.0]), torch.tensor([[9.0, 9.0, 9.0], [1.0, 0.0, 3.0], [2.0, 1.0, 1.0]])):
        method = Method(head_fusion=weights)
        full = rollout_matrices(maps, method)
        for query in (None, 0):
            assert_close(
                rollout.attention_rollout(maps, query=query, method=method, backend=backend), take_rows(full, query)
            )


@pytest.mark.parametrize("backend", MAP_BACKENDS)
def test_a_function_as_head_fusion(backend: str):
    """It sees one sample's valid block at a time, in the accumulation dtype, and its word is final."""
    seen = []

    def strongest_head(maps: Tensor, gradients: Tensor | None) -> Tensor:
        seen.append((tuple(maps.shape), maps.dtype, gradients))
        head = maps.diagonal(dim1=2, dim2=3).sum(-1).argmax(1)
        return maps[torch.arange(len(maps)), head]

    maps = random_maps(B, H, S, dtype=torch.bfloat16)
    chosen = [torch.zeros(B, S, S, dtype=torch.float64) for _ in maps]
    for m, out in zip(maps, chosen, strict=True):
        for b, n in enumerate(LENGTHS):
            traces = [float(m[b, h, :n, :n].double().trace()) for h in range(H)]
            out[b, :n, :n] = m[b, traces.index(max(traces)), :n, :n]
    full = rollout_matrices(chosen, METHODS["rollout"], LENGTHS)
    for query in (None, 0, random_weights(B, S)):
        result = rollout.attention_rollout(
            maps, query=query, lengths=torch.tensor(LENGTHS), method=Method(head_fusion=strongest_head), backend=backend
        )
        assert_close(result, take_rows(full, query, LENGTHS))
    wide = torch.float64 if backend == "reference" else torch.float32
    assert set(seen) == {((1, H, n, n), wide, None) for n in LENGTHS}


@pytest.mark.parametrize("backend", MAP_BACKENDS)
def test_a_function_with_gradients(backend: str):
    """A·|∇A|, averaged: a form that no field gives."""
    maps, lengths = any_maps(), torch.tensor(LENGTHS)
    slopes = random_gradients(maps)
    method = Method(
        head_fusion=lambda a, g: (a * g.abs()).mean(1), gradients="clamp_then_fuse", residual=1.0, attention=1.0
    )
    ready = [(m * g.abs()).mean(1) for m, g in zip(maps, slopes, strict=True)]
    full = rollout_matrices(ready, METHODS["chefer_rollout"], LENGTHS)
    for query in (None, -1):
        result = rollout.attention_rollout(
            maps, query=query, lengths=lengths, gradients=slopes, method=method, backend=backend
        )
        assert_close(result, take_rows(full, query, LENGTHS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_function_from_queries_and_keys(backend: str):
    source = generator(0)
    queries, keys = ([torch.randn(B, 4, S, 6, generator=source) for _ in range(2)] for _ in range(2))
    squares = [
        (q.double() @ k.double().mT * 6**-0.5).softmax(-1).square().sum(1) for q, k in zip(queries, keys, strict=True)
    ]
    full = rollout_matrices(squares, METHODS["rollout"])
    method = Method(head_fusion=lambda a, g: a.square().sum(1))
    for query in (None, 3):
        result = rollout.attention_rollout_qk(queries, keys, query=query, method=method, backend=backend)
        assert_close(result, take_rows(full, query), "qk")


def test_a_new_method_is_one_entry(monkeypatch: pytest.MonkeyPatch):
    mine = replace(METHODS["chefer_rollout"], head_fusion="min", start_layer=1)
    monkeypatch.setattr("rollout.method.METHODS", {**METHODS, "mine": mine})
    maps = any_maps()
    assert_close(rollout.attention_rollout(maps, query=2, method="mine"), rollout_matrices(maps, mine)[:, 2])


@pytest.mark.parametrize("name", ["rollout", "pyhealth", "chefer_rollout", "grad_rollout", "chefer", "product"])
def test_one_row_reads_one_row_of_the_top_layer(name: str):
    maps = [m.clone() for m in any_maps(None if name == "product" else H)]
    slopes = random_gradients(maps)
    query = torch.tensor([4, 0])
    expected = take_rows(rollout_matrices(maps, METHODS[name], gradients=slopes), query)
    for b, row in enumerate(query.tolist()):
        others = torch.arange(S) != row
        maps[-1][b, ..., others, :] = torch.nan
        slopes[-1][b, ..., others, :] = torch.nan
    result = rollout.attention_rollout(maps, query=query, gradients=slopes, method=name, backend="torch")
    assert_close(result, expected)


@pytest.mark.parametrize(
    "name", ["rollout", "pyhealth", "chefer_rollout", "discard", "grad_rollout", "chefer", "product"]
)
def test_row_form_never_multiplies_matrices(name: str):
    """2·B·S² operations a layer below the top; the product of S×S matrices would be S times that."""
    maps = any_maps(None if name == "product" else H)
    given = {"gradients": random_gradients(maps), "method": name, "backend": "torch"}
    expected = rollout.attention_rollout(maps, **given)[:, 3]
    with FlopCounterMode(display=False) as counter:
        result = rollout.attention_rollout(maps, query=3, **given)
    assert_close(result, expected)
    below_the_top = L if name == "discard" else L - 1
    assert counter.get_total_flops() == below_the_top * 2 * B * S * S


@pytest.mark.parametrize("backend", ["torch"])
@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (lambda maps, gradients: maps, ValueError, "must return [b, n, n] = [1, 4, 4], got [1, 2, 4, 4]"),
        (lambda maps, gradients: None, TypeError, "must return a tensor [b, n, n], got NoneType"),
    ],
    ids=["wrong-shape", "no-tensor"],
)
def test_a_fusion_function_that_gives_something_else(backend, function, error, words):
    maps = [torch.rand(1, 2, 4, 4)]
    with pytest.raises(error, match=re.escape(words)):
        rollout.attention_rollout(maps, query=0, method=rollout.Method(head_fusion=function), backend=backend)
