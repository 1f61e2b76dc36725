"""Is it true? What the evaluation of a cohort's attributions says, with intervals and tests by patient.

    found = open_faithfulness("evaluation/")
    found.summary()                     # per method: comprehensiveness, sufficiency, areas, log-odds, recall, …
    found.differences(to="random")      # paired, with intervals, corrected p, and a verdict in words
    found.curves(by="predicted")        # what is drawn

Every measure of a sample is a weighted sum of its rows (`rollout.results.measures`), so sums by patient are all that is
kept, and a part is read at a time: memory grows with the patients, not with the rows.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from rollout.files import read_json
from rollout.results import measures
from rollout.results.folder import RunFolder
from rollout.results.groups import grouped
from rollout.results.labels import label_kind
from rollout.results.layout import MANIFEST
from rollout.results.measures import MATTERS, Sums, Tables
from rollout.results.notebook import faithfulness_html

DIRECTIONS = ("without", "only")
RANDOM = "random"
ROWS = {
    "sample": pl.Int64,
    "method": pl.String,
    "direction": pl.String,
    "share": pl.Float32,
    "probability": pl.Float32,
    "drop": pl.Float32,
}
PREDICTIONS = ("sample", "patient_id", "y_prob", "y_true", "target", "probability", "codes", "evaluated")
SCORES = ("sample", "method", "recall", "planted_auc", "leave_one_out")
FLOOR = 1e-6
"""Probability below which the log-odds take a class to have no less."""


class CohortFaithfulness:
    """The rows of an evaluation, and the statistics of them.

    Samples that are not `evaluated` (PyHealth's filter ignores them) count nowhere. A sample without a patient id is a
    patient of its own. Where PyHealth turned the sign of a drop (its negative samples), the probability followed is 1
    minus the one written. The mean of a measure is over samples; intervals are by patient
    (`rollout.intervals.bootstrap_means`).

    Args:
        rows: One row per sample, method, direction (`without` the top share of the codes, or the top share `only`) and
            `share` in percent: `probability` of the class followed, and its `drop` from the whole record's. Several
            frames are parts that are read one after the other, the rows of a sample in one of them.
        predictions: One row per sample: `patient_id`, `y_prob`, `y_true`, `target` (the class followed), its
            `probability` given the whole record, `codes` (how many the record has), `evaluated`.
        scores: One row per sample and method: `recall` and `planted_auc` of planted codes, and `leave_one_out`, the
            rank correlation with what taking each code out does; null where not known.
        failures: `sample` and `error` of the samples that could not be evaluated.
        manifest: Of the run, as plain values; {} where it is not known.
        complete: Whether the run came to its end.
        level, draws, flips, seed: of intervals and tests, as in `rollout.intervals`.

    Attributes:
        methods: The methods, in the order of the manifest, `random` last.
        shares: Percent of the codes, rising.
        samples, patients: How many were evaluated.
        measures: The measures there are: see `rollout.results.measures.MEASURES`.

    Raises:
        ValueError: If a column lacks; a number is NaN, infinite or no share; a sample stands twice; or a method lacks
            rows of a sample that others have.
    """

    def __init__(
        self,
        rows: pl.LazyFrame | Sequence[pl.LazyFrame],
        predictions: pl.LazyFrame,
        scores: pl.LazyFrame | None = None,
        *,
        failures: pl.LazyFrame | None = None,
        manifest: Mapping[str, Any] | None = None,
        complete: bool = True,
        level: float = 0.95,
        draws: int = 2000,
        flips: int = 9999,
        seed: int = 0,
    ) -> None:
        parts = [rows] if isinstance(rows, pl.LazyFrame) else list(rows) or [pl.LazyFrame(schema=ROWS)]
        for part in parts:
            _check_columns("rows", part, tuple(ROWS))
        _check_columns("predictions", predictions, PREDICTIONS)
        self.predictions = predictions
        self.failures = pl.LazyFrame(schema={"sample": pl.Int64, "error": pl.String}) if failures is None else failures
        self.manifest = dict(manifest or {})
        self.complete, self.level = complete, level
        self._drawn: dict[str, Any] = {"level": level, "draws": draws, "seed": seed}
        self._flips = flips
        share = pl.col("share").cast(pl.Float64).round(4)  # 33.3 was float32
        parts = [part.select(*ROWS).with_columns(share) for part in parts]
        self._index = _turn(_index(predictions), parts)
        known = self._index.lazy().select("sample", "whole", "turned")
        self._rows = [part.join(known, on="sample") for part in parts]
        cells = _cells(self._rows)
        self.samples, self.patients = self._index.height, self._index["patient"].n_unique()
        self.methods = _ordered(cells["method"].unique().to_list(), self.evaluation_methods)
        self.shares: list[float] = sorted(cells["share"].drop_nulls().unique().to_list())
        _check_cells(cells, self.samples, self.methods, self.shares)
        _check_samples(self._rows, len(self.methods) * len(DIRECTIONS) * len(self.shares))
        self._scores = self._checked_scores(scores)
        bounded = cells.select((pl.col("low") >= -FLOOR) & (pl.col("high") <= 1 + FLOOR)).to_series().all()
        there = [*measures.OF_ROWS, *(name for name in measures.OF_SCORES if self._scores[name].count())]
        left_out = () if bounded else ("log_odds",)  # of a measured value there are none
        self.measures = [name for name in there if name not in left_out] if self.methods else []
        self._kept: dict[str | None, list[Sums]] = {}

    def _repr_html_(self) -> str:
        return faithfulness_html(self)

    @property
    def evaluation(self) -> dict[str, Any]:
        """How it was evaluated, as the manifest says: `metric`, `shares`, `replacement`, `seed`, …"""
        return dict(self._identity.get("evaluation") or {})

    @property
    def evaluation_methods(self) -> dict[str, Any]:
        """Method → what the manifest says of it."""
        methods = self._identity.get("methods") or {}
        return dict(methods) if isinstance(methods, Mapping) else dict.fromkeys(methods)

    @property
    def _identity(self) -> Mapping[str, Any]:
        return self.manifest.get("identity") or {}

    @cached_property
    def label_kind(self) -> str | None:
        """`binary`, `multiclass`, `multilabel`, `regression` or None: see `rollout.results.labels`."""
        return label_kind(self.predictions)

    def curves(self, by: str | None = None) -> pl.DataFrame:
        """What taking codes out, or leaving them alone, does at each share.

        `without` begins at share 0, with the whole record's probability, and `only` ends at share 100 with it.

        Args:
            by: None, or `predicted` (the class followed), `label` (the true one; a multilabel sample counts for each of
                its labels) or `length` (quarters of the samples by the codes of their record).

        Returns:
            One row per (group,) method, direction and share: `drop` and `probability` (means over samples), each with
            `_low` and `_high` ends of its interval; `samples`, `patients`. Ends are null for a single patient.

        Raises:
            ValueError: If `by` is another, or the samples have no labels to go by.
        """
        return self._tables(by).curves()

    def summary(self, by: str | None = None) -> pl.DataFrame:
        """Each measure of each method: `mean`, `low`, `high`, and of how many `samples` and `patients`.

        Args:
            by: As in `curves`.

        Returns:
            One row per (group,) method and measure. See `rollout.results.measures` for what they measure.

        Raises:
            ValueError: As `curves`.
        """
        return self._tables(by).summary(self.measures)

    def differences(
        self,
        to: str = RANDOM,
        by: str | None = None,
        *,
        between: str | None = None,
        measures: Sequence[str] | None = None,
        matters: Mapping[str, float] = MATTERS,
    ) -> pl.DataFrame:
        """Paired differences between methods on the same samples.

        Intervals are of one comparison each. `p` is that of a sign-flip test by patient, `p_holm` is corrected for all
        rows of the table (`comparisons`), and the verdict goes by it: `better` or `worse` (of a measure that should be
        low, lower is better) where p_holm ≤ 1 − level. Where it is not, `detectable` decides: the difference that this
        cohort would have shown with a power of 80 % at the strictest step of Holm's,

            detectable = (z(1 − α/2m) + z(0.8)) · (high − low) / (2 · z(1 − α/2)),  α = 1 − level, m comparisons;

        at most `matters`, the verdict is `no difference shown`; beyond it, or where so few patients cannot give so
        small a p whatever they show, it is `cohort too small to tell`.

        Args:
            to: The method that the others are compared to.
            by: As in `curves`.
            between: `"all"`: each pair of methods instead, `to` left aside.
            measures: Of these only; None: of all there are. Fewer comparisons are corrected less.
            matters: Measure → the least difference that matters.

        Returns:
            One row per (group,) measure and pair: `method`, `to`, `difference` (method − to), `low`, `high`, `p`,
            `p_holm`, `comparisons`, `detectable` (null where nothing could be shown), `verdict`, `samples`, `patients`.

        Raises:
            ValueError: As `curves`; if `to`, `between` or a measure is another than those there are; or if the
                comparisons are too many for the `flips` of the test.
        """
        chosen = self.measures if measures is None else list(measures)
        for what, names, known in (("measures", chosen, self.measures), ("matters", matters, list(MATTERS))):
            if other := [name for name in names if name not in known]:
                raise ValueError(f"differences: {what} must be among {known}, got {other}")
        pairs = _pairs(self.methods, to, between)
        return self._tables(by).differences(pairs, chosen, matters, self._flips)

    def _tables(self, by: str | None) -> Tables:
        if by not in self._kept:
            self._kept[by] = self._sums(by)
        return Tables(self._kept[by], self.methods, by, self._drawn)

    def _sums(self, by: str | None) -> list[Sums]:
        """The sums by patient of each group, in order."""
        groups, names = grouped(by, self._index, self.predictions, self.label_kind if by == "label" else None)
        keys = ["group", "patient"]
        whole = groups.join(self._index.select("sample", "whole"), on="sample").group_by(keys).agg(
            pl.len().alias("samples"), pl.col("whole").sum()
        )  # fmt: skip
        scores = self._scores.join(groups, on="sample")
        found = []
        for number, name in enumerate(names):
            of_it = pl.col("group") == number
            found.append(Sums.of(name, whole.filter(of_it), scores.filter(of_it), self.methods, self.shares))
        for part in self._rows:
            rows = part.join(groups.lazy(), on="sample").group_by(*keys, "method", "direction", "share")
            sums = rows.agg(_values()).collect(engine="streaming")
            for number, of_group in enumerate(found):
                of_group.add(sums.filter(pl.col("group") == number))
        return found

    def _checked_scores(self, scores: pl.LazyFrame | None) -> pl.DataFrame:
        kinds = {"sample": pl.Int64, "method": pl.String, **dict.fromkeys(measures.OF_SCORES, pl.Float64)}
        if scores is None:
            return pl.DataFrame(schema=kinds)
        _check_columns("scores", scores, SCORES)
        numbers = pl.col(measures.OF_SCORES).cast(pl.Float64).fill_nan(None)  # of scores that are all equal, no rank
        found = scores.select(SCORES).with_columns(numbers).join(self._index.lazy().select("sample"), on="sample")
        table = found.collect(engine="streaming")
        if table.select(pl.col(measures.OF_SCORES).is_infinite().any()).row(0) != (False,) * len(measures.OF_SCORES):
            raise ValueError("scores must be finite or null, got an infinite number")
        if table.select(pl.struct("sample", "method").is_duplicated().any()).item():
            raise ValueError("scores must have one row per sample and method, got several of one")
        unknown = set(table["method"]) - set(self.methods)
        if unknown:
            raise ValueError(f"scores must be of the methods {self.methods}, got {sorted(unknown)}")
        return table


def open_faithfulness(path: str | Path, **options: Any) -> CohortFaithfulness:
    """The evaluation in a folder of `rollout evaluate`.

    Args:
        path: The folder.
        **options: `level`, `draws`, `flips`, `seed`.

    Raises:
        ValueError: If the folder holds no evaluation, or no sound one; also as `CohortFaithfulness`.
    """
    folder = RunFolder(path)
    manifest = folder.manifest.as_dict()
    if "evaluation" not in manifest["identity"]:
        raise ValueError(
            f"path must be the folder of an evaluation (out of evaluate_cohort), got {path}: it is of another run"
        )
    predictions, scores, failures = (folder.scan(kind) for kind in ("predictions", "scores", "failures"))
    options |= {"failures": failures, "manifest": manifest, "complete": folder.complete}
    parts = [folder.scan("faithfulness", [record]) for record in folder.records]
    return CohortFaithfulness(parts, predictions, scores, **options)


def is_evaluation(path: str | Path) -> bool:
    """Whether a folder's manifest says that it is an evaluation."""
    try:
        manifest = read_json(Path(path).expanduser() / MANIFEST)
    except (OSError, ValueError, RuntimeError):  # whoever opens it says what is wrong
        return False
    identity = manifest.get("identity") if isinstance(manifest, dict) else None
    return isinstance(identity, dict) and "evaluation" in identity


def _index(predictions: pl.LazyFrame) -> pl.DataFrame:
    """One row per evaluated sample: `sample`, `patient` (a number), `target`, `codes`, `whole` (its probability)."""
    own = pl.concat_str(pl.lit("\x00"), pl.col("sample").cast(pl.String))
    patient = pl.coalesce(pl.col("patient_id"), own).rank("dense").alias("patient")
    whole = pl.col("probability").cast(pl.Float64).alias("whole")
    chosen = predictions.filter(pl.col("evaluated")).select("sample", patient, "target", "codes", whole)
    index = chosen.collect(engine="streaming")
    if index["sample"].is_duplicated().any():
        raise ValueError("predictions must have one row per sample, got several of one")
    if not index["whole"].is_finite().fill_null(False).all():
        number = index.filter(~pl.col("whole").is_finite().fill_null(False))["sample"][0]
        raise ValueError(f"predictions: probability must be finite, got another of sample {number}")
    return index


def _turn(index: pl.DataFrame, parts: Sequence[pl.LazyFrame]) -> pl.DataFrame:
    """The samples of a negative class followed as 1 − probability: the sign of their drop was turned."""
    against = pl.col("drop") * (pl.col("whole") - pl.col("probability")) < 0
    known = index.lazy().select("sample", "whole")
    rows = [part.join(known, on="sample").filter(against).select("sample").unique() for part in parts]
    turned = pl.concat([part.collect(engine="streaming") for part in rows])["sample"]
    found = index.with_columns(turned=pl.col("sample").is_in(turned.implode()))
    return found.with_columns(whole=pl.when("turned").then(1 - pl.col("whole")).otherwise("whole"))


def _after() -> pl.Expr:
    value = pl.col("probability").cast(pl.Float64)
    return pl.when("turned").then(1 - value).otherwise(value)


def _values() -> list[pl.Expr]:
    """Sums over samples of one method, direction and share."""
    after = _after()
    ratio = after.clip(FLOOR).log() - pl.col("whole").clip(FLOOR).log()
    return [pl.col("drop").cast(pl.Float64).sum(), after.sum().alias("probability"), ratio.sum().alias("log_odds")]


def _cells(parts: Sequence[pl.LazyFrame]) -> pl.DataFrame:
    """Of each method, direction and share: how many samples, whether its numbers are some, and their range."""
    sound = (pl.col("drop").is_finite() & pl.col("probability").is_finite()).fill_null(False)
    low, high = pl.min_horizontal(_after(), "whole").min(), pl.max_horizontal(_after(), "whole").max()
    keys, bad = ("method", "direction", "share"), pl.col("sample").filter(~sound).min()
    found = [
        part.group_by(keys).agg(pl.len().alias("samples"), low=low, high=high, bad=bad).collect(engine="streaming")
        for part in parts
    ]
    return pl.concat(found).group_by(keys).agg(
        pl.col("samples").sum(), pl.col("low").min(), pl.col("high").max(), pl.col("bad").min()
    )  # fmt: skip


def _check_columns(name: str, frame: pl.LazyFrame, wanted: Sequence[str]) -> None:
    lacking = [column for column in wanted if column not in frame.collect_schema().names()]
    if lacking:
        raise ValueError(f"{name} must have the columns {list(wanted)}, got none called {lacking}")


def _check_cells(cells: pl.DataFrame, samples: int, methods: Sequence[str], shares: Sequence[float]) -> None:
    if cells.select(pl.any_horizontal(pl.col("method", "direction", "share").is_null()).any()).item():
        raise ValueError("rows must name method, direction and share, got a row without one")
    others = sorted(set(cells["direction"]) - set(DIRECTIONS))
    if others:
        raise ValueError(f"rows: direction must be one of {DIRECTIONS}, got {others[:3]}")
    if not all(0 < share <= 100 for share in shares):
        raise ValueError(f"rows: share must lie in (0, 100] percent, got {shares}")
    bad = cells.drop_nulls("bad").sort("bad")
    if bad.height:
        where = f"sample {bad['bad'][0]}, method {bad['method'][0]!r}"
        raise ValueError(f"rows: probability and drop must be finite, got NaN, infinite or null of {where}")
    if samples and not methods:
        raise ValueError(f"rows must be of the {samples:,} evaluated samples of predictions, got none of them")
    found = {tuple(row[:3]): row[3] for row in cells.select("method", "direction", "share", "samples").rows()}
    for method in methods:
        for direction in DIRECTIONS:
            for share in shares:
                had = found.get((method, direction, share), 0)
                if had != samples:
                    raise ValueError(
                        f"rows must have each evaluated sample once per method, direction and share, got {had:,} of "
                        f"{samples:,} of method {method!r}, {direction} {share:g} %"
                    )


def _check_samples(parts: Sequence[pl.LazyFrame], wanted: int) -> None:
    """With the counts of the cells right, a sample that stands twice in one is one that has another number of rows."""
    for part in parts:
        sizes = part.group_by("sample").len().filter(pl.col("len") != wanted).collect(engine="streaming").sort("sample")
        if sizes.height:
            number, had = sizes.row(0)
            raise ValueError(f"rows must have {wanted} rows per evaluated sample, got {had} of sample {number}")


def _ordered(found: Sequence[str], told: Mapping[str, Any]) -> list[str]:
    known = [name for name in told if name in found]
    names = [*known, *sorted(set(found) - {*known, None})]
    return [name for name in names if name != RANDOM] + [name for name in names if name == RANDOM]


def _pairs(methods: Sequence[str], to: str, between: str | None) -> list[tuple[str, str]]:
    if between not in (None, "all"):
        raise ValueError(f"differences: between must be None or 'all', got {between!r}")
    if between == "all":
        return [(one, other) for place, one in enumerate(methods) for other in methods[place + 1 :]]
    if methods and to not in methods:
        raise ValueError(f"differences: to must be one of the methods {list(methods)}, got {to!r}")
    return [(one, to) for one in methods if one != to]
