"""The places of a record: their relevance, their lift, whether the model reads there; and sums of these over records.

Whatever shows a lift takes it from here. What has a score of its own is a *place*: a position of a flat feature, a
visit of a nested one, the whole of one that has a single score for all its codes, such as a multi-hot one. A nested
feature's rows carry the visit's score once per code; a place counts once, however many codes stand in it. So

- the relevance of a record is the sum over its places, not over its rows;
- the place *read* is the one the model reads its answer at. It keeps the residual's share whatever stands there, and
  has no lift;
- `even` is the relevance each of the record's other places would have if what they have were spread evenly: the sum of
  its size over them / their number;
- `lift` of a place = relevance / even: 1 is what an even spread would give, whatever the length of the record and
  whatever the method's relevance sums to. Where relevance is negative so is lift. A record whose other places have no
  relevance has lift 0;
- the relevance of a code in a record is the sum over the places it stands in. For a nested feature that is the
  relevance of its visits, which it shares with the other codes there: such numbers do not add up over codes.

A cohort's rows never stand in memory together. A sample's rows lie in one part, so what concerns a record is worked
out part by part, and only sums per code or per place, as many as there are codes or places, are carried on.
"""

from collections.abc import Collection, Iterable, Sequence

import polars as pl

RECORD = ["sample", "feature"]
MERGE_EVERY = 32


def place_of(whole: Collection[str] = ()) -> pl.Expr:
    """The place of a row; `whole`: the features that have one score for all their codes, where they are equal."""
    place, score = pl.coalesce("visit", "position").cast(pl.Int64), pl.col("attribution")
    if not whole:
        return place.alias("place")
    one = pl.col("feature").is_in(list(whole)) & (score.min().over(RECORD) == score.max().over(RECORD))
    return pl.when(one).then(0).otherwise(place).alias("place")


def find_places(rows: pl.DataFrame, read_position: int | None, whole: Collection[str] = ()) -> pl.LazyFrame:
    """Return the places of every record.

    Args:
        rows: Attribution rows of whole records: `sample`, `feature`, `visit`, `position`, `attribution`.
        read_position: The place the model reads in every record; negative: counted from its end; None: none.
        whole: The features that have one score for all their codes.

    Returns:
        Per `sample`, `feature`, `place`: `relevance`; `last`, the record's last place; `read`, whether the model reads
        there; `even` and `lift`, null at the place read.

    Raises:
        ValueError: If a row has no feature, no place from 0 on, or no finite attribution.
    """
    _check_rows(rows)
    score = pl.col("attribution").cast(pl.Float64).mean().alias("relevance")
    places = (
        rows.lazy().group_by(*RECORD, place_of(whole)).agg(score).with_columns(last=pl.col("place").max().over(RECORD))
    )
    where = pl.lit(read_position) if read_position is None or read_position >= 0 else pl.col("last") + 1 + read_position
    relevance, even, other = pl.col("relevance"), pl.col("even"), ~pl.col("read")
    size = pl.when(other).then(relevance.abs())
    return (
        places.with_columns(read=(pl.col("place") == where).fill_null(False))
        .with_columns(even=pl.when(other).then(size.mean().over(RECORD)))
        .with_columns(lift=pl.when(even > 0).then(relevance / even).when(other).then(0.0))
    )


def _check_rows(rows: pl.DataFrame) -> None:
    good = pl.col("feature").is_not_null() & (place_of() >= 0) & pl.col("attribution").is_finite()
    bad = rows.filter(~good.fill_null(False)).head(1)
    for sample, feature, place, attribution in bad.select(*RECORD, place_of(), "attribution").rows():
        raise ValueError(
            "attributions must have a feature, a place from 0 on and a finite attribution in every row, got feature "
            f"{feature!r}, place {place}, attribution {attribution} of sample {sample}"
        )


def find_cells(
    rows: pl.DataFrame, read_position: int | None, whole: Collection[str] = (), groups: pl.DataFrame | None = None
) -> pl.LazyFrame:
    """Return every code at every place it stands in, once, however often it stands there.

    Args:
        rows, read_position, whole: As in `find_places`.
        groups: `code`, `group`: groups instead of codes, a group once at a place, however many of its codes stand
            there; null is a group too. A code that is not in it stands nowhere.

    Returns:
        Per `sample`, `feature`, `place`, `code`: `relevance` and `lift` of the place; null at the place read.
    """
    places = find_places(rows, read_position, whole).filter(~pl.col("read"))
    cells = rows.lazy().filter(pl.col("code").is_not_null()).select(*RECORD, place_of(whole), "code")
    if groups is not None:
        cells = cells.join(groups.lazy(), on="code").select(*RECORD, "place", code="group")
    scores = places.select(*RECORD, "place", "relevance", "lift")
    return cells.unique().join(scores, on=[*RECORD, "place"], how="left")


def code_sums(
    rows: pl.DataFrame, read_position: int | None, labels: pl.DataFrame | None, whole: Collection[str] = ()
) -> pl.DataFrame:
    """Sums per code of one part.

    Args:
        rows: Attribution rows of whole records.
        read_position: As in `find_places`; that place is left out.
        labels: `sample`, `label`: split by label, a sample counting for each of its labels; None: no split.
        whole: As in `find_places`.

    Returns:
        Per `feature`, `code` (and `label`) the sums `relevance`, `lift`, `entries` (places), `records` (with such a
        place) and `present` (samples that have the code at any place).
    """
    by_record = (
        find_cells(rows, read_position, whole)
        .group_by(*RECORD, "code")
        .agg(pl.col("relevance", "lift").sum(), pl.col("relevance").count().alias("entries"))
    )
    keys = ["feature", "code"]
    if labels is not None:
        by_record = by_record.join(labels.lazy(), on="sample")
        keys.append("label")
    return by_record.group_by(keys).agg(
        pl.col("relevance", "lift", "entries").sum(),
        (pl.col("entries") > 0).sum().alias("records").cast(pl.UInt32),
        pl.len().alias("present"),
    ).collect()  # fmt: skip


def place_sums(
    rows: pl.DataFrame, nested: bool, from_end: bool, read_position: int | None, whole: Collection[str] = ()
) -> pl.DataFrame:
    """Sums per place of one part: `relevance`, `lift`, `records`, of nested features or of the flat ones."""
    kind = pl.col("visit").is_not_null() if nested else pl.col("visit").is_null()
    places = find_places(rows.filter(kind), read_position, whole).filter(~pl.col("read"))
    if from_end:
        places = places.with_columns(place=pl.col("last") - pl.col("place"))
    return places.group_by("feature", "place").agg(
        pl.col("relevance", "lift").sum(), pl.len().alias("records")
    ).collect()  # fmt: skip


def length_counts(rows: pl.DataFrame) -> pl.DataFrame:
    """How many `records` of one part have which `length`, by `feature` and `unit` (entries, visits)."""
    entries = pl.len().cast(pl.Int64).alias("entries")
    visits = pl.col("visit").drop_nulls().n_unique().cast(pl.Int64).alias("visits")
    each = (
        rows.lazy()
        .group_by(RECORD)
        .agg(entries, visits)
        .unpivot(["entries", "visits"], index="feature", variable_name="unit", value_name="length")
        .filter((pl.col("unit") == "entries") | (pl.col("length") > 0))
    )
    return each.group_by("feature", "unit", "length").agg(pl.len().alias("records")).collect()


def merged(partials: Iterable[pl.DataFrame], keys: Sequence[str]) -> pl.DataFrame | None:
    """Add up the sums of the parts by `keys`, holding `MERGE_EVERY` of them at a time; None when there is none."""
    held: list[pl.DataFrame] = []
    for part in partials:
        held.append(part)
        if len(held) > MERGE_EVERY:
            held = [_added(held, keys)]
    return _added(held, keys) if held else None


def _added(held: Sequence[pl.DataFrame], keys: Sequence[str]) -> pl.DataFrame:
    sums = pl.exclude(keys)
    return pl.concat(held).group_by(keys, maintain_order=True).agg(sums.sum()).sort(keys)
