"""PyHealth's Transformer from batch to attributions: PyHealth's interpreter, ours, and the model's forward alone."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
from torch import Tensor

from bench.machine import host
from rollout.bench import end_to_end
from rollout.bench.end_to_end import EMBEDDING, FUSED, STOCK
from rollout.bench.measure import OURS

pytest.importorskip("pyhealth", reason="PyHealth is not installed: pip install 'attention-rollout[pyhealth]'")

from pyhealth.interpret.methods import AttentionRollout as PyHealthRollout

from rollout.pyhealth import AttentionRollout

BATCH, HEADS, LAYERS = 32, 8, 4
CASES = ("S=64", "S=256", "S=512", "lengths 256-512", "log-normal, sorted", "log-normal, unsorted")
QUICK, QUICK_BATCH = ("S=64", "log-normal, unsorted"), 8
FORWARDS = {FUSED: end_to_end.fused_forward, "plain forward": end_to_end.plain_forward}


@cache
def model() -> Any:
    return end_to_end.make_model(HEADS, LAYERS, host.DEVICE)


@cache
def exact(case: str, batch: int, forward: bool) -> Tensor:
    """PyHealth's attributions in float64, and of a forward the model's own logits."""
    data = end_to_end.make_batches(case, batch, host.DEVICE)
    return end_to_end.plain_forward(model(), data).double() if forward else end_to_end.exact(model(), data)


@pytest.mark.parametrize("provider", [STOCK, OURS, *FORWARDS])
@pytest.mark.parametrize("case", CASES)
def test_attribute(case: str, provider: str, measure: Callable[..., None], quick: bool) -> None:
    if quick and case not in QUICK:
        pytest.skip("left out of the quick run")
    batch = QUICK_BATCH if quick else BATCH
    data = end_to_end.make_batches(case, batch, host.DEVICE)
    if provider in FORWARDS:
        run = partial(FORWARDS[provider], model(), data)
    else:
        interpreter = (PyHealthRollout if provider == STOCK else AttentionRollout)(model())
        run = partial(end_to_end.attribute, interpreter, data)
    longest = max(each["codes"].shape[1] for each in data)
    measure(
        run,
        reference=exact(case, batch, provider in FORWARDS),
        tolerance=1e-5,
        suite="PyHealth end to end",
        provider=provider,
        case=case,
        samples=sum(len(each["codes"]) for each in data),
        shape={"B": batch, "H": HEADS, "S": longest, "L": LAYERS, "E": EMBEDDING},
        dtype="float32",
    )
    end_to_end.drop_maps(model())
