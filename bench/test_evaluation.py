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

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
LARGE = "E128 H8 L4"
LONGEST = 1000
SIZES = {"E64 H2 L2": (64, 2, 2), LARGE: (128, 8, 4)}
CASES = ("log-normal, unsorted", "log-normal, sorted")
QUICK = ("E64 H2 L2", CASES[1], 4)
TIES = 0.1  # of a mean, where each side ranks by its own attributions: rounding decides between equal codes
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
    data = make_batches(case, batch)
    with torch.inference_mode(False):
        attributions = [AttentionRollout(model).attribute(**each) for each in data]
    wide, drops = copy.deepcopy(model).double(), []
    for each, scores in zip(data, attributions, strict=True):
        kept = pyhealth_kept_entries(scores["codes"], each["codes"], SHARES).flatten(0, 1)
        whole, *after = (probability(wide, each["codes"] * keep) for keep in (torch.ones_like(kept[0]), *kept))
        drops.append((whole - torch.stack(after)).view(2, len(SHARES), -1).mean(1))
    return model, data, attributions, torch.cat(drops, 1).mean(1)


def make_batches(case: str, batch: int) -> end_to_end.Batches:
    """Two batches of random codes, their lengths log-normal with a median of 60 and one in a hundred past 600."""
    generator = np.random.default_rng(0)
    drawn = np.exp(generator.normal(np.log(60), np.log(10) / 2.326, 2 * batch)).round().clip(1, LONGEST).astype(int)
    lengths = np.sort(drawn) if case.endswith(" sorted") else drawn
    codes = torch.Generator().manual_seed(0)
    records = [torch.randint(2, end_to_end.VOCABULARY, (int(length),), generator=codes) for length in lengths]
    return [
        {"codes": pad_sequence(part, batch_first=True).to(host.DEVICE), "label": torch.zeros(len(part), 1)}
        for part in (records[:batch], records[batch:])
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
    if size == LARGE and (part, case) != ("whole", CASES[0]):
        pytest.skip("PyHealth's side takes minutes: only the whole of it in the loader's order")
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


def several_of_pyhealth(model: Any, data: end_to_end.Batches) -> Tensor:
    chosen = (methods.AttentionRollout, methods.CheferRelevance, methods.RandomBaseline)
    return torch.stack([by(stock_evaluate, model, data, method(model)) for method in chosen])[:2]


def several_of_ours(model: Any, samples: Samples, batch: int) -> Tensor:
    """Rollout, Chefer and the random ranking, in one stack, with the writing of their rows."""
    options = {"metric": "pyhealth", "threshold": 0.0, "batch_samples": batch, "batch_tokens": 2**20, "progress": False}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False), torch.enable_grad():
        evaluate_cohort(model, samples, Path(folder) / "out", methods=["pyhealth", "chefer"], **options)
        rows = pl.read_parquet(Path(folder) / "out" / "faithfulness" / "*.parquet")
    means = rows.group_by("method", "direction").agg(pl.col("drop").cast(pl.Float64).mean())
    found = {(method, direction): drop for method, direction, drop in means.rows()}
    drops = [[found[method, direction] for direction in ("without", "only")] for method in ("pyhealth", "chefer")]
    return torch.tensor(drops, dtype=torch.float64)


@pytest.mark.parametrize("provider", [STOCK, OURS])
def test_three_methods(provider: str, measure: Callable[..., None], quick: bool) -> None:
    """Sorted, so that the batches of a cohort are those of the loader."""
    size = QUICK[0]
    batch = QUICK[2] if quick else BATCH
    model, data, _, exact = prepared(size, CASES[1], batch)
    samples = Samples(model.dataset, data)
    run = (
        partial(several_of_pyhealth, model, data)
        if provider == STOCK
        else partial(several_of_ours, model, samples, batch)
    )
    measure(
        run,
        reference=exact,
        part=lambda found: found[0],
        tolerance=TIES,
        suite="evaluation",
        provider=provider,
        case=f"three methods, {CASES[1]}, {size}",
        samples=len(samples),
        shape={"B": batch, "S": max(each["codes"].shape[1] for each in data)},
        dtype="float32",
    )
