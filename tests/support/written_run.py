"""Writes the folder of a cohort run from records written out by hand, as the engine writes it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from rollout.cohort.rows import write_parquet
from rollout.results.layout import ATTRIBUTION_SCHEMA, PREDICTION_SCHEMA

HOSTILE = "</script><script>alert('x')</script>"
NASTY = (
    HOSTILE,
    '<img src=x onerror="fetch(1)">',
    "a \"quoted\" 'code' & more",
    "двойной → 診断 😀",
    "{{ 7*7 }} {% raw %}",
    "$x^2$ \\frac",
    "",
)
"""Codes, names and ids that must come through unchanged and do no harm."""


@dataclass
class Record:
    """One sample: feature → entries.

    An entry is ``(code, score)`` of a flat feature, ``([codes], score)`` of a visit, ``(code, score, time)`` or
    ``(None, score, time)`` of a timed one.
    """

    patient: str
    features: Mapping[str, Sequence[tuple[Any, ...]]]
    prob: Sequence[float] = (0.5,)
    true: Sequence[float] | None = (0.0,)
    visit: str | None = None
    padding: Sequence[float | None] | None = None


@dataclass
class Run:
    """What is to stand in the manifest beyond the counts."""

    status: str = "complete"
    model: str = "pyhealth.models.transformer.Transformer"
    failures: Mapping[int, str] = field(default_factory=dict)
    names: Mapping[str, Mapping[str, str]] | None = None
    notes: Sequence[Any] = ()
    dataset: str = "demo"
    task: str = "mortality"


def write_run(folder: Path, records: Sequence[Record], run: Run | None = None, part_samples: int = 3) -> Path:
    """Write the records as samples 0, 1, … (those in ``run.failures`` fail), ``part_samples`` in a part."""
    run = run or Run()
    rows = [row for number, record in enumerate(records) if number not in run.failures for row in _rows(number, record)]
    parts = range(0, len(records), part_samples)
    for part, start in enumerate(parts):
        numbers = range(start, min(start + part_samples, len(records)))
        name = f"part-{part:05d}.parquet"
        write_parquet(
            _table(ATTRIBUTION_SCHEMA, [row for row in rows if row[0] in numbers]), folder / "attributions" / name
        )
        good = [n for n in numbers if n not in run.failures]
        predicted = [
            (n, records[n].patient, records[n].visit, records[n].prob, records[n].true, records[n].padding)
            for n in good
        ]
        write_parquet(_table(PREDICTION_SCHEMA, predicted), folder / "predictions" / name)
        failed = [(n, run.failures[n]) for n in numbers if n in run.failures]
        if failed:
            schema = pa.schema([("sample", pa.int64()), ("error", pa.string())])
            write_parquet(_table(schema, failed), folder / "failures" / name)
        (folder / "parts").mkdir(exist_ok=True)
        (folder / "parts" / f"part-{part:05d}.json").write_text("{}", encoding="utf-8")
    if run.names is not None:
        (folder / "code_names.json").write_text(json.dumps(run.names), encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps(_manifest(records, rows, run, len(parts))), encoding="utf-8")
    return folder


def _rows(number: int, record: Record) -> list[tuple[Any, ...]]:
    rows = []
    for feature, entries in record.features.items():
        for place, (code, score, *time) in enumerate(entries):
            head = (number, record.patient, record.visit, feature)
            tail = (time[0] if time else None, score)
            if isinstance(code, list):
                rows += [(*head, place, position, one, *tail) for position, one in enumerate(code)]
            else:
                rows.append((*head, None, place, code, *tail))
    return rows


def _table(schema: pa.Schema, rows: Sequence[Sequence[Any]]) -> pa.Table:
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in schema]
    return pa.Table.from_arrays(
        [pa.array(column, kind.type) for column, kind in zip(columns, schema, strict=True)], schema=schema
    )


def _manifest(records: Sequence[Record], rows: Sequence[tuple[Any, ...]], run: Run, parts: int) -> dict[str, Any]:
    granularity = {}
    for row in rows:
        granularity[row[3]] = "visit" if row[4] is not None else ("step" if row[6] is None else "code")
    failed = len(run.failures)
    return {
        "schema_version": 1,
        "status": run.status,
        "identity": {
            "model": {"class": run.model, "parameters": 1234567, "fingerprint": "ab" * 32},
            "dataset": {
                "name": run.dataset, "task": run.task, "samples": len(records), "fingerprint": "cd" * 32,
                "features": list(granularity),
            },
            "method": {
                "name": "rollout", "head_fusion": "mean", "residual": 0.5, "attention": None, "renormalize": True,
                "discard_ratio": 0.0, "start_layer": 0, "gradients": None,
            },
            "plan": {"batch_tokens": 8192, "batch_samples": 256, "part_samples": 2048},
            "readout": "model",
            "backend": "auto",
            "target_class": None,
        },
        "granularity": granularity,
        "columns": {"attributions": ATTRIBUTION_SCHEMA.names, "predictions": PREDICTION_SCHEMA.names},
        "counts": {
            "samples": len(records), "attributed": len(records) - failed, "failed": failed, "rows": len(rows),
            "parts": parts,
        },
        "sessions": [
            {
                "started": "2026-01-01T10:00:00+00:00", "finished": "2026-01-01T10:00:09+00:00",
                "samples": len(records) - failed, "elapsed": 9.25, "peak_bytes": 3 << 30, "device": "cpu", "threads": 2,
                "workers": 1, "seconds": {"collate": 1.0, "forward": 6.5, "chain": 1.25, "write": 0.5},
                "versions": {"torch": "2.15.0", "attention-rollout": "0.1.0"},
            }
        ],
        "notes": list(run.notes),
    }  # fmt: skip
