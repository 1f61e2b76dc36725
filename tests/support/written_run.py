"""Writes the folder of a cohort run from records written out by hand, as the engine writes it."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from rollout.cohort.rows import parquet_bytes
from rollout.results.layout import ATTRIBUTION_SCHEMA, FAILURE_SCHEMA, MANIFEST, NAMES, PREDICTION_SCHEMA, RECORDS
from rollout.results.manifest import Manifest, PartRecord, SessionEntry, signed
from rollout.results.padding import count_padding

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

    An entry is `(code, score)` of a flat feature, `([codes], score)` of a visit, `(code, score, time)` or
    `(None, score, time)` of a timed one.
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
    notes: Sequence[str] = ()
    dataset: str = "demo"
    task: str = "mortality"
    change: Callable[[list[tuple[Any, ...]]], list[tuple[Any, ...]]] = list
    """Of the attribution rows, before they are written."""
    time: Mapping[str, str | None] = field(default_factory=dict)
    labels: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
    method: Mapping[str, Any] = field(default_factory=dict)


def write_run(folder: Path, records: Sequence[Record], run: Run | None = None, part_samples: int = 3) -> Path:
    """Write the records as samples 0, 1, … (those in `run.failures` fail), `part_samples` in a part."""
    run = run or Run()
    rows = [row for number, record in enumerate(records) if number not in run.failures for row in _rows(number, record)]
    manifest, written = _manifest(records, rows, run), []
    rows = run.change(rows)
    for part, start in enumerate(range(0, len(records), part_samples)):
        numbers = range(start, min(start + part_samples, len(records)))
        good = [n for n in numbers if n not in run.failures]
        predicted = [(n, (one := records[n]).patient, one.visit, one.prob, one.true, one.padding) for n in good]
        tables = {
            "attributions": _table(ATTRIBUTION_SCHEMA, [row for row in rows if row[0] in numbers]),
            "predictions": _table(PREDICTION_SCHEMA, predicted),
            "failures": _table(FAILURE_SCHEMA, [(n, run.failures[n]) for n in numbers if n in run.failures]),
        }
        if len(good) == len(numbers):
            del tables["failures"]
        written.append(write_part(folder, part, numbers, tables, manifest.run, list(manifest.granularity)))
    manifest.count(written, len(written))
    manifest.status = run.status
    if run.names is not None:
        content = json.dumps(run.names).encode()
        (folder / NAMES).write_bytes(content)
        manifest.names = hashlib.sha256(content).hexdigest()
    (folder / MANIFEST).write_bytes(manifest.as_bytes())
    return folder


def write_part(
    folder: Path, part: int, numbers: range, tables: Mapping[str, pa.Table], run: str, features: Sequence[str] = ()
) -> PartRecord:
    """Write a part's files and its commit record."""
    files = {}
    for kind, table in tables.items():
        content = parquet_bytes(table)
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / f"part-{part:05d}.parquet").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        files[kind] = {"bytes": len(content), "sha256": digest, "rows": table.num_rows}
    failed = files["failures"]["rows"] if "failures" in files else 0
    record = PartRecord.checked(
        {
            "run": run, "part": part, "start": numbers.start, "stop": numbers.stop, "samples": len(numbers),
            "attributed": len(numbers) - failed, "failed": failed, "rows": tables["attributions"].num_rows,
            "tokens": tables["attributions"].num_rows, "batches": [len(numbers)], "halved": [], "seconds": {},
            "padding": count_padding(tables["predictions"], features), "files": files,
        },
        "a part",
    )  # fmt: skip
    (folder / RECORDS).mkdir(exist_ok=True)
    (folder / RECORDS / f"part-{part:05d}.json").write_bytes(record.as_bytes())
    return record


def edit(path: Path, **fields: Any) -> None:
    """Change fields of a manifest or a commit record, so that it holds what was written again; `...` removes one."""
    value = json.loads(path.read_bytes())
    del value["sha256"]
    kept = {key: field for key, field in {**value, **fields}.items() if field is not ...}
    path.write_bytes(signed(kept))


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


def _manifest(records: Sequence[Record], rows: Sequence[tuple[Any, ...]], run: Run) -> Manifest:
    granularity = {}
    for row in rows:
        granularity[row[3]] = "visit" if row[4] is not None else ("step" if row[6] is None else "code")
    session: SessionEntry = {
        "started": "2026-01-01T10:00:00+00:00", "finished": "2026-01-01T10:00:09+00:00",
        "samples": len(records) - len(run.failures), "elapsed": 9.25, "peak_bytes": 3 << 30, "device": "cpu",
        "threads": 2, "workers": 1, "seconds": {"collate": 1.0, "forward": 6.5, "chain": 1.25, "write": 0.5},
        "versions": {"torch": "2.15.0", "attention-rollout": "0.1.0"},
    }  # fmt: skip
    identity = {
        "model": {"class": run.model, "parameters": 1234567, "fingerprint": "ab" * 32},
        "dataset": {
            "name": run.dataset, "task": run.task, "samples": len(records), "fingerprint": "cd" * 32,
            "features": list(granularity),
        },
        "method": {
            "name": "rollout", "head_fusion": "mean", "residual": 0.5, "attention": None, "renormalize": True,
            "discard_ratio": 0.0, "start_layer": 0, "gradients": None, **run.method,
        },
        "plan": {"batch_tokens": 8192, "batch_samples": 256, "part_samples": 2048},
        "readout": "model",
        "backend": "auto",
        "target_class": None,
    }  # fmt: skip
    return Manifest.of(
        identity, sessions=[session], notes=list(run.notes), granularity=granularity, time=run.time, labels=run.labels
    )
