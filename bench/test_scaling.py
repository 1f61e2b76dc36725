"""Time and extra memory against S: B=1, H=8, L=4, and D=64 from queries and keys; each point checked, then timed.

A size whose inputs, and what the oracle makes of them, this machine has no memory for is skipped.
"""

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from bench.machine import host
from bench.providers import oracle
from bench.providers.chains import COMPILED, MAPS, OURS, PRODUCTS, QK, READ, Shape, make_random, skip_large
from rollout.bench.measure import does_not_fit

DIM = 64
TABLES = {"maps": MAPS, "Q,K": QK}
SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
LARGEST = 4096  # of the others, and of the oracle: maps of 8192 alone are 8 GiB, and a naive chain takes a minute
CURVES = [
    (seq, case, provider)
    for seq in SIZES  # outermost, so that inputs and oracle are made once a length
    for case, table in TABLES.items()
    for provider in table
    if provider not in (COMPILED, READ, PRODUCTS)  # compiled: one kernel set a shape; the floors are no rollout
    and (seq <= LARGEST or (case == "Q,K" and provider.startswith(OURS)))
]


@lru_cache(1)
def inputs(case: str, seq: int) -> tuple[list[Tensor], ...]:
    """L maps whose rows sum to 1, or Q and K of L layers; every layer memory of its own."""
    if case == "Q,K":
        made = make_random((1, 8, seq, DIM), 8, seed=seq)
        return made[:4], made[4:]
    first = torch.rand(1, 8, seq, seq, generator=torch.Generator().manual_seed(seq))
    first.div_(first.sum(-1, keepdim=True))
    # The layers differ by a shift of the columns: drawing numbers anew would take longer than the timing.
    return ([torch.roll(first, 3 * layer, -1).to(host.DEVICE) for layer in range(4)],)


@lru_cache(1)
def exact(case: str, seq: int) -> Tensor:
    """The row of position 0, which is that of all providers: rows sum to 1. Beyond the oracle only the sum of it: 1."""
    if seq > LARGEST:
        return torch.ones(1, dtype=torch.float64, device=host.DEVICE)
    return (oracle.from_qk if case == "Q,K" else oracle.from_maps)(*inputs(case, seq))


@pytest.mark.parametrize(("seq", "case", "provider"), CURVES)
def test_scaling(seq: int, case: str, provider: str, measure: Callable[..., None], quick: bool) -> None:
    skip_large(quick, seq, largest=256)
    whole, size = seq <= LARGEST, DIM if case == "Q,K" else 0
    if problem := does_not_fit(4 * 4 * 8 * 4 * seq * (seq if whole else DIM), host.DEVICE):
        pytest.skip(problem)
    given = TABLES[case][provider].on(Shape(1, 8, seq, 4, size), *inputs(case, seq))
    given |= {"tolerance": 1e-5, "reference": exact(case, seq), "provider": provider}
    part, checked = (lambda row: row, "float64") if whole else (lambda row: row.double().sum(-1), "sum of the row")
    measure(
        **given, reference=exact(case, seq), part=part, checked=checked, suite="scaling", case=case, provider=provider
    )
