"""The measures of faithfulness, and their tables from sums by patient.

Of a sample, with p the probability of the class followed given the whole record, p(−s) without the top s % of its
codes, p(+s) with them only, and S the shares evaluated:

    comprehensiveness   mean over S of p − p(−s)           higher is better   DeYoung et al. 2020, equation 1
    sufficiency         mean over S of p − p(+s)           lower is better    DeYoung et al. 2020, equation 2
    deletion            area under p(−s), s from 0 to the last share, p at 0     lower is better    Petsiuk et al. 2018
    insertion           area under p(+s), s from the first share to 100, p at 100    higher is better   as deletion
    log_odds            mean over S of ln p(−s) − ln p     lower is better    Shrikumar et al. 2017; Chen et al. 2020
    recall              planted codes among as many top codes                    higher is better
    planted_auc         area of planted codes over the other ones, ties half     higher is better
    leave_one_out       rank correlation with what taking each code out does     higher is better

Areas are by the trapezoid rule over the shares, divided by the range they cover: they are mean probabilities.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import polars as pl

from rollout.intervals import Floats, bootstrap_means, holm, sign_flip_test

OF_ROWS = ("comprehensiveness", "sufficiency", "deletion", "insertion", "log_odds")
OF_SCORES = ("recall", "planted_auc", "leave_one_out")
MEASURES = {
    "comprehensiveness": 1, "sufficiency": -1, "deletion": -1, "insertion": 1, "log_odds": -1,
    "recall": 1, "planted_auc": 1, "leave_one_out": 1,
}  # fmt: skip
"""Measure → whether higher (1) or lower (-1) is better."""
MATTERS = {**dict.fromkeys(MEASURES, 0.05), "log_odds": 0.1}
"""Measure → the least difference that matters: 0.05 of a probability, recall, area or correlation, and 0.1 of ln p."""

BETTER, WORSE = "better", "worse"
NOT_SHOWN, TOO_SMALL = "no difference shown", "cohort too small to tell"
POWER = 0.8
DROP, PROBABILITY, LOG_ODDS = 0, 1, 2
WITHOUT, ONLY = 0, 1


@dataclass(frozen=True)
class Sums:
    """Sums over the samples of each of G patients of a group; M methods, P shares.

    Attributes:
        name: Of the group.
        patients: [G], their numbers, rising.
        samples: [G], samples of each patient.
        whole: [G], of the whole records' probability.
        rows: [G, M, 2, P, 3], by direction (without, only) and share: drop, probability, ln p(−s) − ln p.
        shares: [P], percent.
        scores: `patient` (0 to G − 1), `sample`, `method` and the measures of scores.
        methods: The M names.
    """

    name: str
    patients: np.ndarray
    samples: Floats
    whole: Floats
    rows: Floats
    shares: Floats
    scores: pl.DataFrame
    methods: Sequence[str]

    @classmethod
    def of(
        cls, name: str, whole: pl.DataFrame, scores: pl.DataFrame, methods: Sequence[str], shares: Sequence[float]
    ) -> "Sums":
        """The group of the patients in `whole` (`patient`, `samples`, `whole`), before any row is added."""
        whole = whole.sort("patient")
        patients, sizes = whole["patient"].to_numpy(), whole["samples"].to_numpy().astype(np.float64)
        own = pl.Series("patient", np.searchsorted(patients, scores["patient"].to_numpy()), dtype=pl.Int64)
        cube, scores = np.zeros((len(patients), len(methods), 2, len(shares), 3)), scores.with_columns(own)
        return cls(name, patients, sizes, whole["whole"].to_numpy(), cube, np.asarray(shares), scores, methods)

    def add(self, rows: pl.DataFrame) -> None:
        """Add sums of some samples, a row per patient, method, direction and share."""
        share = {one: place for place, one in enumerate(self.shares.tolist())}
        method = {one: place for place, one in enumerate(self.methods)}
        places = (
            np.searchsorted(self.patients, rows["patient"].to_numpy()),
            rows["method"].replace_strict(method, return_dtype=pl.Int64).to_numpy(),
            (rows["direction"] == "only").cast(pl.Int64).to_numpy(),
            rows["share"].replace_strict(share, return_dtype=pl.Int64).to_numpy(),
        )
        self.rows[places] += rows.select("drop", "probability", "log_odds").to_numpy()

    def measure(self, name: str, method: str) -> tuple[Floats, Floats]:
        """A measure's sum [G] over the samples of each patient, and of how many samples [G]."""
        if name in OF_ROWS:
            return self._of_rows(name, self.methods.index(method)), self.samples
        return self._by_patient(self.scores.filter(pl.col("method") == method), pl.col(name))

    def difference(self, name: str, method: str, to: str) -> tuple[Floats, Floats]:
        """As `measure`, of method − to, over the samples that have the measure of both."""
        if name in OF_ROWS:
            return self.measure(name, method)[0] - self.measure(name, to)[0], self.samples
        mine, other = (
            self.scores.filter(pl.col("method") == one).select("patient", "sample", name) for one in (method, to)
        )
        return self._by_patient(mine.join(other, on="sample"), pl.col(name) - pl.col(f"{name}_right"))

    def curve(self, method: int, direction: int) -> tuple[list[float], Floats, Floats]:
        """Shares with the whole record's, and the sums [G, shares] of drop and of probability."""
        cube, whole = self.rows[:, method, direction], self.whole[:, None]
        shares, drop, after = self.shares.tolist(), cube[..., DROP], cube[..., PROBABILITY]
        if direction == WITHOUT:
            return [0.0, *shares], np.hstack([0 * whole, drop]), np.hstack([whole, after])
        if shares and shares[-1] == 100:
            return shares, drop, after
        return [*shares, 100.0], np.hstack([drop, 0 * whole]), np.hstack([after, whole])

    def _of_rows(self, name: str, method: int) -> Floats:
        if name in ("deletion", "insertion"):
            shares, _, after = self.curve(method, WITHOUT if name == "deletion" else ONLY)
            return after @ area_weights(shares)
        direction = ONLY if name == "sufficiency" else WITHOUT
        return self.rows[:, method, direction, :, LOG_ODDS if name == "log_odds" else DROP].mean(1)

    def _by_patient(self, rows: pl.DataFrame, value: pl.Expr) -> tuple[Floats, Floats]:
        known = rows.select("patient", value=value).drop_nulls()
        patient, count = known["patient"].to_numpy(), len(self.samples)
        total = np.bincount(patient, known["value"].to_numpy(), minlength=count)
        return total, np.bincount(patient, minlength=count).astype(np.float64)


def area_weights(shares: Sequence[float]) -> Floats:
    """Weights of values at rising shares: the trapezoid rule, divided by the range; they sum to 1."""
    if len(shares) == 1:
        return np.ones(1)
    steps = np.diff(shares)
    return (np.append(steps, 0) + np.append(0, steps)) / (2 * steps.sum())


@dataclass(frozen=True)
class Tables:
    """The tables of an evaluation, from the sums of its groups.

    Attributes:
        groups: One, or those of `by`.
        drawn: `level`, `draws` and `seed` of the bootstrap.
    """

    groups: Sequence[Sums]
    methods: Sequence[str]
    by: str | None
    drawn: Mapping[str, Any]

    def curves(self) -> pl.DataFrame:
        """See `CohortFaithfulness.curves`."""
        names = ("drop", "drop_low", "drop_high", "probability", "probability_low", "probability_high")
        schema = _CURVE_KEYS | dict.fromkeys(names, pl.Float64) | _COUNTS
        return self._table(schema, self._curve_rows if self.methods else None)

    def _curve_rows(self, sums: Sums) -> Iterable[dict[str, Any]]:
        keys: list[tuple[str, str, float]] = []
        columns: list[Floats] = []
        for place, name in enumerate(self.methods):
            for direction, word in enumerate(("without", "only")):
                shares, *both = sums.curve(place, direction)
                keys += [(name, word, share) for share in shares]
                columns.append(np.stack(both, 2))
        totals = np.concatenate(columns, 1)  # [G, curve points, (drop, probability)]
        mean, low, high = (
            part.reshape(-1, 2)
            for part in bootstrap_means(totals.reshape(len(totals), -1), sums.samples[:, None], **self.drawn)
        )
        for i, key in enumerate(keys):
            row: dict[str, Any] = dict(zip(_CURVE_KEYS, key, strict=True))
            for k, what in enumerate(("drop", "probability")):
                row |= {what: mean[i, k], f"{what}_low": low[i, k], f"{what}_high": high[i, k]}
            yield row | _counted(sums.samples)

    def summary(self, measures: Sequence[str]) -> pl.DataFrame:
        """See `CohortFaithfulness.summary`."""

        def rows(sums: Sums) -> Iterable[dict[str, Any]]:
            keys = [(method, name) for method in self.methods for name in measures]
            totals, sizes = _columns(sums.measure(name, method) for method, name in keys)
            mean, low, high = bootstrap_means(totals, sizes, **self.drawn)
            for i, (method, name) in enumerate(keys):
                ends = {"mean": mean[i], "low": low[i], "high": high[i]}
                yield {"method": method, "measure": name, **ends, **_counted(sizes[:, i])}

        return self._table(_SUMMARY | _COUNTS, rows if measures else None)

    def differences(
        self, pairs: Sequence[tuple[str, str]], measures: Sequence[str], matters: Mapping[str, float], flips: int
    ) -> pl.DataFrame:
        """See `CohortFaithfulness.differences`."""
        keys = [(name, *pair) for name in measures for pair in pairs]
        comparisons, alpha = len(keys) * len(self.groups), 1 - self.drawn["level"]
        if comparisons > alpha * (1 + flips):
            raise ValueError(
                f"differences: flips must be at least {math.ceil(comparisons / alpha)} for {comparisons} comparisons, "
                f"got {flips}; or compare fewer measures or groups"
            )

        def rows(sums: Sums) -> Iterable[dict[str, Any]]:
            totals, sizes = _columns(sums.difference(*key) for key in keys)
            mean, low, high = bootstrap_means(totals, sizes, **self.drawn)
            p = sign_flip_test(totals, flips=flips, seed=self.drawn["seed"])
            for i, (name, method, to) in enumerate(keys):
                known = _counted(sizes[:, i])
                yield {
                    "measure": name, "method": method, "to": to, "difference": mean[i], "low": low[i], "high": high[i],
                    "p": p[i] if known["samples"] else np.nan, **known,
                }  # fmt: skip

        table = self._table(_DIFFERENCES | _COUNTS, rows if keys else None)
        corrected = pl.Series("p_holm", holm(table["p"].fill_null(1.0)), pl.Float64)
        return table.with_columns(
            pl.when(pl.col("p").is_not_null()).then(corrected).alias("p_holm"),
            pl.lit(comparisons, pl.Int64).alias("comparisons"),
            _detectable(comparisons, alpha),
        ).select(
            pl.exclude(*_COUNTS, "detectable"), "detectable", _verdict(alpha, matters), *_COUNTS
        )  # fmt: skip

    def _table(
        self, schema: Mapping[str, Any], rows: Callable[[Sums], Iterable[dict[str, Any]]] | None
    ) -> pl.DataFrame:
        found = [{"group": sums.name, **row} for sums in self.groups for row in (rows(sums) if rows else ())]
        table = pl.DataFrame(found, schema={"group": pl.String, **schema}, orient="row")
        table = table.with_columns(pl.col(pl.Float64).fill_nan(None))
        return table.drop("group") if self.by is None else table


_COUNTS = {"samples": pl.Int64, "patients": pl.Int64}
_CURVE_KEYS = {"method": pl.String, "direction": pl.String, "share": pl.Float64}
_SUMMARY = {"method": pl.String, "measure": pl.String} | dict.fromkeys(("mean", "low", "high"), pl.Float64)
_DIFFERENCES = {"measure": pl.String, "method": pl.String, "to": pl.String} | dict.fromkeys(
    ("difference", "low", "high", "p"), pl.Float64
)


def _columns(pairs: Iterable[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    totals, sizes = zip(*pairs, strict=True)
    return np.stack(totals, 1), np.stack(sizes, 1)


def _counted(sizes: Floats) -> dict[str, int]:
    return {"samples": int(sizes.sum()), "patients": int((sizes > 0).sum())}


def _detectable(comparisons: int, alpha: float) -> pl.Expr:
    """The least difference that would have been shown; null where so few patients can show none."""
    normal, strictest = NormalDist(), alpha / max(comparisons, 1)
    factor = (normal.inv_cdf(1 - strictest / 2) + normal.inv_cdf(POWER)) / (2 * normal.inv_cdf(1 - alpha / 2))
    possible = pl.lit(2.0).pow(1 - pl.col("patients").cast(pl.Float64)) <= strictest  # the least p of a sign-flip test
    return pl.when(possible).then(factor * (pl.col("high") - pl.col("low"))).alias("detectable")


def _verdict(alpha: float, matters: Mapping[str, float]) -> pl.Expr:
    measure = pl.col("measure")
    sign = measure.replace_strict(MEASURES, return_dtype=pl.Int8)
    least = measure.replace_strict({**MATTERS, **matters}, return_dtype=pl.Float64)
    better = pl.when(pl.col("difference") * sign > 0).then(pl.lit(BETTER)).otherwise(pl.lit(WORSE))
    fine = (pl.col("detectable") <= least).fill_null(False)
    rest = pl.when(fine).then(pl.lit(NOT_SHOWN)).otherwise(pl.lit(TOO_SMALL))
    return pl.when((pl.col("p_holm") <= alpha).fill_null(False)).then(better).otherwise(rest).alias("verdict")
