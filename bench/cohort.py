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
from functools import partial
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

with quiet_pyhealth():
    from pyhealth.datasets import SampleDataset, create_sample_dataset, get_dataloader
    from pyhealth.interpret.methods import AttentionRollout
    from pyhealth.models import Transformer

EMBEDDING, HEADS, LAYERS = 128, 8, 4
EVALUATED = ("rollout", "chefer", "frozen_gradient")
STOCK_BATCH, STOCK_BATCHES = 32, 40  # PyHealth's loader loop, in the order of the dataset; batches of it, at random

run = partial(attribute_cohort, method="pyhealth", progress=False)
Scores = dict[int, dict[str, torch.Tensor]]  # sample → feature → its scores


def draw_samples(count: int) -> Iterator[dict[str, Any]]:
    """Samples as a task gives them: codes by Zipf's law, drugs ordered again, lengths of the streams log-normal."""
    rng = np.random.default_rng(0)
    for number in range(count):
        sample: dict[str, Any] = {"patient_id": f"p{number // 2}", "visit_id": f"v{number}", "label": number % 3 == 0}
        for stream in STREAMS:
            length = min(stream.cap, max(1, round(stream.median * np.exp(stream.sigma * rng.standard_normal()))))
            weight = 1.0 / (np.arange(stream.vocabulary) + stream.offset)
            codes = rng.choice(stream.vocabulary, length, p=weight / weight.sum())
            if stream.fresh is not None:
                codes = codes[repeated_entry(rng, np.arange(length), stream.fresh)]
            sample[stream.feature] = [f"{stream.feature[0]}{code}" for code in codes]
        yield sample


def keep_samples(count: int) -> str:
    """The folder of PyHealth's samples on disk."""
    schema = {stream.feature: "sequence" for stream in STREAMS}
    return str(create_sample_dataset(list(draw_samples(count)), schema, {"label": "binary"}, in_memory=False).path)


def model_and_samples(
    count: int, embedding: int = EMBEDDING, heads: int = HEADS, layers: int = LAYERS
) -> tuple[Any, Any]:
    """PyHealth's Transformer on samples on disk, which another process makes: that is not what is measured."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other, quiet_pyhealth():
        samples = SampleDataset(other.submit(keep_samples, count).result(), "synthetic", "mortality")
    torch.manual_seed(0)
    return Transformer(samples, embedding_dim=embedding, heads=heads, num_layers=layers).eval(), samples


def stock(model: Any, samples: Any, batches: list[int]) -> tuple[float, Scores]:
    """PyHealth's interpreter over these batches of PyHealth's loader: seconds, and its scores."""
    numbers = [n for b in batches for n in range(b * STOCK_BATCH, min((b + 1) * STOCK_BATCH, len(samples)))]
    interpreter, found = AttentionRollout(model), []
    seconds, begun = 0.0, time.perf_counter()
    for batch in get_dataloader(samples.subset(numbers), STOCK_BATCH, shuffle=False):
        relevance = interpreter.attribute(**batch)
        seconds += time.perf_counter() - begun
        rows = zip(*(part.detach().clone() for part in relevance.values()), strict=True)  # a clone lets go of the maps
        found += [dict(zip(relevance, row, strict=True)) for row in rows]
        begun = time.perf_counter()
    return seconds, dict(zip(numbers, found, strict=True))


def largest_difference(out: Path, scores: Scores) -> float:
    """Between the rows written and PyHealth's scores, over every entry of the samples both have."""
    written = pl.scan_parquet(out / "attributions" / "*.parquet").filter(pl.col("sample").is_in(list(scores)))
    largest = 0.0
    for (sample, feature), rows in written.collect().group_by("sample", "feature"):
        theirs = scores[sample][feature][rows["position"].to_numpy()]  # type: ignore[index]
        largest = max(largest, float((rows["attribution"].to_torch() - theirs).abs().max()))
    return largest


def describe(*runs: CohortRun) -> dict[str, Any]:
    """One run in numbers, or several as one."""
    return {
        "samples": sum(done.done for done in runs),
        "elapsed": sum(done.elapsed for done in runs),
        "stages": {stage: sum(done.seconds[stage] for done in runs) for stage in runs[0].seconds},
        "rows": sum(done.rows for done in runs),
        "peak_bytes": max(done.peak_bytes for done in runs),
    }


def describe_alone(*runs: CohortRun) -> dict[str, Any]:
    """The same of runs of one process, with the share of time beside model and chain."""
    told = describe(*runs)
    return told | {"bookkeeping": 1.0 - (told["stages"]["forward"] + told["stages"]["chain"]) / told["elapsed"]}


def race(count: int, scratch: Path) -> dict[str, Any]:
    """Ours over the whole cohort between two halves of PyHealth's sampled batches; first checked, then told."""
    model, samples = model_and_samples(count)
    drawn = np.random.default_rng(1).permutation(-(-count // STOCK_BATCH))[:STOCK_BATCHES].tolist()
    stock(model, samples, drawn[:1])
    run(model, samples.subset(range(min(count, 256))), scratch / "warm")
    before, scores = stock(model, samples, sorted(drawn[::2]))
    ours = run(model, samples, scratch / "ours")
    after, others = stock(model, samples, sorted(drawn[1::2]))
    scores |= others
    error = largest_difference(ours.out, scores)
    assert error <= 1e-5, f"not told: largest difference {error:.1e}, allowed 1e-05"
    theirs = {"samples": len(scores), "elapsed": before + after, "batches": len(drawn)}
    return {"ours": describe_alone(ours) | {"error": error}, "PyHealth": theirs}


def workers(count: int, scratch: Path) -> dict[str, Any]:
    """One process of one thread on each half of the cohort, and between them two worker processes of one thread on all
    of it. The workers' start counts."""
    torch.set_num_threads(1)
    model, samples = model_and_samples(count)
    run(model, samples.subset(range(min(count, 256))), scratch / "warm")
    before = run(model, samples.subset(range(count // 2)), scratch / "before")
    two = run(model, samples, scratch / "two", workers=2)
    after = run(model, samples.subset(range(count // 2, count)), scratch / "after")
    assert two.rows == before.rows + after.rows
    return {"one worker": describe_alone(before, after), "two workers": describe(two)}


def memory(count: int, scratch: Path) -> dict[str, Any]:
    """Peak memory of a process that does nothing but this run."""
    return {"ours": describe_alone(run(*model_and_samples(count), scratch / "ours"))}


def evaluate(count: int, scratch: Path) -> dict[str, Any]:
    """Three methods and chance, five shares, on a model of the demo's size."""
    model, samples = model_and_samples(count, embedding=64, heads=2, layers=2)
    return {"ours": describe(evaluate_cohort(model, samples, scratch / "ours", methods=EVALUATED, progress=False))}


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
