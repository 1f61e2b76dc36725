"""The rows of `rollout bench`: ours against the naive chain, and as a share of the work that cannot be left out.

Each provider's result is compared with float64 before it is timed; a wrong one has no time. They take turns, so that
what else the machine does hits all. Above the tables stand the machine's own limits, measured in the same run: reading
memory, copying it, and multiplying matrices.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rollout.api import attention_rollout, attention_rollout_qk
from rollout.bench import end_to_end, methods, table
from rollout.bench.chains import (
    NAIVE,
    PRODUCTS,
    READ,
    multiply,
    naive_chain,
    naive_chain_qk,
    read_maps,
    softmax_maps,
)
from rollout.bench.measure import OURS, Row, Runs, compare, does_not_fit, measure_ceilings
from rollout.bench.settings import Settings
from rollout.files import write_json
from rollout_kernels import ops
from rollout_kernels._dispatch import choose

ALLOWED = {NAIVE: 1e-5, "maps": 1e-6, "qk": 3e-6}  # max|err| / max|ref| against float64


def run(
    settings: Settings, *, pyhealth: bool = False, file: Path | None = None, say: Callable[[str], None] = print
) -> bool:
    """Measure everything, saying each line as it is known.

    Args:
        settings: what to run.
        pyhealth: also attribute with PyHealth's interpreter and with ours, and compare samples a second.
        file: where the record goes, as JSON: seconds, bytes, shares of 1.
        say: given the lines.

    Returns:
        Whether every result was right; a wrong one has no time.

    Raises:
        ImportError: `pyhealth` is asked for and not installed.
        ValueError: it is asked for with heads that do not fit its model; or `file` has no folder to be in.
    """
    if pyhealth:
        end_to_end.check(settings.heads)
    if file is not None and (file.is_dir() or not file.resolve().parent.is_dir()):
        raise ValueError(f"bench: json must be a file in a folder that is there, got {file}")
    machine = table.machine(settings.target)
    say(table.head(machine))
    ceilings = measure_ceilings(settings.target)
    say(table.limits(ceilings))
    rows: list[Row] = []
    for row in _rows(settings, pyhealth):
        if not rows or rows[-1].table != row.table:
            say("\n" + table.title(settings, row))
        rows.append(row)
        say(table.line(row))
    say("\n" + table.NOTES)
    if file is not None:
        record = {
            **machine,
            "settings": asdict(settings),
            "ceilings": asdict(ceilings),
            "rows": [{**asdict(row), "speedup": row.speedup, "share": row.share, "cost": row.cost} for row in rows],
        }
        write_json(record, file)
    return not any(row.wrong for row in rows)


def _rows(settings: Settings, pyhealth: bool) -> Iterator[Row]:
    for measure in (rows_from_maps, rows_from_qk):
        for seq in settings.sequences:
            yield measure(settings, seq)
    yield from methods.rows_from_qk(settings)
    if pyhealth:
        yield from end_to_end.rows(settings)
        yield from methods.rows_of_whole_calls(settings)


def rows_from_maps(settings: Settings, seq: int) -> Row:
    """Row 0 from stored float32 maps."""
    row = Row("rows from maps", f"S={seq}", NAIVE, READ, {}, {}, {})
    shape = (settings.batch, settings.heads, seq, seq)
    # Beside the maps: a layer in float64 for the check, and what the naive chain makes.
    skipped = does_not_fit((settings.layers + 3) * 4 * math.prod(shape), settings.target)
    if skipped:
        return replace(row, skipped=skipped)
    maps = [_normal(shape, layer, settings.target).softmax(-1) for layer in range(settings.layers)]
    problem = ops.maps_problem(maps, query=0)
    runs: Runs = {
        NAIVE: partial(naive_chain, maps),
        OURS: partial(attention_rollout, maps, query=0),
        READ: partial(read_maps, maps),
    }
    reference = naive_chain(layer.double() for layer in maps)
    allowed = {NAIVE: ALLOWED[NAIVE], OURS: ALLOWED["maps"]}
    row = replace(row, backend=choose(problem, "auto").name)
    return compare(row, runs, reference, allowed, settings.seconds, settings.target)


def rows_from_qk(settings: Settings, seq: int) -> Row:
    """Row 0 from float32 queries and keys; the naive chain writes the softmax of every layer out first."""
    row = Row("rows from Q,K", f"S={seq}", NAIVE, PRODUCTS, {}, {}, {})
    shape = (settings.batch, settings.heads, seq, settings.size)
    scores = 4 * settings.batch * settings.heads * seq**2
    skipped = does_not_fit((settings.layers + 5) * scores, settings.target)
    if skipped:
        return replace(row, skipped=skipped)
    queries, keys = ([_normal(shape, 2 * k + odd, settings.target) for k in range(settings.layers)] for odd in (0, 1))
    problem = ops.qk_problem(queries, keys, query=0)  # fmt: skip
    runs: Runs = {
        NAIVE: partial(naive_chain_qk, queries, keys),
        OURS: partial(attention_rollout_qk, queries, keys, query=0),
        PRODUCTS: partial(multiply, queries, keys),
    }
    reference = naive_chain(softmax_maps([q.double() for q in queries], [k.double() for k in keys]))
    allowed = {NAIVE: ALLOWED[NAIVE], OURS: ALLOWED["qk"]}
    row = replace(row, backend=choose(problem, "auto").name)
    return compare(row, runs, reference, allowed, settings.seconds, settings.target)


def _normal(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)
