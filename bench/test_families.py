"""Batch to relevance, one model of each family: as its users compute it, ours, and the model's forward
alone on the attention it comes with."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from bench.providers import families
from bench.providers.chains import OURS

PLAIN = "plain forward"


@cache
def reference(name: str, quick: bool) -> Tensor:
    with torch.no_grad():
        return families.make(name, quick).exact()


@pytest.mark.parametrize("who", ["theirs", OURS, PLAIN])
@pytest.mark.parametrize("name", families.LIBRARIES)
def test_family(name: str, who: str, measure: Callable[..., None], quick: bool) -> None:
    if (problem := families.missing(name)) is not None:
        pytest.skip(problem)
    subject = families.make(name, quick)
    call = {"theirs": subject.theirs, OURS: subject.ours, PLAIN: subject.forward}[who]

    def run() -> Tensor:
        with torch.inference_mode():
            return call()

    measure(
        run,
        reference=None if who == PLAIN else reference(name, quick),
        tolerance=1e-5,
        suite="model families",
        provider=subject.peer if who == "theirs" else who,
        case=name,
        samples=subject.shape["B"],
        shape=subject.shape,
        dtype="float32",
    )
