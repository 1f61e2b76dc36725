"""A cohort run measured in a process of its own: `python -m bench.cohort --samples N --plan NAME`; NAME is race,
workers, memory or evaluate.

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

from bench.machine import host
from rollout import attribute_cohort, evaluate_cohort
from rollout.cohort import CohortRun
from rollout.data.codebook import STREAMS, repeated_entry
from rollout.data.quiet import quiet_pyhealth

LAYERS, HEADS, EMBEDDING = 4, 8, 128
SMALL, EVALUATED = (64, 2, 2), ("rollout", "chefer", "frozen_gradient")
STOCK_BATCH, STOCK_BATCHES = 32, 40  # PyHealth's loader loop, in the order of the dataset; batches of it, at random


def raw_samples(count: int) -> Iterator[dict[str, Any]]:
    """Samples as a task gives them: codes by Zipf's law, drugs ordered again, lengths of the streams log-normal."""
    rng = np.random.default_rng(0)
    shares = {stream.feature: np.cumsum(1.0 / (np.arange(stream.vocabulary) + stream.offset)) for stream in STREAMS}
    for number in range(count):
        sample: dict[str, Any] = {"patient_id": f"p{number // 2}", "visit_id": f"v{number}"}
        for stream in STREAMS:
            length = min(stream.cap, max(1, round(stream.median * np.exp(stream.sigma * rng.standard_normal()))))
            share = shares[stream.feature]
            codes = np.searchsorted(share, rng.random(length) * share[-1])
            if stream.fresh is not None:
                codes = codes[repeated_entry(rng, np.arange(length), stream.fresh)]
            sample[stream.feature] = [f"{stream.feature[0]}{code}" for code in codes]
        yield sample | {"label": int(number % 3 == 0)}


def build_samples(count: int) -> str:
    """The folder of PyHealth's samples on disk."""
    with quiet_pyhealth():
        from pyhealth.datasets import create_sample_dataset
    schema = {stream.feature: "sequence" for stream in STREAMS}
    samples = create_sample_dataset(list(raw_samples(count)), schema, {"label": "binary"}, in_memory=False)
    return str(samples.path)


def model_and_samples(count: int, sizes: tuple[int, int, int] = (EMBEDDING, HEADS, LAYERS)) -> tuple[Any, Any]:
    """PyHealth's Transformer of E, H and L on samples on disk, made in another process: making them is not ours."""
    with quiet_pyhealth():
        from pyhealth.datasets import SampleDataset
        from pyhealth.models import Transformer
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other, quiet_pyhealth():
        samples = SampleDataset(other.submit(build_samples, count).result(), "synthetic", "mortality")
    torch.manual_seed(0)
    embedding, heads, layers = sizes
    return Transformer(samples, embedding_dim=embedding, heads=heads, num_layers=layers).eval(), samples


def run(model: Any, samples: Any, out: Path, **settings: Any) -> CohortRun:
    """Attribute the cohort by PyHealth's method and write it."""
    return attribute_cohort(model, samples, out, method="pyhealth", progress=False, **settings)


def stock(model: Any, samples: Any, batches: list[int]) -> tuple[float, dict[int, dict[str, np.ndarray]]]:
    """PyHealth's interpreter over these batches of PyHealth's loader: seconds, and its scores by sample."""
    with quiet_pyhealth():
        from pyhealth.datasets import get_dataloader
        from pyhealth.interpret.methods import AttentionRollout
    numbers = [n for b in batches for n in range(b * STOCK_BATCH, min((b + 1) * STOCK_BATCH, len(samples)))]
    interpreter, waiting = AttentionRollout(model), iter(numbers)
    scores: dict[int, dict[str, np.ndarray]] = {}
    seconds, begun = 0.0, time.perf_counter()
    for batch in get_dataloader(samples.subset(numbers), STOCK_BATCH, shuffle=False):
        relevance = interpreter.attribute(**batch)
        seconds += time.perf_counter() - begun
        for place in range(len(batch["patient_id"])):
            scores[next(waiting)] = {key: part[place].detach().numpy().copy() for key, part in relevance.items()}
        begun = time.perf_counter()
    return seconds, scores


def largest_difference(out: Path, scores: dict[int, dict[str, np.ndarray]]) -> float:
    """Between the rows written and PyHealth's scores, over every entry of the samples both have."""
    written = pl.scan_parquet(out / "attributions" / "*.parquet").filter(pl.col("sample").is_in(list(scores)))
    largest = 0.0
    for (sample, feature), rows in written.collect().group_by("sample", "feature"):
        theirs = scores[sample][feature][rows["position"].to_numpy()]  # type: ignore[index]
        largest = max(largest, float(np.abs(rows["attribution"].to_numpy() - theirs).max()))
    return largest


def describe(*runs: CohortRun) -> dict[str, Any]:
    """One run in numbers, or several as one; the share of time beside model and chain."""
    stages = {stage: sum(done.seconds[stage] for done in runs) for stage in runs[0].seconds}
    elapsed = sum(done.elapsed for done in runs)
    return {
        "samples": sum(done.done for done in runs),
        "seconds": elapsed,
        "stages": stages,
        "rows": sum(done.rows for done in runs),
        "peak_bytes": max(done.peak_bytes for done in runs),
        "bookkeeping": 1.0 - (stages["forward"] + stages["chain"]) / elapsed,
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
    scores = first[1] | second[1]
    difference = largest_difference(scratch / "ours", scores)
    assert difference <= 1e-5, f"not told: largest difference {difference:.1e}, allowed 1e-05"
    stocks = {"samples": len(scores), "seconds": first[0] + second[0], "batches": len(drawn)}
    return {"ours": describe(done) | {"error": difference}, "PyHealth": stocks}


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
    both = describe(two)
    del both["bookkeeping"]
    return {"one worker": describe(before, after), "two workers": both}


def memory(count: int, scratch: Path) -> dict[str, Any]:
    """Peak memory of a process that does nothing but this run."""
    model, samples = model_and_samples(count)
    return {"ours": describe(run(model, samples, scratch / "out"))}


def evaluate(count: int, scratch: Path) -> dict[str, Any]:
    """Three methods and chance, five shares, on a model of the demo's size."""
    model, samples = model_and_samples(count, SMALL)
    done = evaluate_cohort(model, samples, scratch / "out", methods=EVALUATED, progress=False)
    return {"ours": {"samples": done.done, "seconds": done.elapsed, "stages": done.seconds, "rows": done.rows,
                     "tokens": done.tokens, "peak_bytes": done.peak_bytes}}  # fmt: skip


PLANS = {"race": race, "workers": workers, "memory": memory, "evaluate": evaluate}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--plan", choices=PLANS, required=True)
    options = parser.parse_args()
    torch.set_num_threads(host.THREADS)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TMPDIR"] = scratch  # where PyHealth puts the samples
        print(json.dumps(PLANS[options.plan](options.samples, Path(scratch))))


if __name__ == "__main__":
    main()
