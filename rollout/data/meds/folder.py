"""A MEDS folder: its shards of events, which subject stands in which, and what is known of its codes."""

from collections.abc import Iterable
from pathlib import Path

import polars as pl

from rollout.data.meds.tables import (
    CODE_DETAILS,
    CODE_NAMES,
    CODES,
    DATA,
    EVENTS,
    SPLITS,
    SUBJECT,
    VALUES,
    collected,
    parquet_files,
    read_columns,
    scan_table,
)
from rollout.files import usable_path

VISITS = ("hadm_id", "visit_id", "encounter_id")
"""Further columns of events that name the visit, the first that is there."""


class MedsFolder:
    """A folder in the Medical Event Data Standard, opened for reading; of its events only footers are read.

    Attributes:
        root: The folder.
        shards: The files of its events, in the order of their names.

    Args:
        root: With `data/**/*.parquet`; `metadata/codes.parquet` and `metadata/subject_splits.parquet` where they are.

    Raises:
        ValueError: If there is no such folder, it has no events, or a column lacks or is of another type.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = usable_path(root, "MEDS root")
        if not self.root.is_dir():
            what = "that is a file" if self.root.exists() else "no such folder"
            raise ValueError(f"MEDS root must be a folder with data/**/*.parquet, got {self.root}: {what}")
        self.shards = parquet_files(self.root / DATA) if (self.root / DATA).is_dir() else []
        if not self.shards:
            raise ValueError(f"MEDS root must be a folder with data/**/*.parquet, got {self.root}: it has no such file")
        for shard in self.shards:
            scan_table(shard, EVENTS, VALUES, "MEDS events")

    def name(self, shard: int) -> str:
        """The name of a shard, such as `train/0`."""
        return self.shards[shard].relative_to(self.root / DATA).with_suffix("").as_posix()

    def subjects(self) -> pl.DataFrame:
        """`subject_id`, `shard`: in which of `shards` each subject stands, one column of each read.

        Raises:
            ValueError: If a shard is damaged, has an event of no subject, or a subject stands in two.
        """
        held = []
        for number, shard in enumerate(self.shards):
            found = collected(
                scan_table(shard, SUBJECT, {}, "MEDS events").select(*SUBJECT).unique(), shard, "MEDS events"
            )
            if found["subject_id"].has_nulls():
                raise ValueError(f"MEDS events must each have a subject_id: {shard} has some without")
            held.append(found.with_columns(shard=pl.lit(number, pl.Int32)))
        subjects = pl.concat(held)
        twice = subjects.filter(pl.col("subject_id").is_duplicated()).sort("subject_id", "shard")
        if len(twice):
            one, other = (self.shards[number] for number in twice["shard"][:2])
            raise ValueError(
                f"MEDS events: a subject must stand in one file, {twice['subject_id'][0]} is in {one} and {other}"
            )
        return subjects

    def events(self, shard: int, subjects: pl.Series | None = None) -> pl.DataFrame:
        """The events of a shard by subject and time, those without a time first; equal times stay in order.

        Args:
            shard: Its number.
            subjects: Of these only, int64.

        Returns:
            `subject_id`, `time`, `code`, `numeric_value` and `visit_id`, the last two null where the table has none.

        Raises:
            ValueError: If the shard is damaged, or an event has no code.
        """
        path = self.shards[shard]
        there = read_columns(path, "MEDS events")
        visit = next((name for name in VISITS if name in there), None)
        number = pl.lit(None) if visit is None else pl.col(visit)
        if visit is not None and there[visit].is_float():  # what a null makes of a column of numbers in pandas
            number = number.cast(pl.Int64)
        frame = scan_table(path, EVENTS, VALUES, "MEDS events").select(
            *EVENTS, *VALUES, visit_id=number.cast(pl.String)
        )
        if subjects is not None:
            frame = frame.filter(pl.col("subject_id").is_in(subjects.implode()))
        events = collected(frame, path, "MEDS events")
        if events["code"].has_nulls():
            raise ValueError(f"MEDS events must each have a code: {path} has some without")
        return events.sort("subject_id", "time", nulls_last=False, maintain_order=True)

    def codes(self) -> pl.DataFrame:
        """`code`, `description`, `parent_codes` of `metadata/codes.parquet`; no row where there is no such file.

        Raises:
            ValueError: If it cannot be read, or a column lacks or is of another type.
        """
        path = self.root / CODES
        if not path.is_file():
            return pl.DataFrame(schema={**CODE_NAMES, **CODE_DETAILS})
        found = collected(
            scan_table(path, CODE_NAMES, CODE_DETAILS, "MEDS codes").select(*CODE_NAMES, *CODE_DETAILS),
            path,
            "MEDS codes",
        )
        return found.filter(pl.col("code").is_not_null()).unique("code", keep="first", maintain_order=True)

    def described(self, codes: Iterable[str]) -> dict[str, str]:
        """Code → its description, of those codes that have one."""
        named = self.codes().filter(pl.col("description").str.len_chars() > 0)
        names = dict(named.select("code", "description").rows())
        return {code: names[code] for code in codes if code in names}

    def parents(self) -> dict[str, list[str]]:
        """Code → its parent codes, of the codes that have some, as `CohortAttributions.top_groups` takes groups."""
        placed = self.codes().select("code", pl.col("parent_codes").list.drop_nulls())
        return dict(placed.filter(pl.col("parent_codes").list.len() > 0).rows())

    def split(self, name: str) -> pl.Series:
        """The subjects of a split, by `metadata/subject_splits.parquet`.

        Raises:
            ValueError: If there is no such file or no such split.
        """
        path = self.root / SPLITS
        if not path.is_file():
            raise ValueError(f"split {name!r} needs {SPLITS}, which {self.root} does not have")
        table = collected(scan_table(path, {**SUBJECT, "split": pl.String()}, {}, "MEDS splits"), path, "MEDS splits")
        chosen = table.filter(pl.col("split") == name)["subject_id"]
        if chosen.is_empty():
            raise ValueError(f"split must be one of {sorted(table['split'].drop_nulls().unique())}, got {name!r}")
        return chosen
