"""A cohort run over a MEDS folder written as MEDS: every event with its attribution, and the predictions.

OUT/data/<shard>.parquet        MEDS's events, one row per event of each record, with the columns of `FIELDS`
OUT/predictions.parquet         in the schema of meds-evaluation, of binary tasks
OUT/metadata/codes.parquet      of the codes that occur
OUT/metadata/dataset.json       what the columns are
OUT/metadata/manifest.json      of the run
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from rollout.cohort.content import changed
from rollout.data.meds.dataset import FEATURE, MedsDataset
from rollout.data.meds.write import EVENT_FIELDS, LABEL_FIELDS, whole_folder, write_metadata, write_table
from rollout.files import write_json
from rollout.results.folder import RunFolder
from rollout.results.layout import TARGET
from rollout.runfile.events import EventsRun
from rollout.runfile.file import read_run_file

FIELDS = {
    **EVENT_FIELDS,
    "prediction_time": pa.timestamp("us"),
    "attribution": pa.float32(),
    "token": pa.string(),
    "sample": pa.int64(),
    "position": pa.int32(),
}
"""Columns of the attributions; `target_class` after them, where scores are for a class."""
PREDICTION_FIELDS = {
    **LABEL_FIELDS,
    "predicted_boolean_value": pa.bool_(),
    "predicted_boolean_probability": pa.float64(),
}
THRESHOLD = 0.5
"""From this probability on true is predicted."""


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        out: The folder.
        samples: Records with attributions.
        rows: Events, over all records.
        predictions: Rows of `predictions.parquet`; None: the task is not binary, and there is no such file.
    """

    out: Path
    samples: int
    rows: int
    predictions: int | None

    def __str__(self) -> str:
        said = (
            "no predictions.parquet: the task is not binary"
            if self.predictions is None
            else f"{self.predictions:,} predictions"
        )
        return f"{self.rows:,} events of {self.samples:,} records, {said}: {self.out}"


def write_run_file(path: str | Path, out: str | Path, attributed: str | Path | None = None) -> Written:
    """Write what a run file of a classifier over a MEDS folder gave.

    Args:
        path: The run file.
        out: New or empty folder.
        attributed: The folder of the run; None: the file's `[run] output`.

    Raises:
        ValueError: If the run file is of PyHealth's samples, which have no prediction times; as `write_attributions`.
    """
    run = read_run_file(path)
    if not isinstance(run, EventsRun):
        raise ValueError(
            f'{run.path}: attributions are written as MEDS of a run over [dataset] class = "MEDS" only; the samples of '
            f"{run.source.dataset} have no subject_id and prediction_time"
        )
    folder = attributed if attributed is not None else run.output
    if folder is None:
        raise ValueError(f"{run.path}: [run] needs output, or give --attributed")
    return write_attributions(folder, run.samples(), out)


def write_attributions(folder: str | Path, dataset: MedsDataset, out: str | Path) -> Written:
    """Write the attributions and predictions of a cohort run as MEDS; shard by shard, so that memory is that of one.

    Args:
        folder: Of the run, complete; every sample of it is read again and must be what was attributed.
        dataset: That it was made of.
        out: New or empty folder; it is there whole or not at all.

    Raises:
        ValueError: If `folder` is no complete run over this dataset, or `out` holds anything.
    """
    run = RunFolder(folder)
    _check_run(run, dataset)
    samples = rows = 0
    used: set[str] = set()
    with whole_folder(out, "out") as made:
        for shard, numbers in _by_shard(dataset):
            found = _shard_rows(run, dataset, numbers)
            if len(found):
                fields = {**FIELDS, TARGET.name: TARGET.type} if TARGET.name in found.columns else FIELDS
                write_table(found, fields, made / "data" / f"{dataset.folder.name(shard)}.parquet")
            samples, rows = samples + found["sample"].n_unique(), rows + len(found)
            used.update(found["code"].unique())
        predictions = _predictions(run, dataset)
        if predictions is not None:
            write_table(predictions, PREDICTION_FIELDS, made / "predictions.parquet")
        codes = pl.DataFrame({"code": sorted(used)}, schema={"code": pl.String})
        said = {
            "dataset_name": f"attributions of {dataset.task_name}",
            "raw_source_id_columns": ["sample", "position"],
            "code_modifier_columns": ["token"],
            "other_extension_columns": [name for name in FIELDS if name not in EVENT_FIELDS and name != "token"],
        }
        write_metadata(made, codes.join(dataset.folder.codes(), on="code", how="left"), said)
        write_json(run.manifest.as_dict(), made / "metadata" / "manifest.json")
    return Written(Path(out), samples, rows, None if predictions is None else len(predictions))


def _check_run(run: RunFolder, dataset: MedsDataset) -> None:
    if "attributions" not in run.kinds:
        raise ValueError(f"folder must be of attributions, got {run.path}: it is of an evaluation")
    if not run.complete:
        raise ValueError(
            f"folder must be of a complete run, got {run.path}: run the same attribution again to finish it"
        )
    said = run.manifest.identity["dataset"]
    if said["samples"] != len(dataset) or said["features"] != [FEATURE]:
        raise ValueError(
            f"folder must be of the records of {dataset.task_name}: {run.path} is of {said['samples']:,} samples with "
            f"the features {', '.join(said['features'])}, the dataset has {len(dataset):,} with {FEATURE}"
        )
    other = list(changed(dataset, run.records))
    if other:
        named = ", ".join(map(str, other[:5])) + ", …" * (len(other) > 5)
        raise ValueError(f"{len(other):,} records are not those that were attributed in {run.path}: samples {named}")


def _by_shard(dataset: MedsDataset) -> list[tuple[int, list[int]]]:
    """Each shard with the samples that stand in it, in order."""
    numbered = dataset.labels.with_row_index("sample")
    return list(numbered.group_by("shard", maintain_order=True).agg("sample").rows())


def _shard_rows(run: RunFolder, dataset: MedsDataset, numbers: list[int]) -> pl.DataFrame:
    """Events with their attributions, by subject and time."""
    parts, within = run.holding(numbers), pl.col("sample").is_between(numbers[0], numbers[-1])
    scores = run.scan("attributions", parts).filter(within).select("sample", "position", "attribution", token="code")
    attributed = scores.collect()
    known = attributed["sample"].unique().sort().to_list()
    empty = pl.DataFrame(
        schema={"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String, "numeric_value": pl.Float32}
    )
    events = [
        dataset.events(number)
        .select(*empty.columns)
        .with_columns(sample=pl.lit(number, pl.Int64), position=pl.int_range(pl.len(), dtype=pl.Int32))
        for number in known
    ]
    record = pl.concat([empty.with_columns(sample=pl.lit(0, pl.Int64), position=pl.lit(0, pl.Int32)), *events])
    rows = record.join(attributed, on=["sample", "position"])
    if not len(rows) == len(record) == len(attributed):
        raise ValueError(
            f"{run.path} does not have one attribution for each event of the records {known[0]} … {known[-1]}"
        )
    times = dataset.labels.with_row_index("sample").select(pl.col("sample").cast(pl.Int64), "prediction_time")
    rows = rows.join(times, on="sample")
    predictions = run.scan("predictions", parts)
    if TARGET.name in predictions.collect_schema():
        rows = rows.join(predictions.select("sample", TARGET.name).collect(), on="sample", how="left")
    return rows.sort("subject_id", "time", "sample", "position", nulls_last=False)


def _predictions(run: RunFolder, dataset: MedsDataset) -> pl.DataFrame | None:
    """In the schema of meds-evaluation; None for a task that is not binary."""
    if dataset.kind not in (None, "boolean_value"):
        return None
    found = run.scan("predictions").select("sample", "y_prob").collect()
    widths: list[Any] = found["y_prob"].list.len().unique().to_list()
    if found["y_prob"].has_nulls() or not set(widths) <= {1, 2}:
        return None
    labels = dataset.labels.with_row_index("sample").with_columns(pl.col("sample").cast(pl.Int64))
    probability = pl.col("y_prob").list.last().cast(pl.Float64)
    return labels.join(found, on="sample").select(
        "subject_id",
        "prediction_time",
        boolean_value=pl.col("value").cast(pl.Boolean),
        predicted_boolean_value=probability >= THRESHOLD,
        predicted_boolean_probability=probability,
    )
