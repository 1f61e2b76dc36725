"""Checks and times the kernels on this machine's GPU: `python -m bench.gpu [--only NAME] [--quick]`.

Every case is validated, then timed: against the float64 oracle on its first sample where S ≤ 1024, for run-to-run bits,
and for the bits of a sample alone against the same sample in its batch. A wrong result reports no time. Ceilings (copy
and matmul) are measured first, in the same run. The record goes to `bench/results/<device>/gpu.json`.
"""

import argparse
import datetime
import json
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rollout
from rollout_kernels import _triton, ops, reference
from rollout_kernels._triton import launch
from rollout_kernels.method import Method

ROOT = Path(__file__).resolve().parent.parent
BOUNDS = {"maps": 1e-6, "full": 1e-6, "qk": 3e-6}  # of max|err|/max|ref|; 16-bit Q,K products are exact too
LN2 = 0.6931471805599453


@dataclass(frozen=True)
class Case:
    """One shape: `kind` is maps, full, or qk; `given` hands the log-sum-exp over; `graph` times a CUDA graph."""

    name: str
    kind: str
    batch: int
    heads: int
    seq: int
    layers: int
    dtype: torch.dtype
    size: int = 0
    given: bool = False
    graph: bool = False
    target_ms: float | None = None
    target_share: float | None = None

    @property
    def bytes_read(self) -> int:
        """What must be read of maps: every layer but the top one, and for the full matrix that one as well."""
        layers = self.layers if self.kind == "full" else self.layers - 1
        return self.batch * self.heads * self.seq**2 * layers * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """The products from Q and K, top layer left out; twice when the log-sum-exp is computed."""
        once = 2 * self.batch * self.heads * self.seq**2 * self.size * max(1, self.layers - 1)
        return once if self.given else 2 * once


BF16, FP32 = torch.bfloat16, torch.float32
CASES = (
    Case("maps-fp32-c1", "maps", 256, 8, 512, 4, FP32, target_share=0.95),
    Case("maps-bf16-c1", "maps", 256, 8, 512, 4, BF16, target_share=0.95),
    Case("maps-fp32-c2", "maps", 64, 12, 512, 12, FP32, target_share=0.95),
    Case("maps-fp32-S197", "maps", 256, 12, 197, 12, FP32, target_share=0.80),
    Case("maps-fp32-small", "maps", 8, 12, 197, 12, FP32, graph=True, target_ms=0.070),
    Case("full-fp32-c1", "full", 256, 8, 512, 4, FP32, target_ms=3.3),
    Case("qk-bf16-c1-given", "qk", 256, 8, 512, 4, BF16, 64, given=True, target_ms=0.60),
    Case("qk-bf16-c1", "qk", 256, 8, 512, 4, BF16, 64),
    Case("qk-fp32-c1-given", "qk", 256, 8, 512, 4, FP32, 64, given=True, target_ms=1.01),
    Case("qk-bf16-c3-given", "qk", 8, 16, 4096, 24, BF16, 64, given=True, target_ms=18.0),
    Case("qk-bf16-c3", "qk", 8, 16, 4096, 24, BF16, 64, target_ms=36.0),
    Case("qk-bf16-c4-given", "qk", 1, 32, 65536, 32, BF16, 128, given=True, target_ms=2000.0),
)
QUICK = (
    Case("maps-fp32-quick", "maps", 32, 4, 128, 3, FP32),
    Case("maps-bf16-S197-quick", "maps", 4, 4, 197, 3, BF16),
    Case("full-fp32-quick", "full", 4, 4, 128, 3, FP32),
    Case("qk-bf16-quick", "qk", 4, 4, 128, 3, BF16, 64),
    Case("qk-fp32-quick", "qk", 4, 4, 128, 3, FP32, 64),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="small shapes; nothing is written")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile of the naive chain out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.gpu: no CUDA device is available; nothing was run")
        return 1

    ceilings = measure_ceilings()
    print(f"{torch.cuda.get_device_name()}: copy {ceilings['copy_gb_s']:.0f} GB/s, bf16 matmul "
          f"{ceilings['matmul_tflop_s']:.0f} TFLOP/s, table {launch.table_name(torch.device('cuda', 0))}")  # fmt: skip
    results = []
    for case in QUICK if options.quick else CASES:
        if options.only in case.name:
            results.append(run_case(case, ceilings, not options.no_compile))
            print(line(results[-1]), flush=True)
            torch.cuda.empty_cache()
    if not options.quick and not options.only:
        write(ceilings, results)
    return int(any("failed" in result for result in results))


def measure_ceilings() -> dict[str, float]:
    """Copy bandwidth over 2 GiB, read and write counted, and the rate of an 8192³ bf16 product."""
    source = torch.empty(2**29, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    product = milliseconds(lambda: a @ b)
    return {"copy_gb_s": 2 * source.nbytes / copy / 1e6, "matmul_tflop_s": 2 * 8192**3 / product / 1e9}


def milliseconds(run: Callable[[], object], rounds: int = 15) -> float:
    """Median time of a call, the second-level cache flushed before each."""
    flush = torch.empty(2**26, dtype=torch.float32, device="cuda")
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def run_case(case: Case, ceilings: dict[str, float], compiled: bool) -> dict[str, Any]:
    """Builds the inputs of a case, checks ours, times it and its peers."""
    torch.manual_seed(0)
    result: dict[str, Any] = {"name": case.name, "dtype": str(case.dtype).removeprefix("torch.")}
    result["shape"] = dict(zip("BHSLD", (case.batch, case.heads, case.seq, case.layers, case.size), strict=True))
    first, second = make_inputs(case)
    run = our_call(case, first, second)
    error = check(case, run, first, second)
    result.update(error)
    if "failed" in result:
        return result

    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    result["peak_extra_bytes"] = torch.cuda.max_memory_allocated() - held
    result["ms"] = milliseconds(graphed(run) if case.graph else run)
    if case.kind == "qk":
        result["tflop_s"] = case.flops / result["ms"] / 1e9
    else:
        result["gb_s"] = case.bytes_read / result["ms"] / 1e6
        result["share_of_copy"] = result["gb_s"] / ceilings["copy_gb_s"]
    if case.target_ms is not None:
        result["target_ms"] = case.target_ms
    if case.target_share is not None:
        result["target_share"] = case.target_share
    if case.kind != "qk":
        result["peers_ms"] = peers(case, first, compiled)
    return result


def make_inputs(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Maps, or queries and keys."""
    if case.kind == "qk":
        shape = (case.batch, case.heads, case.seq, case.size)
        both = [[torch.randn(shape, device="cuda", dtype=case.dtype) for _ in range(case.layers)] for _ in range(2)]
        return both[0], both[1]
    maps = []
    for _ in range(case.layers):
        layer = torch.empty(case.batch, case.heads, case.seq, case.seq, device="cuda", dtype=case.dtype)
        for sample in layer:  # one at a time: the float32 scores of a whole layer may not fit beside the maps
            sample.copy_(torch.randn(sample.shape, device="cuda").mul_(2).softmax(-1))
        maps.append(layer)
    return maps, []


def our_call(case: Case, first: list[Tensor], second: list[Tensor]) -> Callable[[], Tensor]:
    if case.kind == "full":
        return lambda: rollout.attention_rollout(first, backend="triton", validate=False)
    rows = torch.zeros(first[0].shape[0], dtype=torch.long, device="cuda")
    if case.kind == "maps":
        return lambda: rollout.attention_rollout(first, query=rows, backend="triton", validate=False)
    lse = given_logsumexp(first, second) if case.given else None
    return lambda: rollout.attention_rollout_qk(
        first, second, query=rows, logsumexp=lse, backend="triton", validate=False
    )


def given_logsumexp(queries: list[Tensor], keys: list[Tensor]) -> list[Tensor]:
    """The log-sum-exp a model would hand over, natural, of every row."""
    values = []
    for q, k in zip(queries, keys, strict=True):
        nothing = torch.zeros(q.shape[0], 1, q.shape[2], device="cuda")
        problem = ops.qk_problem(
            [q], [k], nothing, lengths=None, key_mask=None, query_mask=None, causal=False, window=None, bias=None,
            scale=None, logsumexp=None, method=Method(), validate=False,
        )  # fmt: skip
        arguments = _triton.qk_inputs.qk_inputs(problem, False)
        name = launch.table_name(q.device)
        _triton.logsumexp(arguments, launch.scores_launch("logsumexp", q.dtype, q.shape[-1], name))
        assert arguments.lse is not None
        values.append(arguments.lse[0] * LN2)
    return values


def check(case: Case, run: Callable[[], Tensor], first: list[Tensor], second: list[Tensor]) -> dict[str, Any]:
    """Error against the oracle on the first sample, mass lost, and bits; `failed` says what is wrong."""
    result = run()
    found: dict[str, Any] = {"mass_error": float((result.double().sum(-1) - 1).abs().max())}
    failures = []
    if not found["mass_error"] <= 1e-3:
        failures.append(f"rows sum to 1 ± {found['mass_error']:.1e}")
    if not all(torch.equal(run(), result) for _ in range(5)):
        failures.append("runs differ in their bits")
    alone = our_call(case, [t[:1] for t in first], [t[:1] for t in second])()
    if not torch.equal(alone[0], result[0]):
        failures.append("a sample alone differs in its bits from the same sample in its batch")
    if case.seq <= 1024:
        found["error"] = oracle_error(case, first, second, result[:1])
        if not found["error"] <= BOUNDS[case.kind]:
            failures.append(f"error {found['error']:.1e} is over {BOUNDS[case.kind]:.0e}")
    if failures:
        found["failed"] = "; ".join(failures)
    return found


def oracle_error(case: Case, first: list[Tensor], second: list[Tensor], result: Tensor) -> float:
    query = None if case.kind == "full" else torch.zeros(1, dtype=torch.long, device="cuda")
    if case.kind == "qk":
        problem: Any = ops.qk_problem(
            [t[:1] for t in first], [t[:1] for t in second], query, lengths=None, key_mask=None, query_mask=None,
            causal=False, window=None, bias=None, scale=None, logsumexp=None, method=Method(), validate=False,
        )  # fmt: skip
    else:
        problem = ops.maps_problem([t[:1] for t in first], query, None, None, Method(), False)
    wanted = reference.rollout(problem)
    return float((result.double() - wanted).abs().max() / wanted.abs().max())


def peers(case: Case, maps: list[Tensor], compiled: bool) -> dict[str, float]:
    """Times of the naive chain, its torch.compile, and PyHealth's arithmetic on the same maps."""

    def naive() -> Tensor:
        product = None
        eye = torch.eye(case.seq, device="cuda")
        for attention in maps:
            matrix = 0.5 * (attention.float().mean(1) + eye)
            matrix = matrix / matrix.sum(-1, keepdim=True)
            product = matrix if product is None else torch.bmm(matrix, product)
        assert product is not None
        return product if case.kind == "full" else product[:, 0]

    def pyhealth() -> Tensor:
        eye = torch.eye(case.seq, device="cuda")
        product = eye.expand(case.batch, case.seq, case.seq)
        for attention in maps:
            product = torch.bmm(0.5 * (attention.float().mean(1) + eye), product)
        return product[:, 0]

    times = {"naive chain": milliseconds(naive, 7), "PyHealth's arithmetic": milliseconds(pyhealth, 7)}
    if compiled:
        times["naive chain, torch.compile"] = milliseconds(torch.compile(naive), 7)
    return times


def line(result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"{result['name']:<20} WRONG: {result['failed']}"
    rate = f"{result['tflop_s']:.0f} TFLOP/s" if "tflop_s" in result else f"{result['share_of_copy']:.0%} of copy"
    target = f" (target {result['target_ms']} ms)" if "target_ms" in result else ""
    target += f" (target {result['target_share']:.0%} of copy)" if "target_share" in result else ""
    others = "".join(f", {name} {ms / result['ms']:.1f}×" for name, ms in result.get("peers_ms", {}).items())
    extra = result["peak_extra_bytes"] / 2**20
    error = f"err {result['error']:.1e}" if "error" in result else f"mass {result['mass_error']:.1e}"
    return f"{result['name']:<20} {result['ms']:.3f} ms, {rate}{target}, {error}, +{extra:.0f} MiB{others}"


def write(ceilings: dict[str, float], results: list[dict[str, Any]]) -> None:
    device = torch.cuda.get_device_name()
    path = ROOT / "bench" / "results" / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") / "gpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "versions": {"torch": torch.__version__, "triton": __import__("triton").__version__},
        "table": launch.table_name(torch.device("cuda", 0)),
        "ceilings": ceilings,
        "results": results,
    }
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    raise SystemExit(main())
