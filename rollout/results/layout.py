"""The form of a cohort run's folder, for what writes it and what reads it: file names, columns, their version.

manifest.json                    what was run on what, and how far it is
parts/part-00000.json            the commit record of a part, written last
attributions/part-00000.parquet  a row per real entry of a record
predictions/part-00000.parquet   a row per sample
failures/part-00000.parquet      a row per sample that could not be attributed, if there are any
code_names.json                  feature → code → name, if they are known

The folder of an evaluation has, in place of attributions:

faithfulness/part-00000.parquet  a row per sample, method, direction and share
scores/part-00000.parquet        a row per sample and method
"""

from typing import Final

import pyarrow as pa

SCHEMA_VERSION = 2
"""Of the columns, of the manifest and of the commit records."""

ATTRIBUTER = "rollout.attribute_cohort"
EVALUATOR = "rollout.evaluate_cohort"
KINDS = ("attributions", "faithfulness", "scores", "predictions", "failures")
"""The folders of rows there are: a run has those of its `schemas`."""
MANIFEST, RECORDS, NAMES = "manifest.json", "parts", "code_names.json"
RUNNING: Final = "running"
COMPLETE: Final = "complete"
WITH_FAILURES: Final = "complete with failures"
STAGES = ("collate", "forward", "chain", "write")
"""What the seconds of attributing are counted by."""
EVALUATION_STAGES = ("collate", "attribute", "predict", "write")
"""What the seconds of evaluating are counted by."""

LOCK, SCRATCH = ".rollout.lock", ".workers"
CACHE = ".pyhealth-cache"
"""Where a run file's samples are prepared within an output that does not say otherwise."""

ATTRIBUTION_SCHEMA = pa.schema(
    [
        ("sample", pa.int64()),
        ("patient_id", pa.string()),
        ("visit_id", pa.string()),
        ("feature", pa.string()),
        ("visit", pa.int32()),
        ("position", pa.int32()),
        ("code", pa.string()),
        ("time", pa.float32()),
        ("attribution", pa.float32()),
    ]
)
PREDICTION_SCHEMA = pa.schema(
    [
        ("sample", pa.int64()),
        ("patient_id", pa.string()),
        ("visit_id", pa.string()),
        ("y_prob", pa.list_(pa.float32())),
        ("y_true", pa.list_(pa.float32())),
        ("padding_share", pa.list_(pa.float32())),
    ]
)
FAILURE_SCHEMA = pa.schema([("sample", pa.int64()), ("error", pa.string())])
TARGET = pa.field("target_class", pa.int32())
"""Column of the predictions of a class-specific method: the class its scores are for."""

SCHEMAS = {"attributions": ATTRIBUTION_SCHEMA, "predictions": PREDICTION_SCHEMA, "failures": FAILURE_SCHEMA}

WITHOUT, ONLY = "without", "only"
"""Directions: the top share taken out, and nothing else kept."""
FAITHFULNESS_SCHEMA = pa.schema(
    [
        ("sample", pa.int64()),
        ("method", pa.string()),
        ("direction", pa.string()),
        ("share", pa.float32()),
        ("codes", pa.int32()),
        ("probability", pa.float32()),
        ("drop", pa.float32()),
    ]
)
SCORES_SCHEMA = pa.schema(
    [
        ("sample", pa.int64()),
        ("method", pa.string()),
        ("recall", pa.float32()),
        ("planted_auc", pa.float32()),
        ("leave_one_out", pa.float32()),
    ]
)
EVALUATED_SCHEMA = pa.schema(
    [
        ("sample", pa.int64()),
        ("patient_id", pa.string()),
        ("visit_id", pa.string()),
        ("y_prob", pa.list_(pa.float32())),
        ("y_true", pa.list_(pa.float32())),
        ("target", pa.int32()),
        ("probability", pa.float32()),
        ("codes", pa.int32()),
        ("evaluated", pa.bool_()),
        ("batch", pa.int32()),
    ]
)
EVALUATION_SCHEMAS = {
    "faithfulness": FAITHFULNESS_SCHEMA,
    "scores": SCORES_SCHEMA,
    "predictions": EVALUATED_SCHEMA,
    "failures": FAILURE_SCHEMA,
}


def schemas(class_specific: bool) -> dict[str, pa.Schema]:
    """Kind → the columns of its files, in order."""
    return {**SCHEMAS, "predictions": PREDICTION_SCHEMA.append(TARGET)} if class_specific else SCHEMAS


def part_name(number: int) -> str:
    """The name of a part's files, without their ending."""
    return f"part-{number:05d}"
