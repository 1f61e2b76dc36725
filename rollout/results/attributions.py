"""A cohort's attributions read back as polars frames, lazily or summed part by part."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import polars as pl

from rollout.results.by_group import check_order, group_table, leading
from rollout.results.code_groups import Groups
from rollout.results.folder import ATTRIBUTIONS, Names, RunFolder
from rollout.results.labels import NO_LABELS, count_labels, label_kind, labels_of
from rollout.results.manifest import PartRecord
from rollout.results.notebook import cohort_html
from rollout.results.places import code_sums, length_counts, merged, place_sums

READ_POSITION = {"Transformer": 0, "StageAttentionNet": -1}
"""The place each PyHealth model reads, by its class: it keeps the residual's share whatever stands there."""

_ROWS = ["sample", "feature", "visit", "position", "code", "attribution"]


class CohortAttributions:
    """The folder of a cohort run, opened for reading.

    Nothing is read at once but the manifest and the commit records, which are checked field by field. A file of a part
    is held against the SHA-256 of its commit record when it is first read, and again if its size or times change; so
    `attributions`, `predictions` and `failures`, which are lazy frames of all parts, read every byte once (about
    0.4 GB/s) before they are given. Filter and select before `collect`. The summaries (`top_codes`,
    `by_position`, `by_visit`, `lengths`) go through the parts one by one, so their memory is that of the largest
    part, not of the cohort; `patient` and `sample` read the parts that hold the samples asked for.

    What relevance is taken as: each feature of a sample has scores of its own, on its *places*: the positions of a flat
    feature, the visits of a nested one. A nested feature's rows carry the visit's score once per code; the summaries
    count a visit once. `lift` = relevance × number of places of the record / their total: 1 is what an even spread
    would give, whatever the length of the record. See `rollout.results.ranking` for why relevance cannot be averaged
    as it stands, and for a ranking net of the record a code stands in.

    Args:
        path: The folder (`out` of `attribute_cohort`). A run that is not complete can be read: it warns, and what
            is not committed yet is left out.
        names: Names of codes, `{feature: {code: name}}` or a JSON file of them, before those of the folder.

    Raises:
        ValueError: If there is no such folder, its manifest or a commit record is missing, damaged or of another
            version, or files of parts are missing or of another size; the message names file and field. Later, when a
            file is first read and does not hold what was written.
    """

    def __init__(self, path: str | Path, names: str | Path | Mapping[str, Mapping[str, str]] | None = None) -> None:
        self._folder = RunFolder(path, names)
        if "attributions" not in self._folder.kinds:
            raise ValueError(
                f"path must be the folder of a run that attributes, got {self._folder.path}, written by "
                f"{self._folder.manifest.written_by}"
            )
        if not self.complete:
            warnings.warn(
                f"the run in {self.path} is not complete: {self.samples:,} of {self.planned:,} samples can "
                "be read; run the same attribution again on the folder to finish it",
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return f"CohortAttributions({str(self.path)!r}, {self._folder.manifest.status}, {self.samples:,} samples)"

    def _repr_html_(self) -> str:
        return cohort_html(self)

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder.path

    @property
    def manifest(self) -> dict[str, Any]:
        """What was run: see `manifest.json` and `rollout.results.manifest.Manifest`."""
        return self._folder.manifest.as_dict()

    @property
    def complete(self) -> bool:
        """Whether the run came to its end."""
        return self._folder.complete

    @property
    def names(self) -> Names:
        """Feature → code → name."""
        return self._folder.names

    @property
    def attributions(self) -> pl.LazyFrame:
        """One row per real entry of every record: sample, patient_id, visit_id, feature, …, attribution."""
        return self._folder.scan("attributions")

    @property
    def predictions(self) -> pl.LazyFrame:
        """One row per sample: `y_prob` and `y_true` as lists, `target_class` for class-specific methods."""
        return self._folder.scan("predictions")

    @property
    def failures(self) -> pl.LazyFrame:
        """`sample` and `error` of every sample that could not be attributed; empty when all could."""
        return self._folder.scan("failures")

    @property
    def samples(self) -> int:
        """Number of attributed samples."""
        return self._folder.rows["predictions"]

    @property
    def rows(self) -> int:
        """Number of rows of `attributions`."""
        return self._folder.rows["attributions"]

    @property
    def planned(self) -> int:
        """Number of samples of the dataset."""
        return self._folder.manifest.identity["dataset"]["samples"]

    @property
    def features(self) -> list[str]:
        """The features, in the order of the dataset."""
        return list(self.granularity)

    @property
    def granularity(self) -> dict[str, str]:
        """Feature → what has a score of its own in it: a `code`, a `visit`, the `feature`, a `step`."""
        return dict(self._folder.manifest.granularity)

    @property
    def whole_features(self) -> list[str]:
        """The features that have one score for all their codes, such as multi-hot ones: one place in a record."""
        return [name for name, scored in self.granularity.items() if scored == "feature"]

    @property
    def time_units(self) -> dict[str, str | None]:
        """Feature with times → what the column `time` is counted in; None where that is not known."""
        return dict(self._folder.manifest.time)

    @property
    def label_names(self) -> dict[str, list[str | None]]:
        """Output of the dataset → the names of its labels, by number."""
        return dict(self._folder.manifest.labels)

    @property
    def read_position(self) -> int | None:
        """The place the model reads, for the models known here (`READ_POSITION`), else None."""
        return READ_POSITION.get(self._folder.manifest.identity["model"]["class"].rpartition(".")[2])

    @cached_property
    def label_kind(self) -> str | None:
        """`binary`, `multiclass`, `multilabel`, `regression` or None: see `rollout.results.labels`."""
        return label_kind(self.predictions)

    def with_predictions(self) -> pl.LazyFrame:
        """`attributions` with each row's prediction and truth; for a large one `collect(engine="streaming")`."""
        return self.attributions.join(self.predictions.drop("patient_id", "visit_id"), on="sample", how="left")

    def labels(self) -> pl.DataFrame:
        """How many `samples` have each `label`, commonest first, and its `name` (null where it is not known).

        There is no row without labels or for measured values.
        """
        return count_labels(self.predictions, self.label_kind, self._folder.manifest.labels)

    def top_codes(
        self,
        feature: str | None = None,
        by: str = "relevance",
        *,
        label: int | Sequence[int] | None = None,
        per_label: bool = False,
        minimum_records: int = 5,
        k: int | None = 20,
        read_position: int | str | None = "auto",
    ) -> pl.DataFrame:
        """The leading codes of each feature.

        For a nested feature a code's relevance is that of the visits it stands in, shared with the other codes there:
        such numbers do not add up over codes. Features are ranked apart.

        Args:
            feature: One feature; None: each of them.
            by: `relevance`, `lift` or `prevalence`.
            label: Only samples of this label, or of these: 0 or 1 (binary), a class (multiclass), a label that is set
                (multilabel).
            per_label: Each label apart; `prevalence` is then a share of the samples of that label.
            minimum_records: Codes in fewer records are left out. A mean over few records leads by chance.
            k: Codes per feature (and label); None: all.
            read_position: The place left out of every record, since it keeps the residual's share whatever code stands
                there: 0 is the first, -1 the last, None leaves out none; `"auto"`: the attribute `read_position`.
                Prevalence counts every place.

        Returns:
            Best first within `feature` (and `label`): `code`, `name` (null when unknown), `relevance` (sum
            within a record, mean over the records that have the code), `lift` (mean over entries), `prevalence`
            (share of the samples that have the code), `records` and `entries` (what the means are over; the codes
            of one visit that are equal are one entry).

        Raises:
            ValueError: If an argument is out of range, or labels are asked for and there are none.
        """
        self._check_feature(feature)
        read = self.place_read(read_position)
        check_order("top_codes", "by", by, minimum_records, k)
        split = per_label or label is not None
        wanted = self._wanted(label) if split else None
        keys = ["feature", "code", "label"] if split else ["feature", "code"]
        sums = merged((self._code_sums(part, feature, read, wanted, per_label) for part in self._folder.records), keys)
        if sums is None:
            sums = code_sums(ATTRIBUTIONS, read, NO_LABELS if split else None)
        if wanted is None:
            sums = sums.with_columns(samples=pl.lit(self.samples))
        elif per_label:
            sums = sums.join(self.labels().select("label", "samples"), on="label")
        else:
            sums = sums.with_columns(samples=pl.lit(self._samples_of(wanted)))
        groups = ["feature", "label"] if per_label else ["feature"]
        return self._ranked(sums, groups, by, minimum_records, k)

    def _code_sums(
        self, part: PartRecord, feature: str | None, read: int | None, wanted: Sequence[int] | None, per_label: bool
    ) -> pl.DataFrame:
        labels = None if wanted is None else self._labels_of(part, wanted, per_label)
        return code_sums(self.rows_within(range(part.start, part.stop), feature), read, labels, self.whole_features)

    def _ranked(self, sums: pl.DataFrame, groups: list[str], by: str, minimum: int, k: int | None) -> pl.DataFrame:
        means = sums.filter(pl.col("records") >= minimum).select(
            *groups,
            "code",
            named(self.names),
            relevance=_ratio("relevance", "records"),
            lift=_ratio("lift", "entries"),
            prevalence=_ratio("present", "samples"),
            records="records",
            entries="entries",
        )
        order = _order(self.features, means["feature"]).alias("order")
        keys = ["order", *groups[1:], by, "code"]
        ordered = means.with_columns(order).sort(keys, descending=[name == by for name in keys], nulls_last=True)
        best = ordered if k is None else ordered.group_by(groups, maintain_order=True).head(k)
        return best.drop("order").select(*groups, pl.exclude(groups))

    def top_groups(
        self,
        feature: str,
        by: str | Path | Groups,
        *,
        order: str = "relevance",
        download: bool = False,
        minimum_records: int = 5,
        k: int | None = None,
        read_position: int | str | None = "auto",
        level: float = 0.95,
        draws: int = 2000,
        seed: int = 0,
    ) -> pl.DataFrame:
        """The leading groups of a feature's codes, such as chapters of the ICD, with intervals by patient.

        A group stands wherever one of its codes does, and counts once there: its relevance in a record is the sum over
        the places it stands in, so a code counts once per record and group, and a code of several groups counts for
        each. The codes that have no group are the group null, in the last row.

        Args:
            feature: The feature.
            by: A code system (`icd-chapter`, `ccsr`, `atc-3`, …), a mapping {code: group or [group, …]}, or the path of
                a JSON or CSV file of one: see `rollout.results.code_groups`.
            order: `relevance`, `lift` or `prevalence`.
            download: Let PyHealth download the table of a code system that is not in its cache.
            minimum_records, k, read_position: As in `top_codes`, of groups.
            level, draws, seed: Of the intervals: see `rollout.intervals.bootstrap_means`.

        Returns:
            Best first: `group`, then `relevance`, `lift` and `prevalence` as in `top_codes`, each with its `_low` and
            `_high` end (null for a single patient), `records`, `entries`, `patients` and `codes` (how many different
            ones the group has here).

        Raises:
            ValueError: If an argument is out of range, or the codes cannot be grouped: see
                `rollout.results.code_groups.group_codes`.
        """
        self._check_feature(feature)
        drawn = {"level": level, "draws": draws, "seed": seed}
        table = group_table(self, feature, by, self.place_read(read_position), download, drawn)
        return leading(table, order, minimum_records, k)

    def by_position(
        self, feature: str | None = None, *, from_end: bool = False, read_position: int | str | None = None
    ) -> pl.DataFrame:
        """Mean `relevance` and `lift` of each `position` of the flat features, over `records` that reach it.

        Longer records spread relevance thinner, and late positions are in long records only: compare `lift`.

        Args:
            feature: One feature; None: each of them.
            from_end: Count from the last position of each record, which is 0.
            read_position: As in `top_codes`: a place that is left out, so that it does not press down the others.
        """
        return self._by_place("position", feature, from_end, self.place_read(read_position))

    def by_visit(
        self, feature: str | None = None, *, from_end: bool = False, read_position: int | str | None = None
    ) -> pl.DataFrame:
        """As `by_position`, for each `visit` of the nested features, however many codes stand in it."""
        return self._by_place("visit", feature, from_end, self.place_read(read_position))

    def _by_place(self, name: str, feature: str | None, from_end: bool, read: int | None) -> pl.DataFrame:
        self._check_feature(feature)
        nested = name == "visit"
        whole, parts = self.whole_features, self.part_ranges
        partials = (place_sums(self.rows_within(part, feature), nested, from_end, read, whole) for part in parts)
        sums = merged(partials, ["feature", "place"])
        if sums is None:
            sums = place_sums(ATTRIBUTIONS, nested, from_end, read)
        means = sums.select(
            "feature",
            pl.col("place").alias(name),
            relevance=_ratio("relevance", "records"),
            lift=_ratio("lift", "records"),
            records="records",
        )
        return (
            means.with_columns(_order(self.features, means["feature"]).alias("order")).sort("order", name).drop("order")
        )

    def lengths(self, feature: str | None = None) -> pl.DataFrame:
        """How many `records` have which `length`, by `feature` and `unit` (entries; visits if nested)."""
        self._check_feature(feature)
        partials = (length_counts(self.rows_within(part, feature)) for part in self.part_ranges)
        sums = merged(partials, ["feature", "unit", "length"])
        return length_counts(ATTRIBUTIONS) if sums is None else sums

    def patient(self, patient_id: str) -> pl.DataFrame:
        """Every row of a patient's samples, in record order, with prediction and truth.

        `predictions/` says which samples those are, and the commit records in which parts they lie.

        Raises:
            ValueError: If no attributed sample is of that patient.
        """
        mine = self.predictions.filter(pl.col("patient_id") == str(patient_id))
        numbers = mine.select("sample").collect(engine="streaming")["sample"].to_list()
        if not numbers:
            some = self.predictions.select("patient_id").head(3).collect()["patient_id"].to_list()
            raise ValueError(
                f"patient: no attributed sample is of patient {str(patient_id)!r}; ids here are as {some} "
                "(see .predictions), and samples in .failures have no rows"
            )
        return self.rows_of(numbers)

    def sample(self, number: int) -> pl.DataFrame:
        """The rows of one sample (its number in the dataset), in record order, with prediction and truth.

        Raises:
            ValueError: If that sample is not there, or failed.
        """
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise ValueError(f"sample: number must be an int, the sample's place in the dataset, got {number!r}")
        wanted, part = pl.col("sample") == int(number), self._folder.holding([int(number)])
        if self._folder.scan("predictions", part).filter(wanted).collect().is_empty():
            failed = self._folder.scan("failures", part).filter(wanted).collect()["error"].to_list()
            reason = f"it failed: {failed[0]}" if failed else f"the dataset has {self.planned:,} samples, from 0"
            raise ValueError(f"sample: no attributions of sample {int(number)}; {reason} (see .predictions, .failures)")
        return self.rows_of([int(number)])

    def parts(self) -> Iterator[tuple[pl.LazyFrame, pl.LazyFrame]]:
        """`attributions` and `predictions` of each part, lazily: a sample's rows lie in one part."""
        for part in self._folder.records:
            yield self._folder.scan("attributions", [part]), self._folder.scan("predictions", [part])

    @property
    def part_ranges(self) -> list[range]:
        """The samples of each part, in order; what reads them one by one holds no more than the largest."""
        return [range(record.start, record.stop) for record in self._folder.records]

    def rows_within(self, samples: range, feature: str | None = None) -> pl.DataFrame:
        """The rows of some samples, whole records: `sample`, `feature`, `visit`, `position`, `code`, `attribution`."""
        within = pl.col("sample").is_between(samples.start, samples.stop - 1)
        rows = self._folder.scan("attributions", self._folder.holding(samples)).filter(within).select(_ROWS)
        return (rows if feature is None else rows.filter(pl.col("feature") == feature)).collect()

    def rows_of(self, numbers: Sequence[int]) -> pl.DataFrame:
        """The rows of samples, as of `sample`, from the parts that hold them; other samples' row groups are skipped."""
        parts, place = self._folder.holding(numbers), pl.col("sample")
        wanted = place.is_between(min(numbers), max(numbers)) & place.is_in(list(numbers))
        rows = self._folder.scan("attributions", parts).filter(wanted).collect(engine="streaming")
        predictions = self._folder.scan("predictions", parts).filter(wanted).drop("patient_id", "visit_id").collect()
        joined = rows.join(predictions, on="sample", how="left")
        order = _order(self.features, joined["feature"]).alias("order")
        return (
            joined.with_columns(order).sort("sample", "order", "visit", "position", maintain_order=True).drop("order")
        )

    def _labels_of(self, part: PartRecord, wanted: Sequence[int], per_label: bool) -> pl.DataFrame:
        """`sample`, `label` of the samples of a part that have a wanted label; all of one label unless split."""
        labels = labels_of(self._folder.scan("predictions", [part]), self.label_kind)
        table = labels.filter(pl.col("label").is_in(list(wanted))).collect(engine="streaming")
        return table if per_label else table.select("sample").unique().with_columns(label=pl.lit(0, pl.Int64))

    def _samples_of(self, wanted: Sequence[int]) -> int:
        chosen = labels_of(self.predictions, self.label_kind).filter(pl.col("label").is_in(list(wanted)))
        return int(chosen.select(pl.col("sample").n_unique()).collect(engine="streaming").item())

    def _wanted(self, label: int | Sequence[int] | None) -> list[int]:
        known = sorted(self.labels()["label"])
        if not known:
            what = "no labels" if self.label_kind is None else "measured values, not classes, as labels"
            raise ValueError(f"top_codes: the samples in {self.path} have {what}; leave out label and per_label")
        if label is None:
            return known
        given = [label] if isinstance(label, Integral) else list(label)  # type: ignore[arg-type]
        unknown = [one for one in given if one not in known]
        if unknown or not given:
            raise ValueError(f"top_codes: label must be among {known[:20]}, got {label!r}")
        return [int(one) for one in given]

    def place_read(self, read_position: int | str | None = "auto") -> int | None:
        """What `read_position` means here: `"auto"` is the attribute `read_position`."""
        if read_position == "auto":
            return self.read_position
        if read_position is None or (isinstance(read_position, Integral) and not isinstance(read_position, bool)):
            return read_position
        raise ValueError(f"read_position must be an int, None or 'auto', got {read_position!r}")

    def _check_feature(self, feature: str | None) -> None:
        if feature is not None and feature not in self.features:
            raise ValueError(f"feature must be one of {self.features}, got {feature!r}")


def _ratio(above: str, below: str) -> pl.Expr:
    return pl.when(pl.col(below) > 0).then(pl.col(above) / pl.col(below))


def named(names: Names) -> pl.Expr:
    """The column `name`, by `feature` and `code`; null where there is none."""
    name = pl.lit(None, pl.String)
    for feature, codes in names.items():
        mapped = pl.col("code").replace_strict(list(codes), list(codes.values()), default=None, return_dtype=pl.String)
        name = pl.when(pl.col("feature") == feature).then(mapped).otherwise(name)
    return name.alias("name")


def _order(features: Sequence[str], found: pl.Series) -> pl.Expr:
    """The place of each row's feature in the manifest, then by name."""
    known = [*features, *sorted(set(found.unique()) - set(features))]
    return pl.col("feature").replace_strict(known, list(range(len(known))), default=len(known), return_dtype=pl.Int32)
