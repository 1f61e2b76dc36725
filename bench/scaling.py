"""Time and memory against S, B, L and H: `python -m bench.scaling SOURCE PROVIDER` prints one provider's points.

Each provider runs in a process of its own and goes up each axis by doubling, until the next size would take more memory
or time than it may. What the next size needs is predicted from the sizes already run, so nothing is tried that does not
fit. Every point is checked before it is timed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.machine import host
from bench.machine.memory import peak_extra_bytes
from bench.providers import chains, oracle
from bench.providers.chains import MAPS, NAIVE, OURS, QK, Provider, Shape

MAPS_SOURCE, QK_SOURCE = "maps", "Q,K"
DIM = 64
LARGEST_LIMIT = 4 * 2**30  # bytes a provider may need, inputs included; less where the machine has less than 4× that
CALL_LIMIT = 6.0  # seconds a call may take
TIMING = 1.5  # seconds spent on one point
SEEN = 2**20  # bytes; less than this of extra memory is not a trend
BASE = {"S": Shape(1, 8, 64, 4), "B": Shape(1, 8, 128, 4), "L": Shape(4, 8, 128, 2), "H": Shape(4, 1, 128, 4)}
LARGEST = {"S": 2**17, "B": 64, "L": 32, "H": 32}
REFERENCE_UP_TO, WRITTEN_OUT_UP_TO = 512, 4096  # S the oracle's two forms are for


@dataclass(frozen=True)
class Limits:
    """How far a curve goes: bytes and seconds of one call, and the largest value of each axis."""

    memory: int
    seconds: float = CALL_LIMIT
    largest: tuple[tuple[str, int], ...] = tuple(LARGEST.items())
    timing: float = TIMING


QUICK = Limits(2**28, largest=(("S", 256), ("B", 2), ("L", 4), ("H", 2)), timing=0.0)


def default_limits() -> Limits:
    return Limits(min(LARGEST_LIMIT, host.available_bytes() // 4))


def curves() -> list[tuple[str, str, tuple[str, ...]]]:
    """(source, provider, axes): S for everyone, the others for ours and the naive chain."""
    every, first = tuple(BASE), ("S",)
    found = []
    for source, table in ((MAPS_SOURCE, MAPS), (QK_SOURCE, QK)):
        for name in table:
            if name != chains.COMPILED:  # one kernel set per shape: its curve is that of its compiler
                found.append((source, name, every if name == NAIVE or name.startswith(OURS) else first))
    return found


def input_bytes(source: str, shape: Shape) -> int:
    """What the inputs of a shape take, in float32."""
    if source == MAPS_SOURCE:
        return shape.all_bytes()
    return 2 * shape.L * shape.B * shape.H * shape.S * DIM * 4


def make_inputs(source: str, shape: Shape) -> tuple[list[Tensor], ...]:
    """L maps whose rows sum to 1, or Q and K of L layers; every layer memory of its own."""
    generator = torch.Generator().manual_seed(shape.S)
    if source == MAPS_SOURCE:
        first = torch.rand(shape.B, shape.H, shape.S, shape.S, generator=generator)
        first.div_(first.sum(-1, keepdim=True))
        # The layers differ by a shift of the columns: drawing numbers anew would take longer than the timing.
        return ([torch.roll(first, 3 * layer, -1).to(host.DEVICE) for layer in range(shape.L)],)
    size = (shape.B, shape.H, shape.S, DIM)
    made = [torch.randn(size, generator=generator).to(host.DEVICE) for _ in range(2 * shape.L)]
    return made[: shape.L], made[shape.L :]


def check(source: str, provider: Provider, inputs: tuple[list[Tensor], ...], result: Tensor) -> dict[str, Any]:
    """The error against the oracle, by the form of it that this length allows.

    Raises:
        AssertionError: the provider is wrong; it is not timed.
    """
    seq = inputs[0][0].shape[2]
    found: dict[str, Any] = {"checked": "float64"}
    if seq <= REFERENCE_UP_TO:
        if source == MAPS_SOURCE:
            exact = oracle.from_maps(inputs[0], provider.method)
        else:
            exact = oracle.from_qk(inputs[0], inputs[1], provider.method)
        found["error"] = oracle.relative_error(result, exact)
    elif seq <= WRITTEN_OUT_UP_TO:
        exact = (oracle.row_chain if source == MAPS_SOURCE else oracle.row_chain_qk)(*inputs)
        found["error"] = oracle.relative_error(result, exact)
    else:
        found |= {"checked": "sum of the row", "error": float((result.double().sum(-1) - 1).abs().max())}
    assert found["error"] <= 1e-5, f"not timed: error {found['error']:.2e} ({found['checked']}), allowed 1e-05"
    return found


def point(source: str, provider: Provider, shape: Shape, limits: Limits, flush: Callable[[], None]) -> dict[str, Any]:
    """Checks, then measures the memory, then times one shape; caches flushed before every timed call."""
    inputs = make_inputs(source, shape)

    def run() -> Tensor:
        result = provider.run(*inputs)
        host.synchronize()
        return result

    found = check(source, provider, inputs, run())
    found["extra"] = peak_extra_bytes(run)
    times: list[float] = []
    while not times or (sum(times) < limits.timing and len(times) < 15):
        flush()
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    found |= {"cache": "flushed before every call"}
    return found | {"seconds": statistics.median(times), "rounds": len(times), "inputs": input_bytes(source, shape)}


def climb(source: str, name: str, axis: str, limits: Limits, flush: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """The points of one curve, then one entry that says why it ended."""
    provider, shape = (MAPS if source == MAPS_SOURCE else QK)[name], BASE[axis]
    who = {"source": source, "provider": name, "axis": axis}
    done: list[dict[str, Any]] = []
    while getattr(shape, axis) <= dict(limits.largest)[axis]:
        value = getattr(shape, axis)
        memory, seconds = predicted(source, shape, done)
        if memory > limits.memory:
            yield who | {"stopped": "memory", "value": value, "predicted": memory, "limit": limits.memory}
            return
        if seconds > limits.seconds:
            yield who | {"stopped": "time", "value": value, "predicted": seconds, "limit": limits.seconds}
            return
        sizes = {key: getattr(shape, key) for key in "BHSL"} | ({"D": DIM} if source == QK_SOURCE else {})
        done.append({"value": value, "shape": sizes} | point(source, provider, shape, limits, flush))
        yield who | done[-1]
        shape = replace(shape, **{axis: 2 * value})
    yield who | {"stopped": "end", "value": dict(limits.largest)[axis], "limit": limits.memory}


def predicted(source: str, shape: Shape, done: list[dict[str, Any]]) -> tuple[float, float]:
    """Bytes (inputs, exactly; beside them what the last doubling multiplied) and seconds the next size will take."""
    held = float(input_bytes(source, shape))
    if not done:
        return held, 0.0
    return held + grown([each["extra"] or 0 for each in done], SEEN), grown([each["seconds"] for each in done], 0.01)


def grown(values: list[float], least: float) -> float:
    """The next value of a curve that doubles its size: the last times its last growth, at most ×8; ×4 with one value
    above `least`, and the last itself while it is below."""
    last = values[-1]
    if last < least:
        return last
    before = values[-2] if len(values) > 1 else 0.0
    return last * (min(8.0, max(1.0, last / before)) if before >= least else 4.0)


def run_all(limits: Limits) -> list[dict[str, Any]]:
    """Every curve, each provider in a process of its own.

    Raises:
        RuntimeError: a process failed; its last lines are in the message.
    """
    found = []
    for source, name, _ in curves():
        command = [sys.executable, "-m", "bench.scaling", source, name, f"--memory={limits.memory}"]
        command.append(f"--seconds={limits.seconds}")
        finished = subprocess.run(command, cwd=host.ROOT, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise RuntimeError(f"bench.scaling {source} {name} failed:\n{finished.stderr[-2000:]}")
        points = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
        print(f"scaling: {source}, {name}: {sum('seconds' in each for each in points)} points", flush=True)
        found += points
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", choices=(MAPS_SOURCE, QK_SOURCE))
    parser.add_argument("provider")
    parser.add_argument(
        "--memory", type=int, default=default_limits().memory, help="bytes a call may need, with inputs"
    )
    parser.add_argument("--seconds", type=float, default=CALL_LIMIT, help="seconds a call may take")
    parser.add_argument("--quick", action="store_true", help="few small sizes")
    options = parser.parse_args()
    torch.set_num_threads(host.THREADS)
    axes = {(source, name): axes for source, name, axes in curves()}
    if (options.source, options.provider) not in axes:
        parser.error(f"provider must be one of {[name for source, name in axes if source == options.source]}")
    limits, flush = QUICK if options.quick else Limits(options.memory, options.seconds), host.Flush()
    with torch.inference_mode():
        for axis in axes[options.source, options.provider]:
            for entry in climb(options.source, options.provider, axis, limits, flush):
                print(json.dumps(entry), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
