"""Time and extra memory against S: B=1, H=8, L=4, and D=64 from queries and keys; each point checked, then timed.

A size whose inputs, and what the oracle makes of them, this machine has no memory for is skipped.
"""

from collections.abc import Callable

import pytest

from bench.machine import host
from bench.providers.chains import COMPILED, OURS, PRODUCTS, READ, TABLES, skip_large
from bench.providers.oracle import Problem
from rollout.bench.measure import does_not_fit

DIM = 64
SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
LARGEST = 4096  # of the others, and of the oracle: maps of 8192 alone are 8 GiB, and a naive chain takes a minute
CURVES = [
    (seq, case, provider)
    for seq in SIZES  # outermost, so that inputs and oracle are made once a length
    for case in ("maps", "Q,K")
    for provider in TABLES[case]
    if provider not in (COMPILED, READ, PRODUCTS)  # compiled: one kernel set a shape; the floors are no rollout
    and (seq <= LARGEST or (case == "Q,K" and provider.startswith(OURS)))
]


@pytest.mark.parametrize(("seq", "case", "provider"), CURVES)
def test_scaling(seq: int, case: str, provider: str, measure: Callable[..., None], quick: bool) -> None:
    """All are held to the rollout, which each of them is where rows sum to 1; beyond the oracle to that sum alone."""
    skip_large(quick, seq, largest=256)
    whole = seq <= LARGEST
    if lacking := does_not_fit(4 * 4 * 8 * 4 * seq * (seq if whole else DIM), host.DEVICE):
        pytest.skip(lacking)
    problem = Problem(case, 1, 8, seq, 4, DIM if case == "Q,K" else 0, compared=int(whole))
    # A plain float32 sum of more terms is further off; ours, in tiles, are not.
    tolerance = 1e-5 if provider.startswith(OURS) else 1e-5 * max(1, seq / 1024)
    given = TABLES[case][provider].on(problem, "rollout") | {"tolerance": tolerance}
    checked = "float64" if whole else "sum of the row"
    measure(**given, suite="scaling", provider=provider, case=case, checked=checked)
