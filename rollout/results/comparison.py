"""Two cohort runs compared: what two models or methods say of the same samples, or one of two different cohorts.

    found = compare_cohorts("run-a/", "run-b/")
    found.codes()                   # the codes that differ, those that are shown to first
    found.table                     # every comparison, as a polars frame

Runs of the same samples are *paired*: each code at each place of each record, and each prediction, is compared to its
own counterpart. Others are compared as two cohorts, where a patient may be in either or in both. Intervals and tests
are by patient. A part is read at a time; what is held are sums by patient and code, of the codes compared.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from rollout.intervals import check_level
from rollout.results.attributions import CohortAttributions
from rollout.results.by_group import check_count
from rollout.results.by_patient import number_patients
from rollout.results.compared import BY, KEYS, Runs
from rollout.results.contrasts import contrast_table
from rollout.results.manifest import CONTENT
from rollout.results.notebook import comparison_html
from rollout.results.places import merged

__all__ = ["CohortComparison", "compare_cohorts"]


@dataclass(frozen=True)
class CohortComparison:
    """What differs between two runs, a and b.

    Attributes:
        table: One row per comparison. `measure`: `probability` (or `probability of class c`), or `prediction` of
            measured values; `same class` (the share of the samples to which both give the same class) and `rank
            correlation` (the mean over records of Spearman's, of the relevance of their places), which pairs have;
            `lift` or `relevance` of a code. `feature`, `code`, `name`; `a` and `b`, the means of each run; `estimate`,
            b − a (for the two of pairs, the share and the correlation themselves), with `low` and `high`; `p` of a
            test by patient (sign flips if paired, else permutations), null where there is none, and `p_holm`, corrected
            for all tests of the table; `records_a`, `records_b`: how many records the means are over; `patients`.
        paired: Whether the samples are the same.
        a, b: The runs.
        samples: Of a and of b, those that are compared.
        patients: Of both.
        notes: What was left out, in words.
        level: Of the intervals.
    """

    table: pl.DataFrame
    paired: bool
    a: CohortAttributions
    b: CohortAttributions
    samples: tuple[int, int]
    patients: int
    notes: list[str] = field(default_factory=list)
    level: float = 0.95

    def _repr_html_(self) -> str:
        return comparison_html(self)

    def codes(self) -> pl.DataFrame:
        """The rows of codes: those that are shown to differ first, and within those the largest differences."""
        rows = self.table.filter(pl.col("code").is_not_null())
        shown, size = pl.col("p_holm") > 1 - self.level, pl.col("estimate").abs()
        keys = rows.with_columns(_shown=shown.fill_null(True), _size=size)
        return keys.sort("_shown", "_size", "code", descending=[False, True, False], nulls_last=True).drop(
            "_shown", "_size"
        )


def compare_cohorts(
    a: CohortAttributions | str | Path,
    b: CohortAttributions | str | Path,
    *,
    feature: str | None = None,
    by: str = "lift",
    k: int = 50,
    minimum_records: int = 5,
    read_position: int | str | None = "auto",
    level: float = 0.95,
    draws: int = 2000,
    flips: int = 9999,
    seed: int = 0,
) -> CohortComparison:
    """Compare two runs of `attribute_cohort`.

    The samples are the same if the datasets are: of the same size, vocabularies and contents, as the manifests tell
    them, with the same patient behind every sample. Paired, an entry counts where both runs have a score for it: the
    place that either model reads is left out of both, and so are samples that failed in either. A class-specific method
    explains the class of its own run.

    Codes are compared that stand in at least `minimum_records` records of each run, the `k` commonest of each feature:
    they are chosen by how common they are, not by their difference, so that p values hold. Features of one run alone,
    or that are scored by visit in one and by code in the other, are left out, and `notes` says so.

    Args:
        a, b: The runs, or their folders.
        feature: Of this feature only; None: of all that both have.
        by: `lift`, which compares whatever the methods' relevance sums to, or `relevance`, which compares where it sums
            to the same.
        k: Codes per feature.
        minimum_records: Codes in fewer are left out.
        read_position: As in `CohortAttributions.top_codes`.
        level, draws, flips, seed: Of intervals and tests, as in `rollout.intervals`.

    Raises:
        ValueError: If a folder is no sound run of attributions; if both are the same folder; the runs share no feature,
            no sample (of a paired comparison) or have fewer than 2 patients; or an argument is out of range.
    """
    if by not in BY:
        raise ValueError(f"compare_cohorts: by must be one of {BY}, got {by!r}")
    check_level("compare_cohorts", level)
    check_count("compare_cohorts", "k", k, 1)
    check_count("compare_cohorts", "minimum_records", minimum_records, 0)
    a, b = (one if isinstance(one, CohortAttributions) else CohortAttributions(one) for one in (a, b))
    if a.path.resolve() == b.path.resolve():
        raise ValueError(f"compare_cohorts: a and b must be two runs, got {a.path} twice")
    features, notes = _shared_features(a, b, feature)
    paired, index, lost = _matched(a, b)
    read = (a.place_read(read_position), b.place_read(read_position))
    runs = Runs((a, b), index, read, features, by, paired)
    sums = merged(runs.sums(_common_codes(runs, k, minimum_records)), KEYS)
    drawn: dict[str, Any] = {"level": level, "draws": draws, "seed": seed}
    table = contrast_table(sums, runs.patients, runs.sides, drawn, flips)
    notes += lost + runs.notes
    samples = (index[0].height, index[1].height)
    return CohortComparison(_with_names(table, a, b), paired, a, b, samples, runs.patients, notes, level)


def _shared_features(a: CohortAttributions, b: CohortAttributions, feature: str | None) -> tuple[list[str], list[str]]:
    both = [name for name in a.features if b.granularity.get(name) == a.granularity[name]]
    wanted = both if feature is None else [feature]
    if not both or not set(wanted) <= set(both):
        raise ValueError(
            f"compare_cohorts: feature must be one that both runs have and score alike, {both}, got {feature!r}; they "
            f"have {a.granularity} and {b.granularity}"
        )
    others = [name for name in dict.fromkeys([*a.features, *b.features]) if name not in both]
    return wanted, [f"features of one run alone, or scored otherwise: {', '.join(others)}"] if others else []


def _matched(a: CohortAttributions, b: CohortAttributions) -> tuple[bool, tuple[pl.DataFrame, pl.DataFrame], list[str]]:
    """Whether the runs are of the same samples; `sample`, `patient` of those compared of each; what is left out."""
    first, second = number_patients(a.predictions, b.predictions)
    joined, notes = first.join(second, on="sample", suffix="_b"), []
    # A sample without a patient id has a patient of its own in each run, and so another number.
    nameless = a.predictions.filter(pl.col("patient_id").is_null()).select("sample").collect()["sample"]
    apart = joined.filter((pl.col("patient") != pl.col("patient_b")) & ~pl.col("sample").is_in(nameless.implode()))
    paired = _same_dataset(a, b) and apart.is_empty()
    if paired:
        if joined.is_empty():
            raise ValueError(
                f"compare_cohorts: a and b must have samples in common, got {a.samples:,} and {b.samples:,} of one "
                "dataset, none of which both attributed"
            )
        lost = first.height + second.height - 2 * joined.height
        notes = [f"{lost:,} samples that only one of the runs attributed"] if lost else []
        first = second = joined.select("sample", "patient")
    if min(sizes := [one["patient"].n_unique() for one in (first, second)]) < 2:
        raise ValueError(
            f"compare_cohorts: a and b must have at least 2 patients each, for intervals, got {sizes[0]} and {sizes[1]}"
        )
    known = pl.concat([first["patient"], second["patient"]]).unique().sort()
    numbers = pl.DataFrame({"patient": known, "number": pl.int_range(len(known), eager=True)})
    first, second = (
        one.join(numbers, on="patient").select("sample", patient="number").sort("sample") for one in (first, second)
    )
    return paired, (first, second), notes


def _same_dataset(a: CohortAttributions, b: CohortAttributions) -> bool:
    """As the manifests tell: size, processors and vocabularies, and the content of the samples that both digested."""
    one, other = (run.manifest["identity"]["dataset"] for run in (a, b))
    if (one["samples"], one["fingerprint"]) != (other["samples"], other["fingerprint"]):
        return False
    there, here = one.get(CONTENT) or {}, other.get(CONTENT) or {}
    both = [(digest, here.get(number)) for number, digest in there.items()]
    return all(None in pair or pair[0] == pair[1] for pair in both)


def _common_codes(runs: Runs, k: int, minimum_records: int) -> pl.DataFrame:
    """`feature`, `code` of the codes to compare: the commonest of those in enough records of each run."""
    feature = runs.features[0] if len(runs.features) == 1 else None
    first, second = (
        run.top_codes(feature, by="prevalence", minimum_records=max(minimum_records, 1), k=None, read_position=read)
        for run, read in zip(runs.runs, runs.read, strict=True)
    )
    both = first.join(second, on=["feature", "code"]).filter(pl.col("feature").is_in(runs.features))
    least = both.with_columns(least=pl.min_horizontal("records", "records_right"))
    ordered = least.sort("least", "code", descending=[True, False])
    return ordered.group_by("feature", maintain_order=True).head(k).select("feature", "code")


def _with_names(table: pl.DataFrame, a: CohortAttributions, b: CohortAttributions) -> pl.DataFrame:
    """With the column `name` after `code`: the name of the code in a, else in b."""
    names = [(a.names.get(f) or {}).get(c) or (b.names.get(f) or {}).get(c) for f, c in table["feature", "code"].rows()]
    at = table.columns.index("code") + 1
    return table.insert_column(at, pl.Series("name", names, pl.String))
