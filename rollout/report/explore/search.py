"""What may be asked of the pages, checked; and the samples and codes that answer it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, Self

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from rollout.report.explore.index import Index
from rollout.report.text import shown
from rollout.results.attributions import CohortAttributions
from rollout.results.places import place_of

PAGE = 50
"""Rows of a page."""
REMEMBERED = 8
"""Sets of samples that searches for codes found, kept so that the next page of one need not look again."""

LONGEST = 1000
"""Characters of a text that may be asked for."""

Text = Annotated[str, StringConstraints(max_length=LONGEST)]
Count = Annotated[int, Field(ge=0, lt=2**31)]


class BadQuestionError(ValueError):
    """What was asked is not what can be asked; the message names the parameter."""


class Question(BaseModel):
    """The parameters of a page; each may be given once, and no other."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    page: Annotated[int, Field(ge=1, lt=2**31)] = 1

    @classmethod
    def of(cls, given: Sequence[tuple[str, str]], keep_empty: bool = False) -> Self:
        """Check parameters as they stand in an address.

        Args:
            given: Names and values; those that are empty, as a form sends them, are left out.
            keep_empty: Empty values are values.

        Raises:
            BadQuestionError: In one line, which parameter is wrong and why.
        """
        kept = [(name, value) for name, value in given if value or keep_empty]
        for name, times in Counter(name for name, _ in kept).items():
            if times > 1:
                raise BadQuestionError(f"{shown(name, 40)} must be given once, got it {times} times")
        try:
            return cls.model_validate(dict(kept))
        except ValidationError as error:
            raise BadQuestionError(_problem(error)) from None

    def without_page(self) -> dict[str, Any]:
        """The parameters that are set, but for the page."""
        return self.model_dump(exclude={"page"}, exclude_defaults=True)


def _problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    name = shown(first["loc"][0] if first["loc"] else "parameters", 40)
    if first["type"] == "extra_forbidden":
        return f"{name} is no parameter of this page"
    if first["type"] == "missing":
        return f"{name} must be given"
    return f"{name}: {first['msg'].lower()}, got {shown(repr(first['input']), 80)}"


class Search(Question):
    """Of samples. `patient` and `code` are taken whole where one is so called, else as a piece of it, or of a name."""

    patient: Text | None = None
    label: Count | None = None
    predicted: Count | None = None
    prediction_min: float | None = None
    prediction_max: float | None = None
    length_min: Count | None = None
    length_max: Count | None = None
    code: Text | None = None
    feature: Text | None = None
    sort: Literal["sample", "patient", "prediction", "length", "difference"] = "sample"
    order: Literal["asc", "desc"] = "asc"


class CodeSearch(Question):
    """Of codes: `q` a piece of a code or of its name."""

    q: Text | None = None
    feature: Text | None = None


class OneCode(Question):
    """One code of a feature, whose samples are listed."""

    feature: Text
    code: Text
    sort: Literal["lift", "relevance", "sample", "prediction", "length", "entries"] = "lift"
    order: Literal["asc", "desc"] = "desc"


class OneSample(Question):
    """One sample by its number in the dataset."""

    sample: Annotated[int, Field(ge=0, lt=2**62)]


class Searcher:
    """Answers questions about one cohort.

    Args:
        cohort: The run; its rows are read where codes are asked for.
        index: Of it.
        samples: The index's samples, with further columns or as they are.
    """

    def __init__(self, cohort: CohortAttributions, index: Index, samples: pl.DataFrame) -> None:
        self.cohort, self.index, self.samples = cohort, index, samples
        found = index.codes["feature"].unique().sort().to_list()
        self.features = cohort.features + [one for one in found if one not in cohort.features]
        self.having = lru_cache(REMEMBERED)(self._having)
        self.entries_of = lru_cache(REMEMBERED)(self._entries_of)

    def find(self, asked: Search) -> pl.DataFrame:
        """The samples that answer a search, in the order asked for; ties by their number.

        Raises:
            BadQuestionError: If there is no such feature, or nothing of the kind to search by.
        """
        self._check_feature(asked.feature)
        found = self.samples
        for wanted in self._conditions(asked):
            found = found.filter(wanted)
        if asked.code is not None:
            found = found.filter(pl.col("sample").is_in(self.having(asked.code, asked.feature).implode()))
        columns = {"patient": "patient_id", "length": "entries"}
        return self._sorted(found, columns.get(asked.sort, asked.sort), asked.order)

    def _conditions(self, asked: Search) -> list[pl.Expr]:
        wanted, kind = [], self.index.kind
        if asked.patient is not None:
            ids = self.samples["patient_id"]
            whole = (ids == asked.patient).any()
            of = pl.col("patient_id")
            wanted.append(of == asked.patient if whole else of.str.contains(asked.patient, literal=True))
        if asked.label is not None:
            if kind in (None, "regression"):
                what = "no labels" if kind is None else "measured values, not classes, as labels"
                raise BadQuestionError(f"label cannot be asked for: the samples have {what}")
            held = pl.col("label")
            wanted.append(held.list.contains(asked.label) if kind == "multilabel" else held == asked.label)
        if asked.predicted is not None:
            if not self.index.several:
                raise BadQuestionError("predicted cannot be asked for: the model has one output; see prediction_min")
            wanted.append(pl.col("predicted") == asked.predicted)
        for name, column in (("prediction", "prediction"), ("length", "entries")):
            low, high = getattr(asked, f"{name}_min"), getattr(asked, f"{name}_max")
            if low is not None:
                wanted.append(pl.col(column) >= low)
            if high is not None:
                wanted.append(pl.col(column) <= high)
        return wanted

    def _sorted(self, found: pl.DataFrame, column: str, order: str) -> pl.DataFrame:
        if column not in found.columns:
            raise BadQuestionError("sort by difference needs a second run: rollout explore FOLDER --beside FOLDER")
        key = pl.col(column).abs() if column == "difference" else pl.col(column)
        by = [pl.col("sample")] if column == "sample" else [key, pl.col("sample")]
        return found.sort(by, descending=[order == "desc", *[False] * (len(by) - 1)], nulls_last=True)

    def codes(self, text: str | None, feature: str | None) -> pl.DataFrame:
        """The codes that a text means, the commonest first: those so called, else those it is a piece of, or of their
        names, in small letters or large.

        Raises:
            BadQuestionError: If there is no such feature.
        """
        self._check_feature(feature)
        known = self.index.codes if feature is None else self.index.codes.filter(pl.col("feature") == feature)
        if text is None:
            return known
        exact = known.filter(pl.col("code") == text)
        if exact.height:
            return exact
        piece = text.lower()
        said = [pl.col(column).str.to_lowercase().str.contains(piece, literal=True) for column in ("code", "name")]
        return known.filter(pl.any_horizontal(*(one.fill_null(False) for one in said)))

    def _having(self, text: str, feature: str | None) -> pl.Series:
        """The samples that have a code that a text means."""
        meant = self.codes(text, feature).partition_by("feature", as_dict=True)
        wanted = [
            (pl.col("feature") == one) & pl.col("code").is_in(codes["code"].to_list())
            for (one,), codes in meant.items()
        ]
        if not wanted:
            return pl.Series("sample", [], pl.Int64)
        rows = self.cohort.attributions.filter(pl.any_horizontal(*wanted)).select(pl.col("sample").unique())
        return rows.collect(engine="streaming")["sample"].sort()

    def _entries_of(self, feature: str, code: str) -> pl.DataFrame:
        """Per sample that has a code: `places` it stands at, its `relevance` there, its mean `lift`, the first `time`.

        As `rollout.results.places` has them: the place the model reads is left out of all but `time`; where a code
        stands there only, `places` is 0, and relevance and lift are null.
        """
        mine = (pl.col("feature") == feature) & (pl.col("code") == code)
        records = self.index.records.filter(pl.col("feature") == feature).drop("feature").lazy()
        place, last = place_of(), pl.col("last").cast(pl.Int64)
        rows = self.cohort.attributions.filter(mine).select(
            "sample", place, "time", relevance=pl.col("attribution").cast(pl.Float64)
        )
        rows = rows.join(records, on="sample").with_columns(pl.col("place").clip(upper_bound=last))
        if self.cohort.granularity.get(feature) != "code":  # a code may stand at one place more than once
            rows = rows.group_by("sample", "place", "last", "even").agg(
                pl.col("relevance").mean(), pl.col("time").min()
            )
        read = self.cohort.read_position
        where = pl.lit(read, pl.Int64) if read is None or read >= 0 else last + 1 + read
        relevance = pl.when((pl.col("place") != where).fill_null(True)).then(pl.col("relevance"))
        lift = pl.when(pl.col("even") > 0).then(relevance / pl.col("even")).otherwise(relevance * 0.0)
        sums = (
            rows.select("sample", "time", relevance=relevance, lift=lift)
            .group_by("sample")
            .agg(pl.col("relevance").count().alias("places"), pl.col("relevance", "lift").sum(), pl.col("time").min())
            .collect(engine="streaming")
        )
        there = pl.when(pl.col("places") > 0)
        return sums.with_columns(there.then(pl.col("relevance")), there.then(pl.col("lift") / pl.col("places")))

    def samples_of(self, asked: OneCode) -> pl.DataFrame:
        """The samples that have a code, with its `places`, `relevance`, `lift` and `time` in each.

        Raises:
            BadQuestionError: If there is no such feature, or it has no such code.
        """
        self._check_feature(asked.feature)
        if self.codes(asked.code, asked.feature).filter(pl.col("code") == asked.code).is_empty():
            raise BadQuestionError(f"code: {shown(asked.feature, 40)} has no {shown(asked.code, 60)!r} in this cohort")
        found = self.samples.join(self.entries_of(asked.feature, asked.code), on="sample", maintain_order="left")
        columns = {"entries": "places", "length": "entries"}
        return self._sorted(found, columns.get(asked.sort, asked.sort), asked.order)

    def _check_feature(self, feature: str | None) -> None:
        if feature is not None and feature not in self.features:
            known = shown(", ".join(self.features), 200)
            raise BadQuestionError(f"feature must be one of {known}, got {shown(repr(feature), 60)}")


def page_of(found: pl.DataFrame, number: int) -> tuple[pl.DataFrame, Mapping[str, int]]:
    """The rows of a page, and `page`, `pages`, `first`, `last`, `total`; a page past the last is the last."""
    pages = max(-(-found.height // PAGE), 1)
    page = min(number, pages)
    rows = found.slice((page - 1) * PAGE, PAGE)
    first = (page - 1) * PAGE + 1
    return rows, {
        "page": page, "pages": pages, "first": first, "last": first + rows.height - 1, "total": found.height,
    }  # fmt: skip
