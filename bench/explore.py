"""How fast `rollout explore` answers over a large cohort, and with how much memory: `python -m bench.explore FOLDER`.

Writes a cohort run of `--samples` samples to FOLDER unless one is there: seeded records of two features, drugs with
times and nested conditions, about fifty entries each. Then serves it as the command does, in a process of its own, asks
over HTTP, and prints the seconds of each question as JSON: the first answer, and the median of five of its kind with
other words, so that none was asked before.
"""

import argparse
import hashlib
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import ProxyHandler, build_opener

import numpy as np
import pyarrow as pa

from rollout.cohort.rows import parquet_bytes
from rollout.results.layout import ATTRIBUTION_SCHEMA, MANIFEST, PREDICTION_SCHEMA, RECORDS
from rollout.results.manifest import Manifest, PartRecord
from rollout.results.padding import count_padding

FEATURES = {"drugs": "code", "conditions": "visit"}
DRUGS, CONDITIONS, PART = 3000, 1200, 2048


def write_large_run(folder: Path, samples: int, seed: int = 0) -> Path:
    """Write a cohort run of seeded records, part by part."""
    manifest, written = _manifest(samples), []
    for part, start in enumerate(range(0, samples, PART)):
        numbers = range(start, min(start + PART, samples))
        written.append(_write_part(folder, part, numbers, manifest.run, np.random.default_rng([seed, part])))
    manifest.count(written, len(written))
    manifest.status = "complete"
    (folder / MANIFEST).write_bytes(manifest.as_bytes())
    return folder


def _manifest(samples: int) -> Manifest:
    identity = {
        "model": {"class": "pyhealth.models.transformer.Transformer", "parameters": 1000, "fingerprint": "ab" * 32},
        "dataset": {
            "name": "made for measuring", "task": "outcome", "samples": samples, "fingerprint": "cd" * 32,
            "features": list(FEATURES),
        },
        "method": {
            "name": "rollout", "head_fusion": "mean", "residual": 0.5, "attention": None, "renormalize": True,
            "discard_ratio": 0.0, "start_layer": 0, "gradients": None,
        },
        "plan": {"batch_tokens": 8192, "batch_samples": 256, "part_samples": PART},
        "readout": "model", "backend": "auto", "target_class": None,
    }  # fmt: skip
    return Manifest.of(identity, granularity=FEATURES, time={"drugs": "hours"})


def _write_part(folder: Path, part: int, numbers: range, run: str, rng: np.random.Generator) -> PartRecord:
    count = len(numbers)
    samples = np.arange(numbers.start, numbers.stop)
    patients, visits = pa.array([f"p{n // 2:07d}" for n in samples]), pa.array([f"v{n}" for n in samples])
    rows = pa.concat_tables([_drugs(samples, rng), _conditions(samples, rng)])
    rows = rows.take(pa.array(np.argsort(rows["sample"].to_numpy(), kind="stable")))
    place = rows["sample"].to_numpy() - numbers.start
    rows = rows.append_column("patient_id", patients.take(pa.array(place)))
    rows = rows.append_column("visit_id", visits.take(pa.array(place))).select(ATTRIBUTION_SCHEMA.names)
    prob = rng.beta(1.2, 4, count).astype(np.float32)
    predictions = pa.table(
        [
            pa.array(samples), patients, visits, pa.array([[p] for p in prob.tolist()]),
            pa.array([[float(x)] for x in rng.random(count) < prob]), pa.nulls(count),
        ],
        names=PREDICTION_SCHEMA.names,
    ).cast(PREDICTION_SCHEMA)  # fmt: skip
    tables, files = {"attributions": rows.cast(ATTRIBUTION_SCHEMA), "predictions": predictions}, {}
    for kind, table in tables.items():
        content = parquet_bytes(table)
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / f"part-{part:05d}.parquet").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        files[kind] = {"bytes": len(content), "sha256": digest, "rows": table.num_rows}
    record = PartRecord.checked(
        {
            "run": run, "part": part, "start": numbers.start, "stop": numbers.stop, "samples": count,
            "attributed": count, "failed": 0, "rows": rows.num_rows, "tokens": rows.num_rows, "batches": [count],
            "halved": [], "seconds": {}, "padding": count_padding(predictions, list(FEATURES)), "files": files,
        },
        "a part",
    )  # fmt: skip
    (folder / RECORDS).mkdir(exist_ok=True)
    (folder / RECORDS / f"part-{part:05d}.json").write_bytes(record.as_bytes())
    return record


def _drugs(samples: np.ndarray, rng: np.random.Generator) -> pa.Table:
    """Flat entries with times: log-normal lengths, codes after Zipf."""
    lengths = np.clip(rng.lognormal(3.2, 0.8, len(samples)), 1, 400).astype(int)
    owner = np.repeat(np.arange(len(samples)), lengths)
    position = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    time = np.round(720 * position / lengths[owner], 1)
    return _rows(samples[owner], "drugs", None, position, _codes("drug", DRUGS, len(owner), rng), time,
                 _spread(owner, rng.exponential(1, len(owner))))  # fmt: skip


def _conditions(samples: np.ndarray, rng: np.random.Generator) -> pa.Table:
    """Visits of several codes, each with the visit's score."""
    visits = rng.integers(1, 5, len(samples))
    owner = np.repeat(np.arange(len(samples)), visits)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(visits) - visits, visits)
    score, sizes = _spread(owner, rng.exponential(1, len(owner))), rng.integers(1, 12, len(owner))
    cell = np.repeat(np.arange(len(owner)), sizes)
    position = np.arange(len(cell)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    codes = _codes("condition", CONDITIONS, len(cell), rng)
    return _rows(samples[owner[cell]], "conditions", number[cell], position, codes, None, score[cell])


def _codes(word: str, count: int, size: int, rng: np.random.Generator) -> pa.Array:
    words = pa.array([f"{word} {n}" for n in range(count)])
    return words.take(pa.array(np.minimum(rng.zipf(1.25, size), count) - 1))


def _spread(owner: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight / np.bincount(owner, weight)[owner]


def _rows(
    sample: np.ndarray, feature: str, visit: np.ndarray | None, position: np.ndarray, codes: pa.Array,
    time: np.ndarray | None, score: np.ndarray,
) -> pa.Table:  # fmt: skip
    count = len(sample)
    return pa.table({
        "sample": pa.array(sample), "feature": pa.array([feature]).take(pa.array(np.zeros(count, dtype=np.int64))),
        "visit": pa.nulls(count, pa.int32()) if visit is None else pa.array(visit, pa.int32()),
        "position": pa.array(position, pa.int32()), "code": codes,
        "time": pa.nulls(count, pa.float32()) if time is None else pa.array(time, pa.float32()),
        "attribution": pa.array(score, pa.float32()),
    })  # fmt: skip


def questions(samples: int) -> dict[str, list[str]]:
    """Of each kind some pages, of which none answers another."""
    records = [number % samples for number in (5, 1000, 77_777, 111_111, 200_000)]
    return {
        "first page": [""],
        "patient": [f"?patient={n}" for n in (77, 1234, 4321, 20011, 99)],
        "label, prediction and length": [
            f"?label=1&prediction_min={p}&length_min=20&sort=prediction&order=desc" for p in (0.1, 0.2, 0.3, 0.4, 0.6)
        ],
        "common code": [f"?code=drug%20{n}" for n in range(5)],
        "rare code": [f"?code=drug%20{n}" for n in range(2990, 2995)],
        "codes by a piece of their name": [f"?code=ion%20{n}" for n in range(31, 36)],
        "code with a filter": [f"?code=condition%20{n}&label=1&sort=length" for n in range(1, 6)],
        "a late page": [f"?page={n}&sort=length" for n in (40, 400, 1000, 2000, 2400)],
        "codes": [f"codes?q={n}" for n in (1, 22, 33, 444, 5)],
        "a code's patients": [f"code?feature=drugs&code={quote(f'drug {n}')}" for n in (11, 12, 13, 14, 15)],
        "the commonest codes' patients": [
            f"code?feature={f}s&code={quote(f'{f} {n}')}" for n in (0, 1) for f in ("drug", "condition")
        ],
        "a nested code's patients": [
            f"code?feature=conditions&code={quote(f'condition {n}')}" for n in (11, 12, 13, 14, 15)
        ],
        "record": [f"record?sample={n}" for n in records],
        "record as PNG": [f"record.png?sample={n}" for n in records],
        "all filtered samples as CSV": [f"samples.csv?label={n}" for n in (0, 1)],
    }


def measure(folder: Path, samples: int) -> dict[str, Any]:
    """Seconds until it serves, of each question, and the server's memory in MiB."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "rollout", "explore", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = next(found[0] for line in server.stdout or () if (found := re.findall(r"http://\S+", line)))
        found: dict[str, Any] = {"seconds to start": round(time.perf_counter() - began, 2)}
        found["MiB after start"] = _memory(server.pid, "VmRSS")
        for name, paths in questions(samples).items():
            spent = [_ask(address + path) for path in paths]
            found[name] = {"first": round(spent[0], 3), "median": round(statistics.median(spent), 3)}
        found["MiB at the end"], found["MiB at most"] = _memory(server.pid, "VmRSS"), _memory(server.pid, "VmHWM")
        return found
    finally:
        server.terminate()
        server.wait()


def _ask(address: str) -> float:
    began = time.perf_counter()
    with build_opener(ProxyHandler({})).open(address) as answer:
        answer.read()
    return time.perf_counter() - began


def _memory(process: int, field: str) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(rf"{field}:\s+(\d+)", status)[0]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=250_000)
    options = parser.parse_args()
    if not (options.folder / MANIFEST).exists():
        write_large_run(options.folder, options.samples)
    samples = json.loads((options.folder / MANIFEST).read_bytes())["counts"]["samples"]
    print(json.dumps({"samples": samples, **measure(options.folder, samples)}, indent=1))


if __name__ == "__main__":
    main()
