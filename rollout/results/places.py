"""Sums over the rows of one part of a cohort, and how the sums of many parts become one table.

A cohort's rows never stand in memory together. A sample's rows lie in one part, so what concerns a record is worked
out part by part, and only sums per code or per place, as many as there are codes or places, are carried on.

What has a score of its own is a *place*: a position of a flat feature, a visit of a nested one. A nested feature's rows
carry the visit's score once per code; here a place counts once, however many codes stand in it. So

- the relevance of a record is the sum over its places, not over its rows;
- ``lift`` of a place = its relevance × number of the record's places / their total: 1 is what an even spread would
  give, whatever the length of the record and whatever the method's relevance sums to. A record whose total is 0 has
  lift 0;
- the relevance of a code in a record is the sum over the places it stands in. For a nested feature that is the
  relevance of its visits, which it shares with the other codes there: such numbers do not add up over codes.
"""

from collections.abc import Iterable, Sequence

import polars as pl

RECORD = ["sample", "feature"]
MERGE_EVERY = 32


def code_sums(rows: pl.DataFrame, read_position: int | None, labels: pl.DataFrame | None) -> pl.DataFrame:
    """Sums per code of one part.

    Args:
        rows: Attribution rows of whole records.
        read_position: The place left out of every record; negative: counted from its end; None: none left out.
        labels: ``sample``, ``label``: split by label, a sample counting for each of its labels; None: no split.

    Returns:
        Per ``feature``, ``code`` (and ``label``) the sums ``relevance``, ``lift``, ``entries`` (places), ``records``
        (with such a place) and ``present`` (samples that have the code at any place).
    """
    places = _places(rows, read_position)
    cells = rows.lazy().filter(pl.col("code").is_not_null()).select(*RECORD, _PLACE, "code").unique()
    by_record = (
        cells.join(places, on=[*RECORD, "place"], how="left")
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


def place_sums(rows: pl.DataFrame, nested: bool, from_end: bool, read_position: int | None) -> pl.DataFrame:
    """Sums per place of one part: ``relevance``, ``lift``, ``records``, of nested features or of the flat ones."""
    kind = pl.col("visit").is_not_null() if nested else pl.col("visit").is_null()
    places = _places(rows.filter(kind), read_position)
    if from_end:
        places = places.with_columns(place=pl.col("last") - pl.col("place"))
    return places.group_by("feature", "place").agg(
        pl.col("relevance", "lift").sum(), pl.len().alias("records")
    ).collect()  # fmt: skip


def length_counts(rows: pl.DataFrame) -> pl.DataFrame:
    """How many ``records`` of one part have which ``length``, by ``feature`` and ``unit`` (entries, visits)."""
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
    """Add up the sums of the parts by ``keys``, holding ``MERGE_EVERY`` of them at a time; None when there is none."""
    held: list[pl.DataFrame] = []
    for part in partials:
        held.append(part)
        if len(held) > MERGE_EVERY:
            held = [_added(held, keys)]
    return _added(held, keys) if held else None


def _added(held: Sequence[pl.DataFrame], keys: Sequence[str]) -> pl.DataFrame:
    sums = pl.exclude(keys)
    return pl.concat(held).group_by(keys, maintain_order=True).agg(sums.sum()).sort(keys)


_PLACE = pl.coalesce("visit", "position").alias("place")


def _places(rows: pl.DataFrame, read_position: int | None) -> pl.LazyFrame:
    """The places of every record but the one read, each with its ``relevance`` and ``lift``, and the ``last`` place."""
    score = pl.col("attribution").cast(pl.Float64).mean().alias("relevance")
    places = rows.lazy().group_by(*RECORD, _PLACE).agg(score).with_columns(last=pl.col("place").max().over(RECORD))
    if read_position is not None:
        read = pl.lit(read_position) if read_position >= 0 else pl.col("last") + 1 + read_position
        places = places.filter(pl.col("place") != read)
    total = pl.col("relevance").sum().over(RECORD)
    lift = pl.when(total > 0).then(pl.col("relevance") * pl.len().over(RECORD) / total).otherwise(0.0)
    return places.with_columns(lift=lift)
