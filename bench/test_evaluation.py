"""Faithfulness of a cohort's attributions: PyHealth's `evaluate_attribution` in its loader's loop, and ours."""

import contextlib
import copy
import io
import itertools
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from bench.machine import host
from bench.records import batches_of, time_call
from rollout.bench import end_to_end
from rollout.bench.end_to_end import STOCK
from rollout.bench.measure import OURS

pytest.importorskip("pyhealth", reason="PyHealth is not installed: pip install 'attention-rollout[pyhealth]'")

from pyhealth.interpret import methods
from pyhealth.metrics.interpretability import evaluate_attribution as stock_evaluate

from rollout import evaluate_cohort
from rollout.evaluate.sets import pyhealth_kept_entries
from rollout.pyhealth import AttentionRollout, evaluate_attribution

BATCH, QUICK_BATCH = 32, 4
LONGEST = 1000
SMALL, LARGE = "E64 H2 L2", "E128 H8 L4"
SIZES = {SMALL: (64, 2, 2), LARGE: (128, 8, 4)}
UNSORTED, SORTED = "log-normal, unsorted", "log-normal, sorted"
GIVEN, WHOLE = "given attributions", "whole"
# PyHealth's side takes minutes at the large size: only the whole of it in the loader's order.
CASES = [*itertools.product([SMALL], [UNSORTED, SORTED], [GIVEN, WHOLE]), (LARGE, UNSORTED, WHOLE)]
TIES = 0.1  # of a mean, where each side ranks by its own attributions: rounding decides between equal codes
SHARES = (1, 5, 10, 20, 50)


def everybody(probability: Tensor, kind: str) -> Tensor:
    """Each sample counts, so that both sides ablate each."""
    return torch.ones_like(probability, dtype=torch.long)


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
    lengths = np.sort(drawn) if case == SORTED else drawn
    codes = torch.Generator().manual_seed(0)
    records = [torch.randint(2, end_to_end.VOCABULARY, (int(length),), generator=codes) for length in lengths]
    return batches_of(records, batch)


@torch.no_grad()
def probability(model: Any, ids: Tensor) -> Tensor:
    """Of class 1, one version of a batch at a time. PyHealth's `evaluate_attribution` is float32 only."""
    return model(codes=ids)["y_prob"][:, 0]


def by(evaluate: Callable[..., dict[str, float]], model: Any, data: end_to_end.Batches, method: Any) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad(), contextlib.redirect_stdout(io.StringIO()):
        found = evaluate(model, data, method, sample_filter=everybody)
    end_to_end.drop_maps(model)
    return torch.tensor([found["comprehensiveness"], found["sufficiency"]], dtype=torch.float64)


@pytest.mark.parametrize("provider", [STOCK, OURS])
@pytest.mark.parametrize(("size", "case", "part"), CASES)
def test_evaluate(size: str, case: str, part: str, provider: str, measure: Callable[..., None], quick: bool) -> None:
    if quick and (size, case) != (SMALL, SORTED):
        pytest.skip("left out of the quick run")
    model, data, attributions, exact = prepared(size, case, QUICK_BATCH if quick else BATCH)
    sides = {STOCK: (stock_evaluate, methods.AttentionRollout), OURS: (evaluate_attribution, AttentionRollout)}
    evaluate, kind = sides[provider]
    turns = itertools.cycle(attributions)
    given = SimpleNamespace(attribute=lambda **batch: next(turns))
    run = partial(by, evaluate, model, data, given if part == GIVEN else kind(model))
    info = {"suite": "evaluation", "provider": provider, "case": f"{part}, {case}, {size}"}
    time_call(measure, run, data, {}, reference=exact, tolerance=1e-5 if part == GIVEN else TIES, **info)


class Samples(list[dict[str, Any]]):
    """The records of some batches, one by one, as a dataset."""

    def __init__(self, model: Any, data: end_to_end.Batches) -> None:
        records = [ids[ids != 0].cpu() for each in data for ids in each["codes"]]
        super().__init__({"patient_id": str(n), "codes": ids, "label": torch.zeros(1)} for n, ids in enumerate(records))
        self.input_processors, self.output_schema = model.dataset.input_processors, model.dataset.output_schema


def several_of_pyhealth(model: Any, data: end_to_end.Batches) -> Tensor:
    """Rollout, Chefer and the random ranking, one after another; the two means of the first."""
    chosen = (methods.AttentionRollout, methods.CheferRelevance, methods.RandomBaseline)
    first, *_ = [by(stock_evaluate, model, data, method(model)) for method in chosen]
    return first


def several_of_ours(model: Any, samples: Samples) -> Tensor:
    """The same in one stack, with the writing of their rows."""
    options = {"metric": "pyhealth", "threshold": 0.0, "batch_samples": len(samples) // 2, "batch_tokens": 2**20}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False), torch.enable_grad():
        out = Path(folder) / "out"
        evaluate_cohort(model, samples, out, methods=["pyhealth", "chefer"], progress=False, **options)
        rows = pl.read_parquet(out / "faithfulness" / "*.parquet")
    rollout = rows.filter(pl.col("method") == "pyhealth")
    means = dict(rollout.group_by("direction").agg(pl.col("drop").cast(pl.Float64).mean()).iter_rows())
    return torch.tensor([means["without"], means["only"]], dtype=torch.float64)


@pytest.mark.parametrize("provider", [STOCK, OURS])
def test_three_methods(provider: str, measure: Callable[..., None], quick: bool) -> None:
    """Sorted, so that the batches of a cohort are those of the loader."""
    model, data, _, exact = prepared(SMALL, SORTED, QUICK_BATCH if quick else BATCH)
    theirs, ours = partial(several_of_pyhealth, model, data), partial(several_of_ours, model, Samples(model, data))
    run = theirs if provider == STOCK else ours
    info = {"suite": "evaluation", "provider": provider, "case": f"three methods, {SORTED}, {SMALL}"}
    time_call(measure, run, data, {}, reference=exact, tolerance=TIES, **info)
