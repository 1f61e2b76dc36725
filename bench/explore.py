"""How fast `rollout explore` answers over a large cohort, and with how much memory: `python -m bench.explore FOLDER`.

Attributes a cohort of `--samples` samples into FOLDER unless one is there: seeded records of two features, drugs with
times and nested conditions, about fifty entries each, by a small Transformer. Then serves it as the command does, in a
process of its own, asks over HTTP, and prints the seconds of each question as JSON: the first answer, and the median of
five of its kind with other words, so that none was asked before.
"""

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from timeit import timeit
from typing import Any
from urllib.request import ProxyHandler, build_opener

import numpy as np
import torch
import typer

from rollout import attribute_cohort
from rollout.data.quiet import quiet_pyhealth
from rollout.results.layout import MANIFEST, RUNNING
from rollout.results.manifest import Manifest

with quiet_pyhealth():
    from pyhealth.datasets import create_sample_dataset
    from pyhealth.models import Transformer

FEATURES = {"drugs": "stagenet", "conditions": "nested_sequence"}
DRUGS, CONDITIONS = 3000, 1200


def draw_samples(count: int) -> Iterator[dict[str, Any]]:
    """Drugs of log-normal lengths over thirty days, one to four visits of up to eleven conditions; Zipf's law."""
    rng = np.random.default_rng(0)
    for number in range(count):
        length = int(np.clip(rng.lognormal(3.2, 0.8), 1, 400))
        drugs = np.minimum(rng.zipf(1.25, length), DRUGS) - 1
        visits = [np.minimum(rng.zipf(1.25, size), CONDITIONS) - 1 for size in rng.integers(1, 12, rng.integers(1, 5))]
        yield {
            "patient_id": f"p{number // 2:07d}",
            "visit_id": f"v{number}",
            "drugs": (np.linspace(0, 720, length).round(1).tolist(), [f"drug {code}" for code in drugs]),
            "conditions": [[f"condition {code}" for code in visit] for visit in visits],
            "label": rng.random() < 0.25,
        }


def attribute(folder: Path, count: int) -> None:
    """Write the cohort run, or go on with it; nothing where it is there."""
    if (folder / MANIFEST).exists() and Manifest.read(folder / MANIFEST).status != RUNNING:
        return
    with quiet_pyhealth():
        samples = create_sample_dataset(list(draw_samples(count)), FEATURES, {"label": "binary"})
    torch.manual_seed(0)
    model = Transformer(samples, embedding_dim=16, heads=2, num_layers=1).eval()
    attribute_cohort(model, samples, folder, method="pyhealth")


def questions(samples: int) -> dict[str, list[str]]:
    """Of each kind some pages, of which none answers another."""
    records = [number % samples for number in (5, 1000, 77_777, 111_111, 200_000)]
    codes, common = range(11, 16), [(kind, number) for number in (0, 1) for kind in ("drug", "condition")]
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
        "a code's patients": [f"code?feature=drugs&code=drug%20{n}" for n in codes],
        "the commonest codes' patients": [f"code?feature={kind}s&code={kind}%20{n}" for kind, n in common],
        "a nested code's patients": [f"code?feature=conditions&code=condition%20{n}" for n in codes],
        "record": [f"record?sample={n}" for n in records],
        "record as PNG": [f"record.png?sample={n}" for n in records],
        "all filtered samples as CSV": [f"samples.csv?label={n}" for n in (0, 1)],
    }


def measure(folder: Path) -> dict[str, Any]:
    """How many samples; seconds until they are served, and of each question; the server's memory in MiB."""
    samples = Manifest.read(folder / MANIFEST).counts["samples"]
    command = [sys.executable, "-m", "rollout", "explore", str(folder)]
    opener, begun = build_opener(ProxyHandler({})), time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = next(told[0] for line in server.stdout or () if (told := re.findall(r"http://\S+", line)))
            found: dict[str, Any] = {"samples": samples, "seconds to start": round(time.perf_counter() - begun, 2)}
            found["MiB after start"] = tell_memory(server.pid, "VmRSS")
            for name, pages in questions(samples).items():
                seconds = [timeit(lambda url=address + page: opener.open(url).read(), number=1) for page in pages]
                found[name] = {"first": round(seconds[0], 3), "median": round(statistics.median(seconds), 3)}
            at_the_end, at_most = tell_memory(server.pid, "VmRSS"), tell_memory(server.pid, "VmHWM")
            return found | {"MiB at the end": at_the_end, "MiB at most": at_most}
        finally:
            server.terminate()


def tell_memory(process: int, field: str) -> int:
    """A field of a process's status, in MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(rf"{field}:\s+(\d+)", status)[0]) // 1024


def main(folder: Path, samples: int = 250_000) -> None:
    """How fast `rollout explore` answers over a large cohort, which is made in FOLDER unless one is there."""
    attribute(folder, samples)
    print(json.dumps(measure(folder), indent=1))


if __name__ == "__main__":
    typer.run(main)
