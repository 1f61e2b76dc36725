"""Evaluations of a cohort as frames: written out by hand, or drawn at random with what is true of them known."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Method → probability without the top shares, and with them only."""


def written(
    samples: Sequence[tuple[str | None, float, Curves]],
    shares: Sequence[float] = (10.0, 50.0),
    **columns: Sequence[Any],
) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    """Rows and predictions of samples 0, 1, …: (patient, probability of the whole record, curves).

    Args:
        samples: The samples.
        shares: Percent, of the curves.
        **columns: Of the predictions, beside those that are plain.
    """
    rows = [
        {"sample": number, "method": method, "direction": direction, "share": share, "codes": 20,
         "probability": after, "drop": whole - after}
        for number, (_, whole, curves) in enumerate(samples)
        for method, both in curves.items()
        for direction, values in zip(("without", "only"), both, strict=True)
        for share, after in zip(shares, values, strict=True)
    ]  # fmt: skip
    whole = [one[1] for one in samples]
    plain: dict[str, Sequence[Any]] = {
        "sample": range(len(samples)), "patient_id": [one[0] for one in samples],
        "visit_id": [None] * len(samples), "y_prob": [[value] for value in whole],
        "y_true": [[float(number % 2)] for number in range(len(samples))],
        "target": [int(value >= 0.5) for value in whole], "probability": whole, "codes": [20] * len(samples),
        "evaluated": [True] * len(samples),
    }  # fmt: skip
    return pl.LazyFrame(rows, schema=ROWS), pl.LazyFrame({**plain, **columns}, schema=PREDICTIONS)


ROWS = {"sample": pl.Int64, "method": pl.String, "direction": pl.String, "share": pl.Float32, "codes": pl.Int32,
        "probability": pl.Float32, "drop": pl.Float32}  # fmt: skip
PREDICTIONS = {
    "sample": pl.Int64, "patient_id": pl.String, "visit_id": pl.String, "y_prob": pl.List(pl.Float32),
    "y_true": pl.List(pl.Float32), "target": pl.Int32, "probability": pl.Float32, "codes": pl.Int32,
    "evaluated": pl.Boolean,
}  # fmt: skip
SCORES = {"sample": pl.Int64, "method": pl.String, "recall": pl.Float32, "planted_auc": pl.Float32,
          "leave_one_out": pl.Float32}  # fmt: skip


def drawn(
    effects: Mapping[str, float], samples: int = 120, patients: int = 40, seed: int = 0, spread: float = 0.05
) -> tuple[pl.LazyFrame, pl.LazyFrame, pl.LazyFrame]:
    """Rows, predictions and scores: each method's comprehensiveness is above random's by its effect, its sufficiency
    below by it, and its recall above by twice it, each up to noise of which half is a patient's own."""
    rng = np.random.default_rng(seed)
    patient = np.append(np.arange(patients), rng.integers(0, patients, samples))[:samples]
    whole = rng.uniform(0.4, 0.95, samples)
    found: list[tuple[str, float, dict[str, Any]]] = [
        (f"p{p}", float(w), {}) for p, w in zip(patient, whole, strict=True)
    ]
    scores = []
    for method, effect in effects.items():
        own = rng.normal(0, spread, patients)[patient]
        for number, (_, before, curves) in enumerate(found):
            noise = own[number] + rng.normal(0, spread, 4)
            without = before - np.array([0.1, 0.2]) - effect - noise[:2]
            only = before - np.array([0.2, 0.1]) + effect + noise[2:]
            curves[method] = (without.clip(0.01, 0.99).tolist(), only.clip(0.01, 0.99).tolist())
            recall = 0.2 + 2 * effect + rng.normal(0, spread) if number % 3 else None
            scores.append((number, method, recall, recall, None))
    rows, predictions = written(found, codes=rng.integers(1, 400, samples))
    return rows, predictions, pl.LazyFrame(scores, schema=SCORES, orient="row")
