"""Of `rollout bench --pyhealth`: patients a second by PyHealth's interpreter and by ours, same model, same batches."""

import copy
import io
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollout.bench.measure import OURS, Row, Runs, Settings, compare
from rollout.errors import require

STOCK = "PyHealth's"
ALLOWED = 1e-5  # max|err| / max|ref| against PyHealth's own in float64
VOCABULARY, EMBEDDING = 1000, 128
MEDIAN, SPREAD, LONGEST, BATCHES = 50, 0.86, 500, 4  # of the log-normal lengths, the shape of MIMIC-IV's
CASES = ("S=256", "log-normal lengths")

Batches = list[dict[str, Any]]


def check(settings: Settings) -> None:
    """Refuse what cannot be run, before anything is.

    Raises:
        ImportError: PyHealth is not installed.
        ValueError: H does not divide the model's width.
    """
    if EMBEDDING % settings.heads:
        raise ValueError(f"bench: with PyHealth heads must divide the model's width {EMBEDDING}, got {settings.heads}")
    require("pyhealth", "pyhealth")


def patients(settings: Settings) -> Iterator[Row]:
    """A row for each of `CASES`: PyHealth's Transformer of L layers and H heads with random weights, batches of B."""
    model = _model(settings)
    for case in CASES:
        yield _compare(model, settings, case)


def _model(settings: Settings) -> Any:
    from pyhealth.datasets import create_sample_dataset
    from pyhealth.models import Transformer

    codes = [f"c{i}" for i in range(VOCABULARY)]
    samples = [{"patient_id": f"p{i}", "visit_id": "v", "codes": codes, "label": i} for i in range(2)]
    with redirect_stdout(io.StringIO()):  # it prints the vocabulary of the label
        dataset = create_sample_dataset(samples, {"codes": "sequence"}, {"label": "binary"}, dataset_name="bench")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Transformer(dataset, embedding_dim=EMBEDDING, heads=settings.heads, num_layers=settings.layers)
    return model.to(settings.target).eval()


def _compare(model: Any, settings: Settings, case: str) -> Row:
    from pyhealth.interpret.methods import AttentionRollout as Stock

    from rollout.pyhealth import AttentionRollout

    lengths = _lengths(case, settings.batch)
    batches = [_batch(each, number, settings.target) for number, each in enumerate(lengths)]
    exact = Stock(copy.deepcopy(model).double())
    reference = _attribute(exact, [{**batch, "label": batch["label"].double()} for batch in batches])
    by_stock, by_us = Stock(model), AttentionRollout(model)
    runs: Runs = {STOCK: lambda: _attribute(by_stock, batches), OURS: lambda: _attribute(by_us, batches)}
    row = Row("patients", case, {}, {}, {}, patients=sum(len(each) for each in lengths))
    try:
        return compare(row, runs, reference, dict.fromkeys(runs, ALLOWED), settings.seconds, settings.target)
    finally:
        for module in model.modules():
            if hasattr(module, "attn_map"):  # PyHealth's interpreter leaves its maps behind
                module.attn_map = None


def _lengths(case: str, batch: int) -> list[list[int]]:
    """The lengths of the records, batch by batch, in no order."""
    if case.startswith("S="):
        return [[int(case.removeprefix("S="))] * batch]
    drawn = np.exp(np.random.default_rng(0).normal(np.log(MEDIAN), SPREAD, (BATCHES, batch)))
    lengths: list[list[int]] = drawn.round().clip(1, LONGEST).astype(int).tolist()
    return lengths


def _batch(lengths: Sequence[int], seed: int, device: torch.device) -> dict[str, Any]:
    """Random codes, 0 where a record has ended."""
    longest = max(lengths)
    ids = torch.randint(2, VOCABULARY, (len(lengths), longest), generator=torch.Generator().manual_seed(seed))
    ids *= torch.arange(longest) < torch.tensor(lengths)[:, None]
    return {"codes": ids.to(device), "label": torch.zeros(len(lengths), 1, device=device)}


def _attribute(interpreter: Any, batches: Batches) -> Tensor:
    """The attributions of every batch, in one vector. PyHealth's needs gradients."""
    with torch.enable_grad():
        return torch.cat([interpreter.attribute(**batch)["codes"].detach().flatten() for batch in batches])
