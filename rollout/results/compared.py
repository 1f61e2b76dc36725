"""What two runs say, side by side: sums by patient of each code, prediction and ranking, a part at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import polars as pl

from rollout.results.attributions import CohortAttributions
from rollout.results.places import RECORD, find_cells, find_places

BY = ("lift", "relevance")
SAME, RANKS = "same class", "rank correlation"
"""Measures of pairs that are no differences."""
CLASSES = 20
"""Outputs whose probabilities are compared one by one."""
KEYS = ["patient", "measure", "feature", "code"]
SUMS = ["a", "b", "size_a", "size_b", "records_a", "records_b"]


@dataclass
class Runs:
    """Two runs, a and b, and what of them is compared.

    Attributes:
        runs: a and b.
        index: Of each: `sample`, `patient` (a number from 0 on) of the samples compared; the same twice if paired.
        read: The place that is left out of the records of each.
        features: Those that are compared.
        by: `lift` or `relevance`.
        paired: Whether the samples are the same.
        notes: What could not be compared, in words; after `sums`.
    """

    runs: tuple[CohortAttributions, CohortAttributions]
    index: tuple[pl.DataFrame, pl.DataFrame]
    read: tuple[int | None, int | None]
    features: Sequence[str]
    by: str
    paired: bool
    notes: list[str] = field(default_factory=list)

    @property
    def patients(self) -> int:
        """How many there are in a, in b or in both."""
        return 1 + max(int(one["patient"].max()) for one in self.index)  # type: ignore[arg-type]

    @property
    def sides(self) -> tuple[pl.Series, pl.Series] | None:
        """Of each patient, whether it is in a, and whether it is in b; None if paired."""
        if self.paired:
            return None
        everyone = pl.int_range(self.patients, eager=True)
        first, second = (everyone.is_in(one["patient"].unique().implode()) for one in self.index)
        return first, second

    def sums(self, codes: pl.DataFrame) -> Iterator[pl.DataFrame]:
        """`SUMS` by `KEYS`, of the predictions and of every part.

        A difference is Σ b / Σ size_b − Σ a / Σ size_a; `SAME` and `RANKS` are Σ b / Σ size_b.

        Args:
            codes: `feature`, `code` of the codes to compare.
        """
        yield from self._predictions()
        if self.paired:
            for part in self.runs[0].part_ranges:
                rows = [self._rows(side, part) for side in (0, 1)]
                yield self._ranks(*rows)
                yield self._codes(self._paired_entries(rows, codes), codes)
        else:
            for side, run in enumerate(self.runs):
                for part in run.part_ranges:
                    yield self._codes(self._entries(side, self._rows(side, part), codes), codes)

    def _rows(self, side: int, part: range) -> pl.DataFrame:
        rows = self.runs[side].rows_within(part).filter(pl.col("feature").is_in(list(self.features)))
        return rows.join(self.index[side], on="sample", how="semi")

    def _cells(self, side: int, rows: pl.DataFrame, codes: pl.DataFrame) -> pl.LazyFrame:
        """The entries of the codes compared, with the value that is."""
        cells = find_cells(rows, self.read[side], self.runs[side].whole_features)
        return (
            cells.join(codes.lazy(), on=["feature", "code"], how="semi")
            .select(*RECORD, "place", "code", value=self.by)
            .drop_nulls("value")
        )

    def _entries(self, side: int, rows: pl.DataFrame, codes: pl.DataFrame) -> pl.LazyFrame:
        """Of one run: the other's values are 0, of no entries."""
        cells, mine, zero = self._cells(side, rows, codes), pl.col("value"), pl.lit(0.0)
        a, b = (mine, zero) if side == 0 else (zero, mine)
        return cells.with_columns(a=a, b=b, size_a=pl.lit(1 - side), size_b=pl.lit(side)).join(
            self.index[side].lazy(), on="sample"
        )

    def _paired_entries(self, rows: Sequence[pl.DataFrame], codes: pl.DataFrame) -> pl.LazyFrame:
        first, second = (self._cells(side, rows[side], codes) for side in (0, 1))
        both = first.join(second, on=[*RECORD, "place", "code"], suffix="_b")
        sizes = {"size_a": pl.lit(1), "size_b": pl.lit(1)}
        return both.with_columns(a="value", b="value_b", **sizes).join(self.index[0].lazy(), on="sample")

    def _codes(self, entries: pl.LazyFrame, codes: pl.DataFrame) -> pl.DataFrame:
        """Sums over entries (lift), or over records of their sums (relevance)."""
        by_record = entries.group_by("patient", *RECORD, "code").agg(pl.col("a", "b", "size_a", "size_b").sum())
        by_record = by_record.with_columns(
            records_a=(pl.col("size_a") > 0).cast(pl.Int32), records_b=(pl.col("size_b") > 0).cast(pl.Int32)
        )
        if self.by == "relevance":
            by_record = by_record.with_columns(size_a="records_a", size_b="records_b")
        return _summed(by_record.with_columns(measure=pl.lit(self.by)))

    def _ranks(self, first: pl.DataFrame, second: pl.DataFrame) -> pl.DataFrame:
        """Spearman's correlation of the places of each record; none where either run has them all equal."""
        one, other = (
            find_places(rows, self.read[side], self.runs[side].whole_features).drop_nulls("lift")
            for side, rows in enumerate((first, second))
        )
        both = one.join(other, on=[*RECORD, "place"], suffix="_b")
        rank = [pl.col(name).rank().over(RECORD).alias(name) for name in ("relevance", "relevance_b")]
        found = both.with_columns(rank).group_by(RECORD).agg(b=pl.corr("relevance", "relevance_b"))
        return _level(found.join(self.index[0].lazy(), on="sample"), RANKS)

    def _predictions(self) -> Iterator[pl.DataFrame]:
        first, second = (self._finite_predictions(side) for side in (0, 1))
        widths = pl.concat([one["y_prob"].list.len() for one in (first, second)]).unique().to_list()
        if len(widths) != 1 or not (outputs := widths[0]):
            self.notes.append("predictions, which are not of as many classes in both")
            return
        kind = next((known for run in self.runs if (known := run.label_kind)), None)
        values = pl.concat([one["y_prob"].explode() for one in (first, second)])
        if kind is None and outputs == 1 and not values.is_between(0, 1).all():
            kind = "regression"
        names = _output_names(outputs, kind)
        if self.paired:
            both = first.join(second.drop("patient"), on="sample", suffix="_b").lazy()
            for place, name in enumerate(names):
                yield _predicted(both.with_columns(a=_output(place), b=_output(place, "_b")), name, 1, 1)
            if kind != "regression":
                yield _level(both.with_columns(b=_agreement(outputs, kind).cast(pl.Float64)), SAME)
            return
        for place, name in enumerate(names):
            value, zero = _output(place), pl.lit(0.0)
            yield _predicted(first.lazy().with_columns(a=value, b=zero), name, 1, 0)
            yield _predicted(second.lazy().with_columns(a=zero, b=value), name, 0, 1)

    def _finite_predictions(self, side: int) -> pl.DataFrame:
        """`sample`, `patient`, `y_prob` of a run; samples whose prediction is no number are left out, with a note."""
        rows = self.runs[side].predictions.select("sample", "y_prob").join(self.index[side].lazy(), on="sample")
        finite = pl.col("y_prob").list.eval(pl.element().is_finite().fill_null(False)).list.all()
        found = rows.filter(finite.fill_null(False)).collect(engine="streaming")
        if lost := self.index[side].height - found.height:
            self.notes.append(f"predictions of {lost:,} samples of {'ab'[side]}, which are no numbers")
        return found


def _output_names(outputs: int, kind: str | None) -> list[str]:
    word, of = ("prediction", "") if kind == "regression" else ("probability", "of class ")
    return [word] if outputs == 1 else [f"{word} {of}{place}" for place in range(min(outputs, CLASSES))]


def _output(place: int, suffix: str = "") -> pl.Expr:
    return pl.col(f"y_prob{suffix}").list.get(place).cast(pl.Float64)


def _agreement(outputs: int, kind: str | None) -> pl.Expr:
    """Whether both give the same class: at ½ for one output, and for each of several labels; else the likeliest."""
    if outputs == 1 or kind == "multilabel":
        chosen = [pl.col(name).list.eval(pl.element() >= 0.5) for name in ("y_prob", "y_prob_b")]
    else:
        chosen = [pl.col(name).list.arg_max() for name in ("y_prob", "y_prob_b")]
    return chosen[0] == chosen[1]


def _predicted(values: pl.LazyFrame, name: str, of_a: int, of_b: int) -> pl.DataFrame:
    of = {"size_a": pl.lit(of_a), "size_b": pl.lit(of_b), "records_a": pl.lit(of_a), "records_b": pl.lit(of_b)}
    keys = {"measure": pl.lit(name), "feature": pl.lit(None, pl.String), "code": pl.lit(None, pl.String)}
    return _summed(values.with_columns(**of, **keys))


def _level(values: pl.LazyFrame, measure: str) -> pl.DataFrame:
    """Of one number per record, `b`, that both runs make together; null or NaN is none."""
    known = values.filter(pl.col("b").is_finite().fill_null(False)).with_columns(
        a=pl.lit(0.0), measure=pl.lit(measure), code=pl.lit(None, pl.String), **{name: pl.lit(1) for name in SUMS[2:]}
    )
    has_feature = "feature" in values.collect_schema().names()
    return _summed(known if has_feature else known.with_columns(feature=pl.lit(None, pl.String)))


def _summed(values: pl.LazyFrame) -> pl.DataFrame:
    return values.group_by(KEYS).agg(pl.col(SUMS).cast(pl.Float64).sum()).select(*KEYS, *SUMS).collect()
