"""A cohort run measured in a process of its own: `python -m bench.cohort --samples N --plan race|workers|memory`.

The samples have the lengths of `rollout.data.codebook`, which follow MIMIC-IV's (three streams, log-normal), and lie on
disk as PyHealth keeps them. It prints one JSON object. Memory is that of the whole process, so nothing else may run
in it.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

import rollout
from bench.machine import host
from rollout.cohort.memory import peak_memory
from rollout.data.codebook import STREAMS
from rollout.data.quiet import quiet_pyhealth

LAYERS, HEADS, EMBEDDING = 4, 8, 128
STOCK_BATCH = 32  # PyHealth's loader loop, in the order of the dataset
STOCK_BATCHES = 40  # of it, drawn at random
TOLERANCE = 1e-5


def raw_samples(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Samples as a task gives them: codes by Zipf's law, lengths of the streams log-normal, some empty."""
    rng = np.random.default_rng(seed)
    weights = {stream.feature: 1.0 / (np.arange(stream.vocabulary) + stream.offset) for stream in STREAMS}
    for number in range(count):
        sample: dict[str, Any] = {"patient_id": f"p{number // 2}", "visit_id": f"v{number}", "label": number % 3 == 0}
        for stream in STREAMS:
            length = min(stream.cap, max(1, round(stream.median * np.exp(stream.sigma * rng.standard_normal()))))
            share = np.cumsum(weights[stream.feature])
            codes = np.searchsorted(share, rng.random(length) * share[-1])
            sample[stream.feature] = [f"{stream.feature[0]}{code}" for code in codes]
        yield sample | {"label": int(sample["label"])}


def build_samples(count: int) -> str:
    """The folder of PyHealth's samples on disk."""
    with quiet_pyhealth():
        from pyhealth.datasets import create_sample_dataset
    schema = {stream.feature: "sequence" for stream in STREAMS}
    samples = create_sample_dataset(list(raw_samples(count)), schema, {"label": "binary"}, in_memory=False)
    return str(samples.path)


def model_and_samples(count: int) -> tuple[Any, Any]:
    """PyHealth's Transformer on samples on disk, made in another process: what making them takes is not ours."""
    with quiet_pyhealth():
        from pyhealth.datasets import SampleDataset
        from pyhealth.models import Transformer
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other, quiet_pyhealth():
        samples = SampleDataset(other.submit(build_samples, count).result(), "synthetic", "mortality")
    torch.manual_seed(0)
    return Transformer(samples, embedding_dim=EMBEDDING, heads=HEADS, num_layers=LAYERS).eval(), samples


def run(model: Any, samples: Any, out: Path, **settings: Any) -> rollout.cohort.CohortRun:
    """Attribute the cohort by PyHealth's method and write it."""
    return rollout.attribute_cohort(model, samples, out, method="pyhealth", progress=False, **settings)


def stock(model: Any, samples: Any, batches: list[int]) -> tuple[float, int, dict[int, dict[str, np.ndarray]]]:
    """PyHealth's interpreter over these batches of PyHealth's loader: seconds, samples, and its scores by sample."""
    with quiet_pyhealth():
        from pyhealth.datasets import get_dataloader
        from pyhealth.interpret.methods import AttentionRollout
    numbers = [n for b in batches for n in range(b * STOCK_BATCH, min((b + 1) * STOCK_BATCH, len(samples)))]
    interpreter = AttentionRollout(model)
    loader = get_dataloader(samples.subset(numbers), STOCK_BATCH, shuffle=False)
    scores: dict[int, dict[str, np.ndarray]] = {}
    seconds, begun = 0.0, time.perf_counter()
    waiting = iter(numbers)
    for batch in loader:
        relevance = interpreter.attribute(**batch)
        seconds += time.perf_counter() - begun
        for place in range(len(batch["patient_id"])):
            scores[next(waiting)] = {key: part[place].detach().numpy().copy() for key, part in relevance.items()}
        begun = time.perf_counter()
    return seconds, len(numbers), scores


def largest_difference(out: Path, scores: dict[int, dict[str, np.ndarray]]) -> float:
    """Between the rows written and PyHealth's scores, over every entry of the samples both have."""
    written = pl.scan_parquet(out / "attributions" / "*.parquet").filter(pl.col("sample").is_in(list(scores)))
    largest = 0.0
    for (sample, feature), rows in written.collect().group_by("sample", "feature"):
        theirs = scores[sample][feature][rows["position"].to_numpy()]  # type: ignore[index]
        largest = max(largest, float(np.abs(rows["attribution"].to_numpy() - theirs).max()))
    return largest


def described(done: rollout.cohort.CohortRun) -> dict[str, Any]:
    """A run in numbers."""
    model_seconds = done.seconds["forward"] + done.seconds["chain"]
    return {
        "samples": done.done,
        "seconds": done.elapsed,
        "stages": done.seconds,
        "rows": done.rows,
        "peak_bytes": done.peak_bytes,
        "bookkeeping": 1.0 - model_seconds / done.elapsed,
    }


def race(count: int, scratch: Path) -> dict[str, Any]:
    """Ours over the whole cohort between two halves of PyHealth's sampled batches; first checked, then told."""
    model, samples = model_and_samples(count)
    drawn = np.random.default_rng(1).permutation(-(-count // STOCK_BATCH))[:STOCK_BATCHES].tolist()
    stock(model, samples, drawn[:1])
    run(model, samples.subset(range(min(count, 256))), scratch / "warm")
    first = stock(model, samples, sorted(drawn[::2]))
    done = run(model, samples, scratch / "ours")
    second = stock(model, samples, sorted(drawn[1::2]))
    difference = largest_difference(scratch / "ours", first[2] | second[2])
    assert difference <= TOLERANCE, f"not told: largest difference {difference:.1e}, allowed {TOLERANCE:.0e}"
    return {
        "ours": described(done) | {"error": difference},
        "PyHealth": {
            "samples": first[1] + second[1], "seconds": first[0] + second[0], "batches": len(drawn),
        },
    }  # fmt: skip


def workers(count: int, scratch: Path) -> dict[str, Any]:
    """One process of one thread on each half of the cohort, and between them two worker processes of one thread on all
    of it. The workers' start counts; the share of bookkeeping is told for one process only."""
    torch.set_num_threads(1)
    model, samples = model_and_samples(count)
    run(model, samples.subset(range(min(count, 256))), scratch / "warm")
    before = run(model, samples.subset(range(count // 2)), scratch / "before")
    two = run(model, samples, scratch / "two", workers=2)
    after = run(model, samples.subset(range(count // 2, count)), scratch / "after")
    assert two.rows == before.rows + after.rows
    both = described(two)
    del both["bookkeeping"]
    one = described(before) | {"samples": before.done + after.done, "seconds": before.elapsed + after.elapsed}
    one |= {
        "rows": two.rows,
        "stages": {stage: before.seconds[stage] + after.seconds[stage] for stage in before.seconds},
    }
    return {"one worker": one, "two workers": both}


def memory(count: int, scratch: Path) -> dict[str, Any]:
    """Peak memory of a process that does nothing but this run, and what it held before the run."""
    model, samples = model_and_samples(count)
    before = peak_memory()
    return {"ours": described(run(model, samples, scratch / "out")) | {"before_bytes": before}}


PLANS = {"race": race, "workers": workers, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--plan", choices=PLANS, required=True)
    options = parser.parse_args()
    torch.set_num_threads(host.THREADS)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TMPDIR"] = scratch  # where PyHealth puts the samples
        print(json.dumps(PLANS[options.plan](options.samples, Path(scratch))))


if __name__ == "__main__":
    main()
