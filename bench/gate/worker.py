"""One revision's side of the gate: computes a case when told to, and times it.

A program of its own, run by path in the environment of the revision it times: it imports that revision's `rollout` and
nothing else of any checkout. What is to be computed comes in a file (`bench/gate/cases.py`). It reads one JSON object a
line from standard input and answers with one on standard output:

    {"do": "prepare", "path": PATH}         {"result": PATH}, or {"cannot": why}
    {"do": "time", "calls": N, "warm": W}   {"seconds": …}, the median of N calls after W that are not counted
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import rollout


def load(path: Path, device: torch.device) -> Callable[[], Tensor]:
    """The call that a file describes."""
    case = torch.load(path, weights_only=True, map_location=device)
    models = {"capture": captured, "attribute": attributed}
    if case["call"] in models:
        return models[case["call"]](*case["inputs"], **case["options"])
    return partial(getattr(rollout, case["call"]), *case["inputs"], **case["options"])


def captured(weights: dict[str, Tensor], tokens: Tensor, heads: int, layers: int) -> Callable[[], Tensor]:
    """A `torch.nn.TransformerEncoder`: forward pass under `rollout.capture`, then the row of position 0."""
    width = tokens.shape[2]
    layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).to(tokens.device).eval()
    model.load_state_dict(weights)

    def run() -> Tensor:
        with torch.inference_mode(), rollout.capture(model) as tape:
            model(tokens)
        return next(iter(tape.rollout(query=0).values()))

    return run


def attributed(
    weights: dict[str, Tensor], batches: list[Tensor], embedding: int, heads: int, layers: int
) -> Callable[[], Tensor]:
    """The attributions of PyHealth's Transformer for batches of ids, in one vector."""
    from pyhealth.datasets import create_sample_dataset
    from pyhealth.models import Transformer

    from rollout.pyhealth import AttentionRollout

    known = len(weights["embedding_model.embedding_layers.codes.weight"]) - 2  # beside <pad> and <unk>
    codes = [f"c{i}" for i in range(known)]
    samples = [{"patient_id": f"p{i}", "visit_id": "v", "codes": codes, "label": i} for i in range(2)]
    dataset = create_sample_dataset(samples, {"codes": "sequence"}, {"label": "binary"}, dataset_name="bench")
    model = Transformer(dataset, embedding_dim=embedding, heads=heads, num_layers=layers)
    model.load_state_dict(weights)
    interpreter = AttentionRollout(model.to(batches[0].device))

    def run() -> Tensor:
        return torch.cat([interpreter.attribute(codes=ids)["codes"].flatten() for ids in batches])

    return run


class Worker:
    """Holds the case at hand."""

    def __init__(self, root: Path, device: str, scratch: Path) -> None:
        self.root, self.device, self.scratch = root, torch.device(device), scratch
        self.run: Callable[[], object] = lambda: None
        self.check_imports()

    def check_imports(self) -> None:
        """Raises ImportError where a module of the packages is not this revision's own, but an installed copy's."""
        for name, module in sorted(sys.modules.items()):
            if name.partition(".")[0] in ("rollout", "rollout_kernels") and getattr(module, "__file__", None):
                path = Path(str(module.__file__)).resolve()
                if not path.is_relative_to(self.root):
                    raise ImportError(f"{name} must come from {self.root}, got {path}")

    def prepare(self, path: str) -> dict[str, Any]:
        """Compute the case once; what the revision cannot do is said, not raised."""
        self.run = lambda: None
        gc.collect()
        try:
            run = load(Path(path), self.device)
            result = run().double().cpu()
        except Exception as error:  # a revision may lack the case in any way
            return {"cannot": f"{type(error).__name__}: {error}".splitlines()[0]}
        finally:
            self.check_imports()
        self.run, file = run, self.scratch / "result.npy"
        np.save(file, result.numpy())
        return {"result": str(file)}

    def time(self, calls: int, warm: int) -> dict[str, Any]:
        """Median seconds of a call. What runs before it, uncounted, fills the caches and wakes the threads."""
        on_gpu = self.device.type == "cuda"
        with torch.inference_mode():
            for _ in range(warm):
                self.run()
            ticks = [tick(on_gpu)]
            for _ in range(calls):
                self.run()
                ticks.append(tick(on_gpu))
        if on_gpu:
            torch.cuda.synchronize()
        pairs = itertools.pairwise(ticks)
        return {"seconds": statistics.median(a.elapsed_time(b) / 1e3 if on_gpu else b - a for a, b in pairs)}


def tick(on_gpu: bool) -> Any:
    """The time; of a GPU an event, which tells it later."""
    if not on_gpu:
        return time.perf_counter()
    return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--root", "--device", "--threads", "--scratch"):
        parser.add_argument(name, required=True)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    torch.set_num_threads(int(options.threads))
    worker = Worker(Path(options.root).resolve(), options.device, Path(options.scratch))
    gc.disable()  # a collection inside one call of many would be noise; `prepare` collects
    print(json.dumps({"rollout": rollout.__file__}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(worker, request.pop("do"))(**request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
