"""Cohorts to evaluate: PyHealth's small one, and one without PyHealth, asked by `predict`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

import rollout
from rollout.cohort.summary import CohortRun
from tests.support.toy_cohort import VOCABULARIES, Attention, Records, collate, explain

KINDS = ("faithfulness", "scores", "predictions", "failures")


def predict(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The toy model's probability, its lengths counted from the codes."""
    lengths = {"codes": (batch["codes"] != 0).sum(1).clamp(min=1), "labs": batch["lengths"]["labs"]}
    found = explain(model, {**batch, "lengths": lengths}).y_prob
    assert found is not None
    return found


def toy_scores(model: Any, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Rollout's scores of the codes; the labs have none."""
    return {"codes": explain(model, batch).relevance["codes"]}


def evaluate_toy(out: Path, count: int = 90, **settings: Any) -> CohortRun:
    """Small parts and batches, so that there are many."""
    chosen: dict[str, Any] = {
        "model": Attention(), "dataset": Records(count), "collate": collate, "vocabularies": VOCABULARIES,
        "predict": predict, "methods": {"rollout": toy_scores}, "part_samples": 20, "batch_tokens": 120,
        "progress": False, **settings,
    }  # fmt: skip
    model, dataset = chosen.pop("model"), chosen.pop("dataset")
    return rollout.evaluate_cohort(model, dataset, out, **chosen)


def table(out: Path, kind: str = "faithfulness") -> pl.DataFrame:
    """Everything written of a kind, in order."""
    return pl.read_parquet(out / kind / "*.parquet")


def assert_same_evaluation(left: Path, right: Path) -> None:
    """The same rows in the same order, bit for bit."""
    for kind in KINDS:
        found = [list((out / kind).glob("*.parquet")) for out in (left, right)]
        assert bool(found[0]) == bool(found[1]), kind
        if found[0]:
            assert table(left, kind).equals(table(right, kind), null_equal=True), kind


def mean_drop(out: Path, method: str, direction: str) -> float:
    """Over the evaluated samples of the shares' mean."""
    rows = table(out).filter((pl.col("method") == method) & (pl.col("direction") == direction))
    return float(rows["drop"].cast(pl.Float64).mean() or torch.nan)
