"""One row per sample from queries and keys: ours against the softmax written out and the naive chain."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from bench import providers

BATCH, HEADS, LAYERS, DIM = 32, 8, 4, 64
SEQUENCES = (64, 128, 256, 512)
PROVIDERS = {"naive chain": providers.naive_qk, "ours": providers.ours_qk}


@cache
def queries_and_keys(seq: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Random Q and K of L layers, and the float64 row of position 0."""
    generator = torch.Generator().manual_seed(seq)
    queries = [torch.randn(BATCH, HEADS, seq, DIM, generator=generator) for _ in range(LAYERS)]
    keys = [torch.randn(BATCH, HEADS, seq, DIM, generator=generator) for _ in range(LAYERS)]
    return queries, keys, providers.oracle_qk(queries, keys)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("seq", SEQUENCES)
def test_float32(seq: int, provider: str, measure: Callable[..., None], quick: bool) -> None:
    if quick and seq > 128:
        pytest.skip("left out of the quick run")
    queries, keys, reference = queries_and_keys(seq)
    scores = BATCH * HEADS * seq * ((LAYERS - 1) * seq + 1)
    measure(
        lambda: PROVIDERS[provider](queries, keys),
        reference=reference,
        tolerance=3e-6,
        suite="rows from Q,K",
        provider=provider,
        shape={"B": BATCH, "H": HEADS, "S": seq, "L": LAYERS, "D": DIM},
        dtype="float32",
        flop=2 * scores * DIM,
    )
