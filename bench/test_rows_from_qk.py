"""One row per sample from queries and keys: ours against the softmax written out and the naive chain."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from bench.machine import host
from bench.providers import oracle
from bench.providers.chains import QK, Shape
from bench.test_rows_from_maps import skip_in_quick, skip_without_compiler

BATCH, HEADS, LAYERS, DIM = 32, 8, 4, 64
SEQUENCES = (64, 128, 256, 512)


@cache
def queries_and_keys(seq: int) -> tuple[list[Tensor], list[Tensor]]:
    """Random Q and K of L layers."""
    generator = torch.Generator().manual_seed(seq)
    made = [torch.randn(BATCH, HEADS, seq, DIM, generator=generator).to(host.DEVICE) for _ in range(2 * LAYERS)]
    return made[:LAYERS], made[LAYERS:]


@cache
def reference(seq: int) -> Tensor:
    return oracle.from_qk(*queries_and_keys(seq))


@pytest.mark.parametrize("provider", QK)
@pytest.mark.parametrize("seq", SEQUENCES)
def test_float32(seq: int, provider: str, measure: Callable[..., None], quick: bool) -> None:
    skip_in_quick(seq, quick)
    skip_without_compiler(provider, seq, quick)
    queries, keys = queries_and_keys(seq)
    found = QK[provider]
    size, flop = found.work(Shape(BATCH, HEADS, seq, LAYERS, DIM))
    measure(
        lambda: found.run(queries, keys),
        reference=reference(seq),
        tolerance=found.tolerance,
        suite="rows from Q,K",
        provider=provider,
        shape={"B": BATCH, "H": HEADS, "S": seq, "L": LAYERS, "D": DIM},
        dtype="float32",
        inputs=sum(tensor.nbytes for tensor in (*queries, *keys)),
        bytes=size,
        flop=flop,
    )
