"""What every provider is checked against before it is timed: float64, from the package's reference backend."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import rollout
from rollout.bench.chains import softmax_maps

COLUMNS = "column means"  # of every layer's softmax, over heads and layers too: no rollout


def from_maps(maps: Sequence[Tensor], method: str = "rollout", query: int | None = 0, **options: Any) -> Tensor:
    """Row `query` [B, S], or all of R [B, S, S] when None; float64, by `backend="reference"`.

    One sample at a time: a whole batch in float64 may not fit beside its maps. Options are those of
    `rollout.attention_rollout`, of all samples.
    """
    rows = []
    for b in range(len(maps[0])):
        own = {name: of_sample(value, b) for name, value in options.items()}
        found = rollout.attention_rollout(of_sample(maps, b), query=query, method=method, backend="reference", **own)
        rows.append(found)
    return torch.cat(rows)


def from_qk(queries: Sequence[Tensor], keys: Sequence[Tensor], method: str = "rollout") -> Tensor:
    """The row of position 0 [B, S], or the `COLUMNS`; float64, by `backend="reference"`."""
    pairs = [(of_sample(queries, b), of_sample(keys, b)) for b in range(len(queries[0]))]
    if method != COLUMNS:
        return torch.cat([rollout.attention_rollout_qk(*pair, query=0, backend="reference") for pair in pairs])
    means = [[maps.mean((0, 1, 2)) for maps in softmax_maps(*pair)] for pair in pairs]
    return torch.stack([torch.stack(each).mean(0) for each in means])


def of_sample(value: Any, b: int) -> Any:
    """Of layers [B, …] or of a tensor [B], sample b, as float64 where it is a number of any precision."""
    if not isinstance(value, Tensor):
        return [of_sample(layer, b) for layer in value]
    sample = value[b : b + 1]
    return sample.double() if sample.is_floating_point() else sample
