"""Faithfulness of a cohort's attributions: PyHealth's `evaluate_attribution` in its loader's loop, and ours."""

import contextlib
import copy
import io
import itertools
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

from bench.machine import host
from rollout.bench import end_to_end
from rollout.bench.end_to_end import STOCK
from rollout.bench.measure import OURS

pytest.importorskip("pyhealth", reason="PyHealth is not installed: pip install 'attention-rollout[pyhealth]'")

from pyhealth.interpret import methods
from pyhealth.metrics.interpretability import evaluate_attribution as stock_evaluate

from rollout import evaluate_cohort
from rollout.evaluate.sets import pyhealth_kept_entries
from rollout.pyhealth import AttentionRollout, evaluate_attribution

BATCH = 32
SIZES = {"E64 H2 L2": (64, 2, 2), "E128 H8 L4": (128, 8, 4)}
CASES = ("log-normal, unsorted", "log-normal, sorted")
QUICK = ("E64 H2 L2", CASES[1], 4)
TIES = 0.05  # of a mean, where each side ranks by its own attributions: rounding decides between equal codes
SHARES = (1, 5, 10, 20, 50)
METRICS = ("comprehensiveness", "sufficiency")


def everybody(probability: Tensor, kind: str) -> Tensor:
    """Each sample counts, so that both sides ablate each."""
    return torch.ones_like(probability, dtype=torch.long)


class Given:
    """Attributions made beforehand, batch by batch."""

    def __init__(self, attributions: list[dict[str, Tensor]]) -> None:
        self.turns = itertools.cycle(attributions)

    def attribute(self, **batch: Any) -> dict[str, Tensor]:
        return next(self.turns)


@cache
def prepared(size: str, case: str, batch: int) -> tuple[Any, end_to_end.Batches, list[dict[str, Tensor]], Tensor]:
    """Model, batches, their attributions, and the two means for these in float64."""
    embedding, heads, layers = SIZES[size]
    model = end_to_end.make_model(heads, layers, host.DEVICE, embedding=embedding)
    data = two_and_two(end_to_end.make_batches(case, batch // 2, host.DEVICE))
    with torch.inference_mode(False):
        attributions = [AttentionRollout(model).attribute(**each) for each in data]
    wide, drops = copy.deepcopy(model).double(), []
    for each, scores in zip(data, attributions, strict=True):
        kept = pyhealth_kept_entries(scores["codes"], each["codes"], SHARES).flatten(0, 1)
        whole, *after = (probability(wide, each["codes"] * keep) for keep in (torch.ones_like(kept[0]), *kept))
        drops.append((whole - torch.stack(after)).view(2, len(SHARES), -1).mean(1))
    return model, data, attributions, torch.cat(drops, 1).mean(1)


def two_and_two(data: end_to_end.Batches) -> end_to_end.Batches:
    """Batches of twice the size, half the records: PyHealth's side takes long."""
    pairs = list(itertools.batched(data, 2))
    ids = [[record[record != 0] for each in pair for record in each["codes"]] for pair in pairs]
    labels = [torch.cat([each["label"] for each in pair]) for pair in pairs]
    return [
        {"codes": torch.nn.utils.rnn.pad_sequence(records, batch_first=True), "label": label}
        for records, label in zip(ids, labels, strict=True)
    ]


def probability(model: Any, ids: Tensor) -> Tensor:
    """Of class 1, one version of a batch at a time. PyHealth's `evaluate_attribution` is float32 only."""
    with torch.no_grad():
        found: Tensor = model(codes=ids)["y_prob"][:, 0]
    return found


def by(evaluate: Callable[..., dict[str, float]], model: Any, data: end_to_end.Batches, method: Any) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad(), contextlib.redirect_stdout(io.StringIO()):
        found = evaluate(model, data, method, sample_filter=everybody)
    end_to_end.drop_maps(model)
    return torch.tensor([found[name] for name in METRICS], dtype=torch.float64)


@pytest.mark.parametrize("provider", [STOCK, OURS])
@pytest.mark.parametrize("part", ["given attributions", "whole"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", SIZES)
def test_evaluate(size: str, case: str, part: str, provider: str, measure: Callable[..., None], quick: bool) -> None:
    if quick and (size, case) != QUICK[:2]:
        pytest.skip("left out of the quick run")
    batch = QUICK[2] if quick else BATCH
    model, data, attributions, exact = prepared(size, case, batch)
    evaluate = stock_evaluate if provider == STOCK else evaluate_attribution
    interpreter = (methods.AttentionRollout if provider == STOCK else AttentionRollout)(model)
    method = Given(attributions) if part.startswith("given") else interpreter
    measure(
        partial(by, evaluate, model, data, method),
        reference=exact,
        tolerance=1e-5 if part.startswith("given") else TIES,
        suite="evaluation",
        provider=provider,
        case=f"{part}, {case}, {size}",
        samples=sum(len(each["codes"]) for each in data),
        shape={"B": batch, "S": max(each["codes"].shape[1] for each in data)},
        dtype="float32",
    )


class Samples:
    """The records of some batches, one by one, as a dataset."""

    def __init__(self, dataset: Any, data: end_to_end.Batches) -> None:
        self.input_processors, self.output_schema = dataset.input_processors, dataset.output_schema
        self.records = [
            (ids[ids != 0], label) for each in data for ids, label in zip(each["codes"], each["label"], strict=True)
        ]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> dict[str, Any]:
        ids, label = self.records[number]
        return {"patient_id": f"p{number}", "codes": ids.cpu(), "label": label.cpu()}


def four_of_pyhealth(model: Any, data: end_to_end.Batches) -> Tensor:
    chosen = (methods.AttentionRollout, methods.CheferRelevance, methods.GIM, methods.RandomBaseline)
    return torch.stack([by(stock_evaluate, model, data, method(model)) for method in chosen])[:2]


def four_of_ours(model: Any, samples: Samples, batch: int) -> Tensor:
    """Rollout, Chefer, PyHealth's own GIM and the random ranking, in one stack."""
    options = {"metric": "pyhealth", "threshold": 0.0, "batch_samples": batch, "batch_tokens": 2**20, "progress": False}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False), torch.enable_grad():
        named = {"rollout": "pyhealth", "chefer": "chefer", "gim": methods.GIM(model)}
        evaluate_cohort(model, samples, Path(folder) / "out", methods=named, **options)
        rows = pl.read_parquet(Path(folder) / "out" / "faithfulness" / "*.parquet")
    means = rows.group_by("method", "direction").agg(pl.col("drop").cast(pl.Float64).mean())
    found = {(method, direction): drop for method, direction, drop in means.rows()}
    drops = [[found[method, direction] for direction in ("without", "only")] for method in ("rollout", "chefer")]
    return torch.tensor(drops, dtype=torch.float64)


@pytest.mark.parametrize("provider", [STOCK, OURS])
@pytest.mark.parametrize("size", SIZES)
def test_four_methods(size: str, provider: str, measure: Callable[..., None], quick: bool) -> None:
    """Sorted, so that the batches of a cohort are those of the loader."""
    if quick and size != QUICK[0]:
        pytest.skip("left out of the quick run")
    batch = QUICK[2] if quick else BATCH
    model, data, _, exact = prepared(size, CASES[1], batch)
    samples = Samples(model.dataset, data)
    run = partial(four_of_pyhealth, model, data) if provider == STOCK else partial(four_of_ours, model, samples, batch)
    measure(
        run,
        reference=exact,
        part=lambda found: found[0],
        tolerance=TIES,
        suite="evaluation",
        provider=provider,
        case=f"four methods, {CASES[1]}, {size}",
        samples=len(samples),
        shape={"B": batch, "S": max(each["codes"].shape[1] for each in data)},
        dtype="float32",
    )
