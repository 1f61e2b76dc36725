"""Measures launch parameters on this machine's GPU and writes the package's table for it.

    python -m rollout_kernels._triton.tune [--quick | --minutes M | --dry-run]

For each width of a row, dtype and head dimension, every candidate that can keep the device busy, compiles and gives the
default's numbers is timed; the fastest goes into `tuned/<device>.json` beside this file, which the package then uses on
devices of that name. Candidates that give a sample other sums are allowed here: the table as a whole decides the order.
"""

import argparse
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from rollout_kernels import _triton, ops
from rollout_kernels._triton import inputs, launch, qk_inputs

DTYPES = {"32": torch.float32, "16": torch.bfloat16}
REGISTERS = 65536  # of a multiprocessor, on every architecture served
WARPS = 8  # resident on a multiprocessor at least, two for each of its schedulers
HEADS, LAYERS = 8, 3

Launch = dict[str, Any]
Trial = tuple[Callable[[], object], Callable[[], Tensor]]  # a kernel's launch, and what it leaves


@dataclass(frozen=True)
class Sizes:
    """Of what is timed: bytes of one layer's maps; B and S of queries and keys."""

    device: str = "cuda"
    map_bytes: int = 2**30
    batch: int = 64
    seq: int = 512


CARD, DRY = Sizes(), Sizes("cpu", 0, 1, 16)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two widths and one head dimension; nothing is written")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop trying candidates after that long")
    parser.add_argument("--dry-run", action="store_true", help="the default launches, tiny, in Triton's interpreter")
    options = parser.parse_args()
    if options.dry_run:
        return dry_run()
    if not torch.cuda.is_available() or launch.interpreting():
        print("rollout_kernels._triton.tune: no CUDA device is available; nothing was measured")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    table = deepcopy(launch.tables(launch.target(device).table))
    if options.quick:
        wanted = jobs(table, ("128", "512"), (64,))
    else:
        wanted = jobs(table, tuple(table["rows"]["32"]), _triton.HEAD_DIMENSIONS)
    started = perf_counter()
    for done, (group, key, tune) in enumerate(wanted, 1):  # each gets its share, and what the others left
        group[key] = tune(group[key], until=started + 60 * options.minutes * done / len(wanted))
    if not options.quick:
        name = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower()).strip("_")
        file = Path(_triton.__file__).parent / "tuned" / f"{name}.json"
        file.write_text(format_table(table))
        print(f"wrote {file.name}")
    return 0


def jobs(table: Launch, widths: Sequence[str], sizes: Sequence[int]) -> list[tuple[Launch, str, Callable[..., Launch]]]:
    """Where in the table each launch stands, and what finds the fastest for it."""
    found: list[tuple[Launch, str, Callable[..., Launch]]] = []
    for bits, dtype in DTYPES.items():
        found += [(table["rows"][bits], width, partial(tune_rows, int(width), dtype)) for width in widths]
        for size, kernel in itertools.product(sizes, ("logsumexp", "columns")):
            found.append((table[kernel][bits], str(size), partial(tune_scores, kernel, size, dtype)))
    return found


def dry_run() -> int:
    """The default launches of one width and one head dimension, as they are timed, in Triton's interpreter."""
    if not launch.interpreting():
        print("rollout_kernels._triton.tune: --dry-run runs Triton's interpreter: set TRITON_INTERPRET=1")
        return 1
    table = launch.tables("default")
    for group, key, tune in jobs(table, (min(table["rows"]["32"], key=int),), (16,)):
        tune(group[key], sizes=DRY)
    return 0


def format_table(table: dict[str, Any]) -> str:
    """JSON with one launch a line."""
    launches = r"\{\s*((?:\"\w+\": (?:\d+|\"\w+\"),?\s*)+)\}"
    return re.sub(launches, lambda m: "{" + " ".join(m[1].split()) + "}", json.dumps(table, indent=2)) + "\n"


def tune_rows(width: int, dtype: torch.dtype, default: Launch, until: float = math.inf, sizes: Sizes = CARD) -> Launch:
    """The fastest launch of both kernels of rows from maps: the sum of their times, for one width of a row."""
    batch = max(1, sizes.map_bytes // (HEADS * width * width * dtype.itemsize))
    maps = [torch.rand(batch, HEADS, width, width, device=sizes.device).to(dtype) for _ in range(LAYERS)]
    rows = torch.zeros(batch, dtype=torch.long, device=sizes.device)
    whole = ops.maps_problem(maps, query=rows, validate=False)
    few = ops.maps_problem([m[:8] for m in maps], query=rows[:8], validate=False)
    first = _triton.rows_resident if width <= launch.tables("default")["resident_longest"] else _triton.rows_split

    def trials(candidate: Launch) -> list[Trial]:
        config = launch.RowsLaunch(padded=width, **candidate)
        given = [inputs.map_inputs(problem) for problem in (whole, few)]
        kernels = zip((first, _triton.rows_split), given, strict=True)
        return [(partial(kernel, each, config), lambda each=each: each.out[0]) for kernel, each in kernels]  # type: ignore[misc]

    options = {
        "rows": sorted({default["rows"], max(1, default["rows"] // 2), min(32, default["rows"] * 2)}),
        "num_warps": (4, 8, 16), "stages": (2, 4, 6), "parts": (default["parts"], default["parts"] * 2),
        "maxnreg": (96, 128, 255),
    }  # fmt: skip
    busy = partial(keeps_loads_busy, width=width, itemsize=dtype.itemsize, memory=shared_memory())
    return fastest(f"rows {width} {dtype}", options, default, trials, until, busy)


def tune_scores(
    kernel: str, size: int, dtype: torch.dtype, default: Launch, until: float = math.inf, sizes: Sizes = CARD
) -> Launch:
    """The fastest launch of one kernel from Q and K, for one head dimension."""
    shape = (sizes.batch, HEADS, sizes.seq, size)
    queries, keys = ([torch.randn(shape, device=sizes.device).to(dtype) for _ in range(LAYERS)] for _ in "qk")
    rows = torch.zeros(sizes.batch, dtype=torch.long, device=sizes.device)
    problem = ops.qk_problem(queries, keys, query=rows, validate=False)  # fmt: skip
    given = qk_inputs.qk_inputs(problem, launch.interpreting())
    _triton.logsumexp(given, launch.scores_launch("logsumexp", dtype, size, launch.target(problem.device).table))

    def left() -> Tensor:
        assert given.lse is not None
        return given.lse[0, 0, 0] if kernel == "logsumexp" else given.out[0]

    def trials(candidate: Launch) -> list[Trial]:
        run = _triton.logsumexp if kernel == "logsumexp" else _triton.columns
        return [(partial(run, given, launch.ScoresLaunch(**candidate)), left)]

    options = {"block_m": (16, 32, 64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3)}
    busy = partial(holds_its_tiles, size=size, itemsize=dtype.itemsize, memory=shared_memory())
    return fastest(f"{kernel} D{size} {dtype}", options, default, trials, until, busy)


def shared_memory() -> int:
    """Bytes that one multiprocessor of this device has; 0 where there is none, and nothing is timed."""
    if not torch.cuda.is_available():
        return 0
    return torch.cuda.get_device_properties(torch.cuda.current_device()).shared_memory_per_multiprocessor


def keeps_loads_busy(candidate: Launch, width: int, itemsize: int, memory: int) -> bool:
    """Whether a launch of rows from maps is worth compiling: enough warps fit by registers and by the tiles on their
    way to them, and the tile that is fused and the one that is summed, both float32, leave a thread registers."""
    threads = 32 * candidate["num_warps"]
    tile = candidate["rows"] * width
    shared = (candidate["stages"] - 1) * tile * itemsize
    programs = min(REGISTERS // (threads * min(candidate["maxnreg"], 255)), memory // (shared + 1024))
    return programs * candidate["num_warps"] >= WARPS and 2 * tile // threads <= candidate["maxnreg"] * 3 // 4


def holds_its_tiles(candidate: Launch, size: int, itemsize: int, memory: int) -> bool:
    """Whether a launch from Q and K is worth compiling: its scores fit a thread's registers beside as many sums, and
    enough warps fit by the tiles that are on their way, the smaller of the two kinds."""
    threads = 32 * candidate["num_warps"]
    score = candidate["block_m"] * candidate["block_n"]
    shared = candidate["num_stages"] * min(candidate["block_m"], candidate["block_n"]) * size * itemsize
    programs = memory // (shared + 1024)
    return 2 * score // threads <= 192 and programs * candidate["num_warps"] >= WARPS


def fastest(
    label: str,
    options: Mapping[str, Sequence[int]],
    default: Launch,
    trials: Callable[[Launch], list[Trial]],
    until: float = math.inf,
    busy: Callable[[Launch], bool] = lambda candidate: True,
) -> Launch:
    """The candidate of the least time, of those that are `busy` and that the clock leaves time for; the default unless
    one is 2 % faster.

    Raises:
        RuntimeError: a candidate gives other numbers: an error in a kernel, not a slow candidate.
    """
    wanted: list[Tensor] = []

    def time(candidate: Launch) -> float:
        spent = 0.0
        for number, (run, left) in enumerate(trials(candidate)):
            run()
            if number == len(wanted):
                wanted.append(left().clone())
            if not torch.allclose(left(), wanted[number], rtol=1e-4, atol=1e-6):
                raise RuntimeError(f"rollout_kernels._triton.tune: {candidate} gives other numbers than {default}")
            spent += 0.0 if launch.interpreting() else do_bench(run, return_mode="median")
        return spent

    spent = time(default)
    best, least = default, 0.98 * spent
    combinations = [] if launch.interpreting() else itertools.product(*options.values())
    candidates = [dict(zip(options, values, strict=True)) for values in combinations]
    worth = [candidate for candidate in candidates if busy(candidate)]
    random.Random(0).shuffle(worth)  # what there is time for is of all kinds
    tried = 0
    for candidate in worth:
        if perf_counter() > until:
            print(f"{label}: out of time after {tried} of {len(worth)} candidates")
            break
        tried += 1
        try:
            taken = time(candidate)
        except _triton.CANNOT as error:
            if not _triton.cannot_compile(error):
                raise
            continue
        if taken < least:
            best, least = candidate, taken
    if launch.interpreting():
        print(f"{label}: ran in the interpreter {best}", flush=True)
    else:
        told = f"{least:.3f} ms (default {spent:.3f}), {tried} of {len(candidates)} tried"
        print(f"{label}: {told}, {best}", flush=True)
    return best


if __name__ == "__main__":
    raise SystemExit(main())
