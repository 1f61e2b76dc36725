"""One revision's side of `bench.gate`: prepares a case, checks it against float64, and times it when told to.

A program of its own, run by path in the environment of the revision it times: it imports that revision's `rollout` and
nothing else of any checkout. What is computed and what it must give is written here, so both revisions get the same
inputs and the same reference. Cases use the public names only, so that an older revision can run them.

It reads one JSON object a line from standard input and answers with one on standard output:

    {"do": "prepare", "case": NAME}         {"error": …, "allowed": …, "result": PATH}, or {"cannot": why}
    {"do": "time", "calls": N, "warm": W}   {"seconds": …}, the median of N calls after W that are not counted
"""

import argparse
import copy
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import rollout

# Of max|err| / max|ref|: rows from maps, the full matrix, from Q and K, through a float32 model.
MAPS, FULL, QK, CAPTURED = 1e-6, 3e-6, 3e-6, 1e-5
LAYERS, HEADS, SIZE = 4, 8, 64


@dataclass(frozen=True)
class Prepared:
    """A call, what it must give in float64, and how far off it may be."""

    run: Callable[[], Any]
    read: Callable[[Any], Tensor]
    reference: Tensor
    allowed: float


def random(device: torch.device, *shape: int, seed: int) -> Tensor:
    """The same numbers in every process: drawn on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def random_maps(device: torch.device, batch: int, seq: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """L softmax maps [B, H, S, S]."""
    shape = (batch, HEADS, seq, seq)
    return [random(device, *shape, seed=layer).softmax(-1).to(dtype) for layer in range(LAYERS)]


def matrix(fused: Tensor) -> Tensor:
    """rownorm(½I + ½F) in float64, [B, S, S]."""
    sum_ = fused.double() + torch.eye(fused.shape[-1], dtype=torch.float64, device=fused.device)
    return sum_ / sum_.sum(-1, keepdim=True)


def chain(layers: Sequence[Callable[[], Tensor]], full: bool = False) -> Tensor:
    """Row 0 of M_L · … · M_1, or all of it, from functions that give each layer's F."""
    product = matrix(layers[-1]())
    product = product if full else product[:, :1]
    for fused in reversed(layers[:-1]):
        product = product @ matrix(fused())
    return product if full else product[:, 0]


def mean_heads(maps: Sequence[Tensor]) -> list[Callable[[], Tensor]]:
    return [partial(torch.mean, layer, 1, dtype=torch.float64) for layer in maps]


def itself(result: Tensor) -> Tensor:
    return result


def from_maps(device: torch.device, batch: int, seq: int, dtype: torch.dtype = torch.float32) -> Prepared:
    maps = random_maps(device, batch, seq, dtype)
    return Prepared(lambda: rollout.attention_rollout(maps, query=0), itself, chain(mean_heads(maps)), MAPS)


def full_matrix(device: torch.device, batch: int, seq: int) -> Prepared:
    maps = random_maps(device, batch, seq)
    return Prepared(lambda: rollout.attention_rollout(maps), itself, chain(mean_heads(maps), full=True), FULL)


def ragged(device: torch.device, batch: int, seq: int) -> Prepared:
    """Lengths spread evenly from S/8 to S; the row of position 0."""
    maps = random_maps(device, batch, seq)
    lengths = torch.linspace(seq // 8, seq, batch, device=device).long()
    reference = torch.zeros(batch, seq, dtype=torch.float64, device=device)
    for b, n in enumerate(lengths.tolist()):
        reference[b, :n] = chain(mean_heads([layer[b : b + 1, :, :n, :n] for layer in maps]))[0]
    return Prepared(lambda: rollout.attention_rollout(maps, query=0, lengths=lengths), itself, reference, MAPS)


def from_qk(device: torch.device, batch: int, seq: int) -> Prepared:
    shape = (batch, HEADS, seq, SIZE)
    queries = [random(device, *shape, seed=2 * layer) for layer in range(LAYERS)]
    keys = [random(device, *shape, seed=2 * layer + 1) for layer in range(LAYERS)]

    def fused(q: Tensor, k: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.softmax(q.double() @ k.double().transpose(-1, -2) * SIZE**-0.5, -1).mean(1)

    reference = chain([fused(q, k) for q, k in zip(queries, keys, strict=True)])
    return Prepared(lambda: rollout.attention_rollout_qk(queries, keys, query=0), itself, reference, QK)


def discard(device: torch.device, batch: int, seq: int) -> Prepared:
    """Largest head, the lowest nine tenths of the entries 0, entry [0, 0] spared."""
    maps = random_maps(device, batch, seq)

    def fused(layer: Tensor) -> Tensor:
        kept = layer.amax(1).flatten(1)
        order = torch.sort(kept, stable=True).indices[:, : int(0.9 * seq * seq)]
        lost = torch.zeros_like(kept, dtype=torch.bool).scatter_(1, order, True)
        lost[:, 0] = False
        return kept.masked_fill(lost, 0.0).view(-1, seq, seq)

    reference = chain([partial(fused, layer) for layer in maps])
    return Prepared(lambda: rollout.attention_rollout(maps, query=0, method="discard"), itself, reference, MAPS)


def captured(device: torch.device, batch: int, seq: int) -> Prepared:
    """A `torch.nn.TransformerEncoder`: forward pass under `rollout.capture`, then the row of position 0."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, HEADS, 256, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).to(device).eval()
    tokens = random(device, batch, seq, 128, seed=0)

    def run() -> dict[str, Tensor]:
        with torch.inference_mode(), rollout.capture(model) as tape:
            model(tokens)
        return tape.rollout(query=0)

    return Prepared(run, lambda streams: next(iter(streams.values())), encoder_reference(model, tokens), CAPTURED)


def encoder_reference(model: nn.TransformerEncoder, tokens: Tensor) -> Tensor:
    """Row 0 by the attention maps that a float64 copy of the encoder returns, layer by layer."""
    maps, x = [], tokens.double()
    with torch.no_grad():
        for layer in copy.deepcopy(model).double().layers:
            maps.append(layer.self_attn(x, x, x, need_weights=True, average_attn_weights=False)[1])
            x = layer(x)
    return chain(mean_heads(maps))


class Codes:
    """What `rollout.cohort.rows.feature_decoders` asks of a fitted PyHealth processor of code sequences."""

    def __init__(self, size: int) -> None:
        self.code_vocab = {f"code-{i}": i for i in range(size)}

    def schema(self) -> tuple[str, ...]:
        return ("value",)

    def dim(self) -> tuple[int, ...]:
        return (1,)

    def is_token(self) -> bool:
        return True


def table(device: torch.device, batch: int, longest: int) -> Prepared:
    """`rollout.cohort.rows.attribution_table` of a batch of code sequences; its result: sample, position and score."""
    from rollout import records  # needs pyarrow, which the other cases do not

    generator = np.random.default_rng(0)
    lengths = generator.integers(1, longest + 1, batch)
    samples: list[dict[str, Any]] = [
        {"patient_id": f"p{i}", "visit_id": f"v{i}", "codes": torch.from_numpy(generator.integers(1, 1000, n))}
        for i, n in enumerate(lengths)
    ]
    scores = random(torch.device("cpu"), batch, longest, seed=0)
    decoders = records.feature_decoders(SimpleNamespace(input_processors={"codes": Codes(1000)}))
    owner = np.repeat(np.arange(batch), lengths)
    place = np.concatenate([np.arange(n) for n in lengths])
    code = np.concatenate([sample["codes"].numpy() for sample in samples])
    reference = np.stack([owner, place, code, scores.numpy()[owner, place]])

    def run() -> Any:
        return records.attribution_table(samples, range(batch), {"codes": scores}, decoders)

    def read(made: Any) -> Tensor:
        codes = [float(name.removeprefix("code-")) for name in made["code"].to_pylist()]
        columns = [made[name].to_numpy() for name in ("sample", "position", "attribution")]
        return torch.from_numpy(np.stack([*columns[:2], codes, columns[2]]))

    return Prepared(run, read, torch.from_numpy(reference), 0.0)


Case = Callable[[torch.device], Prepared]
CASES: dict[str, Case] = {
    "rows from maps S=64": lambda device: from_maps(device, 32, 64),
    "rows from maps S=128": lambda device: from_maps(device, 32, 128),
    "rows from maps S=256": lambda device: from_maps(device, 32, 256),
    "rows from maps S=512": lambda device: from_maps(device, 8, 512),
    "rows from bf16 maps S=256": lambda device: from_maps(device, 16, 256, torch.bfloat16),
    "rows from maps, ragged S=256": lambda device: ragged(device, 16, 256),
    "full matrix S=128": lambda device: full_matrix(device, 32, 128),
    "rows from Q,K S=128": lambda device: from_qk(device, 16, 128),
    "rows from Q,K S=256": lambda device: from_qk(device, 8, 256),
    "discard S=128": lambda device: discard(device, 8, 128),
    "capture, TransformerEncoder S=128": lambda device: captured(device, 8, 128),
}
CPU_CASES: dict[str, Case] = {"attribution table": lambda device: table(device, 256, 128)}


def case_names(device: str) -> list[str]:
    """The cases there are on a device, in the order they are run."""
    return [*CASES, *(CPU_CASES if torch.device(device).type == "cpu" else ())]


class Worker:
    """Holds the case at hand."""

    def __init__(self, root: Path, device: str, scratch: Path) -> None:
        self.root, self.device, self.scratch = root, torch.device(device), scratch
        self.run: Callable[[], Any] = lambda: None
        self.check_imports()

    def check_imports(self) -> None:
        """Whatever was imported of the packages must be this revision's own, not an installed copy.

        Raises:
            ImportError: a module came from elsewhere.
        """
        for name, module in sorted(sys.modules.items()):
            if name.partition(".")[0] in ("rollout", "rollout_kernels") and getattr(module, "__file__", None):
                path = Path(str(module.__file__)).resolve()
                if not path.is_relative_to(self.root):
                    raise ImportError(f"{name} must come from {self.root}, got {path}")

    def prepare(self, case: str) -> dict[str, Any]:
        """Build the case and check its result; what the revision cannot do is said, not raised."""
        self.run = lambda: None
        gc.collect()
        torch.manual_seed(0)
        try:
            prepared = {**CASES, **CPU_CASES}[case](self.device)
            result = prepared.read(prepared.run()).double().cpu()
        except Exception as error:  # a revision may lack the case in any way
            return {"cannot": f"{type(error).__name__}: {error}".splitlines()[0]}
        finally:
            self.check_imports()
        self.run = prepared.run
        path = self.scratch / "result.npy"
        np.save(path, result.numpy())
        return {"error": distance(result, prepared.reference.cpu()), "allowed": prepared.allowed, "result": str(path)}

    def time(self, calls: int, warm: int) -> dict[str, Any]:
        """Median seconds of a call. What runs before it, uncounted, fills the caches and wakes the threads."""
        with torch.inference_mode():
            for _ in range(warm):
                self.run()
            seconds = self._time_cuda(calls) if self.device.type == "cuda" else self._time_cpu(calls)
        return {"seconds": statistics.median(seconds)}

    def _time_cpu(self, calls: int) -> list[float]:
        seconds = []
        for _ in range(calls):
            started = time.perf_counter()
            self.run()
            seconds.append(time.perf_counter() - started)
        return seconds

    def _time_cuda(self, calls: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for event in events[1:]:
            self.run()
            event.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


def distance(result: Tensor, reference: Tensor) -> float | None:
    """max|result − reference| / max|reference|; None where the shapes differ or the result is not finite."""
    if result.shape != reference.shape or not bool(result.isfinite().all()):
        return None
    return float((result - reference).abs().max() / reference.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    torch.set_num_threads(options.threads)
    worker = Worker(options.root.resolve(), options.device, options.scratch)
    gc.disable()  # a collection inside one call of many would be noise; `prepare` collects
    answers.write(json.dumps({"rollout": str(Path(rollout.__file__).resolve()), "torch": torch.__version__}) + "\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "prepare":
            reply = worker.prepare(request["case"])
        else:
            reply = worker.time(request["calls"], request["warm"])
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
