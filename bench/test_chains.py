"""Rollout from stored maps and from queries and keys: ours, the naive chain, the published peers, and the floors."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from bench.providers import oracle
from bench.providers.chains import (
    FEW,
    FULL,
    MAPS,
    METHODS,
    NAIVE,
    OURS,
    QK,
    QUICK,
    SEQUENCES,
    Shape,
    make_random,
    shape_of,
    skip_large,
)  # fmt: skip

DIM = 64
WARM = (64, 128)  # S below the size of most last-level caches


@cache
def make_maps(seq: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Softmax maps of L layers."""
    return [each.softmax(-1).to(dtype) for each in make_random((32, 8, seq, seq), 4, seed=seq)]


@cache
def exact(seq: int, method: str | None, dtype: torch.dtype = torch.float32, query: int | None = 0) -> Tensor | None:
    return None if method is None else oracle.from_maps(make_maps(seq, dtype), method, query)


@pytest.mark.parametrize("provider", MAPS)
@pytest.mark.parametrize("seq", SEQUENCES)
def test_rows_from_maps(seq: int, provider: str, measure: Callable[..., None], quick: bool) -> None:
    """All of one length next to each other: memory bandwidth is not the same all day."""
    skip_large(quick, seq, provider)
    given = MAPS[provider].on(shape_of(seq), make_maps(seq))
    measure(**given, reference=exact(seq, MAPS[provider].method), suite="rows from maps", provider=provider)


@pytest.mark.parametrize("provider", FEW)
@pytest.mark.parametrize("seq", WARM)
def test_warm(seq: int, provider: str, measure: Callable[..., None], quick: bool) -> None:
    """The same where the maps were just written, as by the layer before: those that fit stay in the cache."""
    skip_large(quick, seq, largest=0)
    given = MAPS[provider].on(shape_of(seq), make_maps(seq)) | {"cold": False, "provider": provider}
    measure(**given, reference=exact(seq, MAPS[provider].method), suite="rows from maps, warm")


@pytest.mark.parametrize("provider", FEW)
@pytest.mark.parametrize("seq", SEQUENCES)
def test_bfloat16(seq: int, provider: str, measure: Callable[..., None], quick: bool) -> None:
    skip_large(quick, seq)
    given = MAPS[provider].on(shape_of(seq), make_maps(seq, torch.bfloat16)) | {"provider": provider}
    if provider == NAIVE:
        given["tolerance"] = 5e-2  # it adds in bfloat16
    measure(**given, reference=exact(seq, MAPS[provider].method, torch.bfloat16), suite="rows from bf16 maps")


@pytest.mark.parametrize("provider", FULL)
@pytest.mark.parametrize("seq", SEQUENCES)
def test_full_matrix(seq: int, provider: str, measure: Callable[..., None], quick: bool) -> None:
    skip_large(quick, seq, provider)
    given = FULL[provider].on(shape_of(seq), make_maps(seq)) | {"provider": provider}
    measure(**given, reference=exact(seq, FULL[provider].method, query=None), suite="full matrix")


@cache
def queries_and_keys(seq: int) -> tuple[list[Tensor], list[Tensor]]:
    made = make_random((32, 8, seq, DIM), 8, seed=seq)
    return made[:4], made[4:]


@cache
def exact_qk(seq: int) -> Tensor:
    return oracle.from_qk(*queries_and_keys(seq))


@pytest.mark.parametrize("provider", QK)
@pytest.mark.parametrize("seq", SEQUENCES)
def test_rows_from_qk(seq: int, provider: str, measure: Callable[..., None], quick: bool) -> None:
    skip_large(quick, seq, provider)
    given = QK[provider].on(shape_of(seq, size=DIM), *queries_and_keys(seq)) | {"provider": provider}
    measure(**given, reference=None if QK[provider].method is None else exact_qk(seq), suite="rows from Q,K")


@cache
def maps_and_gradients(seq: int, method: str) -> tuple[list[Tensor], ...]:
    """Softmax maps, and for Chefer's method random gradients of them."""
    made = make_random((8, 8, seq, seq), 8, seed=seq)
    maps = [scores.softmax(-1) for scores in made[:4]]
    return (maps, made[4:]) if method == "chefer" else (maps,)


@cache
def exact_method(seq: int, method: str) -> Tensor:
    maps, *gradients = maps_and_gradients(seq, method)
    return oracle.from_maps(maps, method, **({"gradients": gradients[0]} if gradients else {}))


@pytest.mark.parametrize(("method", "provider"), METHODS)
@pytest.mark.parametrize("seq", SEQUENCES)
def test_methods(seq: int, method: str, provider: str, measure: Callable[..., None], quick: bool) -> None:
    """Theirs multiply out the full product; ours computes the row of position 0 of the same matrices."""
    skip_large(quick, seq)
    given = METHODS[method, provider].on(Shape(8, 8, seq, 4), *maps_and_gradients(seq, method))
    measure(**given, reference=exact_method(seq, method), suite="other methods", provider=provider, method=method)


@pytest.mark.parametrize("layers", [2, 4, 8])
def test_memory_against_layers(layers: int, measure: Callable[..., None], quick: bool) -> None:
    """The extra memory of ours is the same however many layers there are."""
    seq = QUICK if quick else 256
    maps = (make_maps(seq) * 2)[:layers]
    given = MAPS[OURS].on(shape_of(seq, layers), maps)
    measure(**given, reference=oracle.from_maps(maps), suite="memory against layers", provider=OURS)
