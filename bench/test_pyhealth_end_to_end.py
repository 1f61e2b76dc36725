"""PyHealth's Transformer from batch to attributions: PyHealth's interpreter, ours, and the model's plain forward."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import rollout
from bench.machine import host

pytest.importorskip("pyhealth", reason="PyHealth is not installed: pip install 'attention-rollout[pyhealth]'")

from pyhealth.datasets import create_sample_dataset
from pyhealth.interpret.methods import AttentionRollout as PyHealthRollout
from pyhealth.models import Transformer
from pyhealth.models.transformer import Attention

from rollout.pyhealth import AttentionRollout

BATCH, HEADS, LAYERS, EMBEDDING, VOCABULARY = 32, 8, 4, 128, 1000
MEDIAN, SPREAD, LONGEST = 50, 0.86, 500  # of the log-normal lengths
CASES = ("S=64", "S=256", "S=512", "lengths 256-512", "log-normal, sorted", "log-normal, unsorted")
QUICK = ("S=64", "log-normal, unsorted")
Batches = list[dict[str, Any]]


@cache
def model() -> Any:
    """A Transformer of one stream of codes, with random weights."""
    codes = [f"c{i}" for i in range(VOCABULARY)]
    samples = [{"patient_id": f"p{i}", "visit_id": "v", "codes": codes, "label": i} for i in range(2)]
    dataset = create_sample_dataset(samples, {"codes": "sequence"}, {"label": "binary"}, dataset_name="bench")
    torch.manual_seed(0)
    return Transformer(dataset, embedding_dim=EMBEDDING, heads=HEADS, num_layers=LAYERS).eval().to(host.DEVICE)


def lengths(case: str, quick: bool) -> list[list[int]]:
    """The lengths of the samples of each batch."""
    generator = np.random.default_rng(0)
    if case.startswith("S="):
        return [[int(case[2:])] * BATCH]
    if case == "lengths 256-512":
        return [generator.integers(256, 513, BATCH).tolist()]
    drawn = np.exp(generator.normal(np.log(MEDIAN), SPREAD, BATCH * (1 if quick else 4))).round()
    drawn = drawn.clip(1, LONGEST).astype(int)
    drawn = np.sort(drawn) if case == "log-normal, sorted" else drawn
    return drawn.reshape(-1, BATCH).tolist()


@cache
def batches(case: str, quick: bool) -> Batches:
    generator = torch.Generator().manual_seed(1)
    made = []
    for each in lengths(case, quick):
        ids = torch.randint(2, VOCABULARY, (len(each), max(each)), generator=generator)
        ids *= torch.arange(max(each)) < torch.tensor(each)[:, None]
        made.append({"codes": ids.to(host.DEVICE), "label": torch.zeros(len(each), 1, device=host.DEVICE)})
    return made


@cache
def reference(case: str, quick: bool) -> Tensor:
    """PyHealth's own in float64, sample by sample at its own length: row 0 does not depend on padding."""
    exact = PyHealthRollout(copy.deepcopy(model()).double())
    label = torch.zeros(1, 1, dtype=torch.float64, device=host.DEVICE)
    rows = []
    for data in batches(case, quick):
        for sample in data["codes"]:
            ids = sample[sample != 0][None]
            row = exact.attribute(codes=ids, label=label)["codes"].detach()
            rows.append(functional.pad(row[0], (0, len(sample) - ids.shape[1])))
    return torch.cat(rows)


def by(interpreter: Any, data: Batches) -> Tensor:
    """The attributions of every batch, in one vector."""
    with torch.inference_mode(False), torch.enable_grad():  # PyHealth's needs gradients
        return torch.cat([interpreter.attribute(**batch)["codes"].detach().flatten() for batch in data])


def plain_forward(data: Batches) -> Tensor:
    """The model's predictions alone, as cheaply as PyHealth makes them. Not a rollout."""
    with torch.inference_mode():
        return torch.cat([model()(**batch)["logit"] for batch in data])


@pytest.mark.parametrize("provider", ["PyHealth", "ours", "plain forward"])
@pytest.mark.parametrize("case", CASES)
def test_attribute(case: str, provider: str, measure: Callable[..., None], quick: bool) -> None:
    if quick and case not in QUICK:
        pytest.skip("left out of the quick run")
    data = batches(case, quick)
    interpreter = {"PyHealth": PyHealthRollout, "ours": AttentionRollout}.get(provider)
    checked: dict[str, Any] = {}
    if interpreter is None:

        def run() -> Tensor:
            return plain_forward(data)
    else:
        subject = interpreter(model())
        checked = {"reference": reference(case, quick), "tolerance": 1e-5}

        def run() -> Tensor:
            return by(subject, data)

    measure(
        run,
        **checked,
        suite="PyHealth end to end",
        provider=provider,
        case=case,
        patients=sum(len(batch["codes"]) for batch in data),
        shape={"B": BATCH, "H": HEADS, "S": max(b["codes"].shape[1] for b in data), "L": LAYERS, "E": EMBEDDING},
        dtype="float32",
    )
    for module in model().modules():
        if hasattr(module, "attn_map"):  # PyHealth's interpreter leaves its maps behind
            module.attn_map = None


@contextmanager
def fused() -> Iterator[None]:
    """The model on fused attention and nothing else, what recording is measured against; right without padding only."""

    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Any = None, dropout: Any = None) -> Any:
        return functional.scaled_dot_product_attention(query, key, value), query.new_empty(0)

    sites = [module for module in model().modules() if isinstance(module, Attention)]
    try:
        for site in sites:
            site.forward = forward
        yield
    finally:
        for site in sites:
            del site.forward


@pytest.mark.parametrize("provider", ["fused forward", "capture", "capture and rollout"])
def test_overhead(provider: str, measure: Callable[..., None], quick: bool) -> None:
    """What `rollout.capture` adds to the same model on fused attention; the check is on its logits."""
    seq = 64 if quick else 256
    data = batches(f"S={seq}", quick)

    def run() -> Tensor:
        if provider == "fused forward":
            with fused():
                return plain_forward(data)
        with rollout.capture(model()) as tape:
            logits = plain_forward(data)
        if provider == "capture and rollout":
            tape.rollout(query=0, method="pyhealth", backend="torch")
        return logits

    measure(
        run,
        reference=plain_forward(data).double(),
        tolerance=1e-5,
        suite="overhead of capture, PyHealth",
        provider=provider,
        patients=BATCH,
        shape={"B": BATCH, "H": HEADS, "S": seq, "L": LAYERS, "E": EMBEDDING},
        dtype="float32",
    )
