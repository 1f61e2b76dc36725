"""The other methods of the family: discard rollout and Chefer's gradient-weighted relevance, theirs against ours.

Both keep every map (and for Chefer every gradient); ours computes the row of position 0 of the same matrices.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from bench.machine import host
from bench.providers import oracle
from bench.providers.chains import METHODS, Shape

BATCH, HEADS, LAYERS = 8, 8, 4
SEQUENCES = (64, 128, 256, 512)


@cache
def inputs(seq: int, gradients: bool) -> tuple[list[Tensor], ...]:
    """Softmax maps, and random gradients of them, of the size 1/S that gradients through a softmax have."""
    generator = torch.Generator().manual_seed(seq)
    made = [torch.randn(BATCH, HEADS, seq, seq, generator=generator) for _ in range(2 * LAYERS)]
    maps = [scores.softmax(-1).to(host.DEVICE) for scores in made[:LAYERS]]
    return (maps, [values.to(host.DEVICE) for values in made[LAYERS:]]) if gradients else (maps,)


@cache
def reference(seq: int, method: str) -> Tensor:
    given = inputs(seq, method == "chefer")
    return oracle.from_maps(given[0], method, gradients=given[1] if len(given) > 1 else None)


@pytest.mark.parametrize(("method", "provider"), METHODS)
@pytest.mark.parametrize("seq", SEQUENCES)
def test_float32(seq: int, method: str, provider: str, measure: Callable[..., None], quick: bool) -> None:
    if quick and seq > 128:
        pytest.skip("left out of the quick run")
    found, given, shape = METHODS[method, provider], inputs(seq, method == "chefer"), Shape(BATCH, HEADS, seq, LAYERS)
    size, flop = found.work(shape)
    measure(
        lambda: found.run(*given),
        reference=reference(seq, method),
        tolerance=found.tolerance,
        suite="other methods",
        provider=provider,
        method=method,
        shape={"B": BATCH, "H": HEADS, "S": seq, "L": LAYERS},
        dtype="float32",
        inputs=len(given) * shape.all_bytes(),
        bytes=size,
        flop=flop,
    )
