"""Rollout from stored maps and from queries and keys: ours, the naive chain, the published peers, and the floors."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.providers.chains import FEW, METHODS, OURS, QUICK, SEQUENCES, TABLES, skip_large
from bench.providers.oracle import Problem, Shape

SHAPES = [Shape(32, 8, seq, 4) for seq in SEQUENCES]
WARM = SHAPES[:2]  # below the size of most last-level caches


def suite(
    name: str,
    kinds: Iterable[str] = ("maps",),
    shapes: Iterable[Shape] = SHAPES,
    providers: Iterable[str] | None = None,
    dtype: torch.dtype = torch.float32,
    largest: int = QUICK,
    **info: Any,
) -> Callable[..., None]:
    """A test of each provider of each kind at each shape, up to S=`largest` in the quick run.

    All of one shape next to each other: memory bandwidth is not the same all day.
    """

    @pytest.mark.parametrize(("kind", "provider"), [(kind, who) for kind in kinds for who in providers or TABLES[kind]])
    @pytest.mark.parametrize("shape", shapes, ids=str)
    def test(shape: Shape, kind: str, provider: str, measure: Callable[..., None], quick: bool) -> None:
        skip_large(quick, shape.S, provider, largest)
        given = TABLES[kind][provider].on(Problem(kind, shape, dtype))
        method = {"method": kind} if kind in METHODS else {}
        measure(**given, suite=name, provider=provider, **method, **info)

    return test


test_rows_from_maps = suite("rows from maps")
# The maps were just written, as by the layer before: those that fit stay in the cache.
test_warm = suite("rows from maps, warm", shapes=WARM, providers=FEW, largest=0, cold=False)
test_bfloat16 = suite("rows from bf16 maps", providers=FEW, dtype=torch.bfloat16)
test_full_matrix = suite("full matrix", ["full"])
test_rows_from_qk = suite("rows from Q,K", ["Q,K"], [replace(shape, D=64) for shape in SHAPES])
# Theirs multiply out the full product; ours computes the row of position 0 of the same matrices.
test_methods = suite("other methods", METHODS, [replace(shape, B=8) for shape in SHAPES])
# The extra memory of ours is the same however many layers there are.
LAYERS = [Shape(32, 8, 256, layers) for layers in (2, 4, 8)]
test_memory_against_layers = suite("memory against layers", shapes=LAYERS, providers=[OURS], largest=256)
