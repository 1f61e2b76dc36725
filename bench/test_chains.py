"""Rollout from stored maps and from queries and keys: ours, the naive chain, the published peers, and the floors."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.providers.chains import FEW, METHODS, OURS, QUICK, SEQUENCES, TABLES, skip_large
from bench.providers.oracle import Problem

MAPS = [Problem("maps", 32, 8, seq, 4) for seq in SEQUENCES]
WARM = MAPS[:2]  # of a size below that of most last-level caches
LAYERS = [Problem("maps", 32, 8, 256, layers) for layers in (2, 4, 8)]


def suite(
    name: str, problems: Sequence[Problem], providers: Sequence[str] = (), largest: int = QUICK, **info: Any
) -> Callable[..., None]:
    """A test of every provider, or of some, of each problem, up to S=`largest` in the quick run.

    All of one problem next to each other: memory bandwidth is not the same all day.
    """
    runs = [(problem, provider) for problem in problems for provider in providers or TABLES[problem.kind]]

    @pytest.mark.parametrize(("problem", "provider"), runs, ids=str)
    def test(problem: Problem, provider: str, measure: Callable[..., None], quick: bool) -> None:
        skip_large(quick, problem.S, provider, largest)
        given = TABLES[problem.kind][provider].on(problem)
        method = {"method": problem.kind} if problem.kind in METHODS else {}
        measure(**given, suite=name, provider=provider, **method, **info)

    return test


test_rows_from_maps = suite("rows from maps", MAPS)
test_bfloat16 = suite("rows from bf16 maps", [replace(maps, dtype=torch.bfloat16) for maps in MAPS], FEW)
test_full_matrix = suite("full matrix", [replace(maps, kind="full") for maps in MAPS])
test_rows_from_qk = suite("rows from Q,K", [replace(maps, kind="Q,K", D=64) for maps in MAPS])
# Theirs multiply out the full product; ours computes the row of position 0 of the same matrices.
test_methods = suite("other methods", [Problem(kind, 8, 8, seq, 4) for seq in SEQUENCES for kind in METHODS])

# The maps were just written, as by the layer before: those that fit stay in the cache. Not in the quick run.
test_warm = suite("rows from maps, warm", WARM, FEW, largest=0, cold=False)
# The extra memory of ours is the same however many layers there are.
test_memory_against_layers = suite("memory against layers", LAYERS, [OURS], largest=256)
