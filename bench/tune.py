"""Measures launch parameters on this machine's GPU and writes the package's table for it: `python -m bench.tune`.

For each width of a row, dtype and head dimension, every candidate that compiles and gives the default's numbers is
timed; the fastest goes into `kernels/rollout_kernels/_triton/tuned/<device>.json`, which the package then uses on
devices of that name. Candidates that give a sample other sums are allowed here: the table as a whole decides the order.
"""

import argparse
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from bench.gpu import milliseconds
from rollout_kernels import _triton, ops
from rollout_kernels._triton import inputs, launch, qk_inputs
from rollout_kernels.method import Method

FOLDER = Path(_triton.__file__).parent / "tuned"
DTYPES = {"32": torch.float32, "16": torch.bfloat16}
CANNOT = (CompilationError, OutOfResources, PTXASError)
HEADS, LAYERS = 8, 3
MAP_BYTES = 2**30  # of one layer's maps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="two widths and one head dimension; nothing is written")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.tune: no CUDA device is available; nothing was measured")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    table = deepcopy(launch.tables(launch.table_name(device)))
    for bits, dtype in DTYPES.items():
        for width in (128, 512) if options.quick else map(int, table["rows"][bits]):
            table["rows"][bits][str(width)] = tune_rows(width, dtype, table["rows"][bits][str(width)])
        for size in (64,) if options.quick else _triton.HEAD_DIMENSIONS:
            for kernel in ("logsumexp", "columns"):
                chosen = tune_scores(kernel, size, dtype, table[kernel][bits][str(size)])
                table[kernel][bits][str(size)] = chosen
    if not options.quick:
        name = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower()).strip("_")
        (FOLDER / f"{name}.json").write_text(formatted(table))
        print(f"wrote {name}.json")
    return 0


def formatted(table: dict[str, Any]) -> str:
    """JSON with one launch a line."""
    text = json.dumps(table, indent=2)
    return (
        re.sub(r"\{\s*((?:\"\w+\": (?:\d+|\"\w+\"),?\s*)+)\}", lambda m: "{" + " ".join(m[1].split()) + "}", text)
        + "\n"
    )


def tune_rows(width: int, dtype: torch.dtype, default: dict[str, int]) -> dict[str, int]:
    """The fastest launch of both kernels of rows from maps: the sum of their times, for one width of a row."""
    batch = max(1, MAP_BYTES // (HEADS * width * width * dtype.itemsize))
    maps = [torch.rand(batch, HEADS, width, width, device="cuda").to(dtype) for _ in range(LAYERS)]
    rows = torch.zeros(batch, dtype=torch.long, device="cuda")
    whole = ops.maps_problem(maps, rows, None, None, Method(), False)
    few = ops.maps_problem([m[:8] for m in maps], rows[:8], None, None, Method(), False)

    def time(candidate: dict[str, int], wanted: Tensor | None) -> tuple[float, Tensor]:
        config = launch.RowsLaunch(padded=width, **candidate)
        arguments = [inputs.map_inputs(problem, rows[: problem.batch], 1) for problem in (whole, few)]
        kernels = [_triton.rows_split, _triton.rows_split]
        if width <= launch.tables("default")["resident_longest"]:
            kernels[0] = _triton.rows_resident
        spent = 0.0
        for kernel, argument in zip(kernels, arguments, strict=True):
            kernel(argument, config)
            same(argument.out[0], wanted)
            spent += milliseconds(lambda kernel=kernel, argument=argument: kernel(argument, config), 7)  # type: ignore[misc]
        return spent, arguments[0].out[0]

    names = ("rows", "num_warps", "stages", "parts", "maxnreg")
    tiles = {default["rows"], max(1, default["rows"] // 2), min(32, default["rows"] * 2)}
    options = (sorted(tiles), (4, 8, 16), (2, 4, 6), (default["parts"], default["parts"] * 2), (96, 128, 255))
    return fastest(
        f"rows {width} {dtype}", (dict(zip(names, c, strict=True)) for c in product(*options)), default, time
    )


def tune_scores(kernel: str, size: int, dtype: torch.dtype, default: dict[str, int]) -> dict[str, int]:
    """The fastest launch of one kernel from Q and K, for one head dimension."""
    queries, keys = ([torch.randn(64, HEADS, 512, size, device="cuda").to(dtype) for _ in range(LAYERS)] for _ in "qk")
    rows = torch.zeros(64, dtype=torch.long, device="cuda")
    problem = ops.qk_problem(
        queries, keys, rows, lengths=None, key_mask=None, query_mask=None, causal=False, window=None, bias=None,
        scale=None, logsumexp=None, method=Method(), validate=False,
    )  # fmt: skip
    arguments = qk_inputs.qk_inputs(problem, False)
    name = launch.table_name(problem.device)
    _triton.logsumexp(arguments, launch.scores_launch("logsumexp", dtype, size, name))

    def time(candidate: dict[str, int], wanted: Tensor | None) -> tuple[float, Tensor]:
        config = launch.ScoresLaunch(**candidate)
        run = _triton.logsumexp if kernel == "logsumexp" else _triton.columns
        run(arguments, config)
        assert arguments.lse is not None
        result = arguments.lse[0, 0, 0] if kernel == "logsumexp" else arguments.out[0]
        same(result, wanted)
        return milliseconds(lambda: run(arguments, config), 7), result.clone()

    names = ("block_m", "block_n", "num_warps", "num_stages")
    options = ((16, 32, 64, 128), (32, 64, 128), (4, 8), (2, 3))
    candidates = (dict(zip(names, c, strict=True)) for c in product(*options))
    return fastest(f"{kernel} D{size} {dtype}", candidates, default, time)


def product(*options: Iterable[int]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*options)


def same(result: Tensor, wanted: Tensor | None) -> None:
    """A candidate that gives other numbers is an error in a kernel, not a slow candidate."""
    if wanted is not None and not torch.allclose(result, wanted, rtol=1e-4, atol=1e-6):
        raise RuntimeError("bench.tune: a candidate's numbers differ from the default's")


def fastest(label: str, candidates: Iterable[dict[str, int]], default: dict[str, int], time: Any) -> dict[str, int]:
    """The candidate of the least time; the default unless one is 2 % faster."""
    spent, wanted = time(default, None)
    best, best_spent = default, spent * 0.98
    for candidate in candidates:
        try:
            taken, _ = time(candidate, wanted)
        except CANNOT:
            continue
        if taken < best_spent:
            best, best_spent = candidate, taken
    print(f"{label}: {best_spent:.3f} ms (default {spent:.3f}) {best}", flush=True)
    return best


if __name__ == "__main__":
    raise SystemExit(main())
