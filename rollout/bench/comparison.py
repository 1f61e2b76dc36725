"""`rollout bench`: how fast attention rollout is on this machine, against the chain as most public code writes it.

Each provider's result is compared with float64 before it is timed; a wrong one has no time. The two take turns, so that
what else the machine does hits both. Beside the times stand the machine's own limits, measured in the same run: reading
memory, copying it, and multiplying matrices.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rollout.api import attention_rollout, attention_rollout_qk
from rollout.bench import end_to_end, table
from rollout.bench.measure import OURS, Ceilings, Row, Runs, Settings, compare, does_not_fit, measure_ceilings
from rollout_kernels import Method, ops
from rollout_kernels._dispatch import choose

__all__ = ["Settings", "naive_chain", "naive_chain_qk", "rows_from_maps", "rows_from_qk", "run", "softmax_maps"]

NAIVE = "naive chain"
ALLOWED = {NAIVE: 1e-5, "maps": 1e-6, "qk": 3e-6}  # max|err| / max|ref| against float64


def run(
    settings: Settings, *, pyhealth: bool = False, file: Path | None = None, say: Callable[[str], None] = print
) -> bool:
    """Measure everything, saying each line as it is known.

    Args:
        settings: what to run.
        pyhealth: also attribute with PyHealth's interpreter and with ours, and compare patients a second.
        file: where the record goes, as JSON: seconds, bytes, shares of 1.
        say: given the lines.

    Returns:
        Whether every result was right; a wrong one has no time.

    Raises:
        ImportError: `pyhealth` is asked for and not installed.
        ValueError: it is asked for with heads that do not fit its model; or `file` has no folder to be in.
    """
    if pyhealth:
        end_to_end.check(settings)
    if file is not None and (file.is_dir() or not file.resolve().parent.is_dir()):
        raise ValueError(f"bench: json must be a file in a folder that is there, got {file}")
    machine = table.machine(settings.target)
    say(table.head(machine))
    ceilings = measure_ceilings(settings.target)
    say(table.limits(ceilings))
    rows: list[Row] = []
    for row in _rows(settings, ceilings, pyhealth):
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
            "rows": [{**asdict(row), "speedup": row.speedup} for row in rows],
        }
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return not any(row.wrong for row in rows)


def _rows(settings: Settings, ceilings: Ceilings, pyhealth: bool) -> Iterator[Row]:
    for measure in (rows_from_maps, rows_from_qk):
        for seq in settings.sequences:
            yield measure(settings, seq, ceilings)
    if pyhealth:
        yield from end_to_end.patients(settings)


def naive_full(maps: Iterable[Tensor]) -> Tensor:
    """R as most public code computes it: mean over heads, ½(A + I), row sum, S×S products.

    Args:
        maps: L maps [B, H, S, S], input side first.

    Returns:
        [B, S, S], of the maps' dtype.

    Source: Abnar & Zuidema 2020, arXiv:2005.00928, section 3.
    """
    product: Tensor | None = None
    for attention in maps:
        fused = attention.mean(1)
        matrix = 0.5 * (fused + torch.eye(fused.shape[-1], dtype=fused.dtype, device=fused.device))
        matrix = matrix / matrix.sum(-1, keepdim=True)
        product = matrix if product is None else torch.bmm(matrix, product)
    if product is None:
        raise ValueError("naive_full: maps must be one or more layers, got none")
    return product


def naive_chain(maps: Iterable[Tensor]) -> Tensor:
    """Row 0 of `naive_full`, [B, S]."""
    return naive_full(maps)[:, 0]


def softmax_maps(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Iterator[Tensor]:
    """softmax(QKᵀ/√D) of each layer, [B, H, S, S], one at a time."""
    for q, k in zip(queries, keys, strict=True):
        yield torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)


def naive_chain_qk(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """The maps of every layer, as a model returns them, then `naive_chain`."""
    return naive_chain(list(softmax_maps(queries, keys)))


def rows_from_maps(settings: Settings, seq: int, ceilings: Ceilings) -> Row:
    """Row 0 from stored float32 maps."""
    row, shape = _empty("rows from maps", seq), (settings.batch, settings.heads, seq, seq)
    size = 4 * math.prod(shape)
    # Beside the maps: a layer in float64 for the check, and what the naive chain makes.
    row = replace(row, skipped=does_not_fit((settings.layers + 3) * size, settings.target))
    if row.skipped:
        return row
    maps = [_normal(shape, layer, settings.target).softmax(-1) for layer in range(settings.layers)]
    problem = ops.maps_problem(maps, 0, None, None, Method(), True)
    runs: Runs = {NAIVE: partial(naive_chain, maps), OURS: partial(attention_rollout, maps, query=0)}
    reference = naive_chain(layer.double() for layer in maps)
    allowed = {NAIVE: ALLOWED[NAIVE], OURS: ALLOWED["maps"]}
    row = compare(row, runs, reference, allowed, settings.seconds, settings.target)
    work = (settings.layers - 1) * size + size // seq  # of the top layer one row per head is enough
    return _rated(replace(row, backend=choose(problem, "auto").name), work, ceilings.memory)


def rows_from_qk(settings: Settings, seq: int, ceilings: Ceilings) -> Row:
    """Row 0 from float32 queries and keys; the naive chain writes the softmax of every layer out first."""
    row, shape = _empty("rows from Q,K", seq), (settings.batch, settings.heads, seq, settings.size)
    scores = 4 * settings.batch * settings.heads * seq**2
    row = replace(row, skipped=does_not_fit((settings.layers + 5) * scores, settings.target))
    if row.skipped:
        return row
    queries, keys = ([_normal(shape, 2 * k + odd, settings.target) for k in range(settings.layers)] for odd in (0, 1))
    problem = ops.qk_problem(
        queries, keys, 0, lengths=None, key_mask=None, query_mask=None, causal=False, window=None, bias=None,
        scale=None, logsumexp=None, method=Method(), validate=True,
    )  # fmt: skip
    runs: Runs = {
        NAIVE: partial(naive_chain_qk, queries, keys),
        OURS: partial(attention_rollout_qk, queries, keys, query=0),
    }
    reference = naive_chain(softmax_maps([q.double() for q in queries], [k.double() for k in keys]))
    allowed = {NAIVE: ALLOWED[NAIVE], OURS: ALLOWED["qk"]}
    row = compare(row, runs, reference, allowed, settings.seconds, settings.target)
    work = 2 * settings.size * (scores // 4) // seq * ((settings.layers - 1) * seq + 1)
    return _rated(replace(row, backend=choose(problem, "auto").name), work, ceilings.matmul)


def _empty(table: str, seq: int) -> Row:
    return Row(table, f"S={seq}", {}, {}, {})


def _rated(row: Row, work: float, limit: float) -> Row:
    if OURS not in row.seconds:
        return row
    rate = work / row.seconds[OURS]
    return replace(row, rate=rate, share=rate / limit)


def _normal(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)
