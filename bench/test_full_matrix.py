"""All of R from stored maps: ours, the naive chain and the published peers, each against the full oracle."""

from collections.abc import Callable
from functools import cache

import pytest
from torch import Tensor

from bench.providers import oracle
from bench.providers.chains import FULL
from bench.test_rows_from_maps import (
    BATCH,
    HEADS,
    LAYERS,
    SEQUENCES,
    maps,
    shape,
    skip_in_quick,
    skip_without_compiler,
)


@cache
def reference(seq: int, method: str) -> Tensor:
    return oracle.from_maps(maps(seq), method, query=None)


@pytest.mark.parametrize("provider", FULL)
@pytest.mark.parametrize("seq", SEQUENCES)
def test_float32(seq: int, provider: str, measure: Callable[..., None], quick: bool) -> None:
    skip_in_quick(seq, quick)
    skip_without_compiler(provider, seq, quick)
    found, values = FULL[provider], maps(seq)
    size, flop = found.work(shape(seq))
    measure(
        lambda: found.run(values),
        reference=reference(seq, found.method),
        tolerance=found.tolerance,
        suite="full matrix",
        provider=provider,
        shape={"B": BATCH, "H": HEADS, "S": seq, "L": LAYERS},
        dtype="float32",
        inputs=shape(seq).all_bytes(),
        bytes=size,
        flop=flop,
    )
