"""Batch to relevance, one model of each family: as its users compute it, ours, and the model's forward alone.

And of BERT-base's shape: tokens to relevance, and what capture adds to a forward on fused attention.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

import rollout
from bench.providers import families
from bench.providers.families import BERT_BASE, BERT_SMALL, FAMILIES, Family
from rollout.bench.measure import OURS

THEIRS, PLAIN = "theirs", "plain forward"


@cache
def exact(subject: Family) -> Tensor:
    with torch.no_grad():
        return subject.exact()


def time_family(measure: Callable[..., None], subject: Family, who: str, **info: object) -> None:
    run = {THEIRS: subject.theirs, OURS: subject.ours, PLAIN: subject.forward}[who]
    provider, reference = subject.peer if who == THEIRS else who, None if who == PLAIN else exact(subject)
    measure(run, reference=reference, tolerance=1e-5, provider=provider, shape=subject.shape, **info)


@pytest.mark.parametrize("who", [THEIRS, OURS, PLAIN])
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, who: str, measure: Callable[..., None], quick: bool) -> None:
    subject = families.make(name, quick)
    if subject is None:
        pytest.skip(f"{FAMILIES[name][1]} is not installed")
    time_family(measure, subject, who, suite="model families", case=name, samples=subject.shape["B"])


def bert_base(quick: bool, seq: int) -> Family:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'attention-rollout[hf]'")
    return families.make_bert(*(BERT_SMALL if quick else (BERT_BASE[0], seq, *BERT_BASE[2:])))


@pytest.mark.parametrize("who", [THEIRS, OURS])
def test_bert_base(who: str, measure: Callable[..., None], quick: bool) -> None:
    """Tokens in, relevance of the first position's row out."""
    time_family(measure, bert_base(quick, BERT_BASE[1]), who, suite="BERT-base from tokens")


@pytest.mark.parametrize("provider", [PLAIN, "capture", "capture and rollout"])
@pytest.mark.parametrize("case", ["BERT-base", "PyHealth Transformer"])
def test_overhead(case: str, provider: str, measure: Callable[..., None], quick: bool) -> None:
    """What recording adds to the forward pass as the model runs it, S=256; the check is on the model's output."""
    subject = bert_base(quick, 256) if case == "BERT-base" else families.make(case, quick)
    if subject is None:
        pytest.skip("PyHealth is not installed")

    def run() -> Tensor:
        if provider == PLAIN:
            return subject.forward()
        with rollout.capture(subject.model) as tape:
            output = subject.forward()
        if provider == "capture and rollout":
            tape.rollout(0, backend="torch")
        return output

    with torch.inference_mode():
        output = subject.forward().double()
    info = {"suite": "overhead of capture", "provider": provider, "case": case}
    measure(run, reference=output, tolerance=1e-5, shape=subject.shape, **info)
