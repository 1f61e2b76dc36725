"""The problems that are set to the providers of a chain, and what each is checked against before it is timed.

That is float64, from the package's reference backend.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import rollout
from bench.machine import host
from rollout.bench.chains import softmax_maps

COLUMNS = "column means"  # of every layer's softmax, over heads and layers too: no rollout


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem; D is 0 where there are only maps."""

    B: int
    H: int
    S: int
    L: int
    D: int = 0

    def __str__(self) -> str:
        return "-".join(f"{name}{size}" for name, size in self.sizes.items())

    @property
    def sizes(self) -> dict[str, int]:
        return {key: size for key, size in vars(self).items() if size}

    @property
    def entries(self) -> int:
        """Of every layer's maps."""
        return self.B * self.H * self.S**2 * self.L

    @property
    def row_entries(self) -> int:
        """Of the maps a row chain must read: of every layer but the top one, and one row per head of that."""
        return self.B * self.H * (self.S**2 * (self.L - 1) + self.S)

    @property
    def product_flop(self) -> int:
        """The L − 1 products [S, S]·[S, S] of each sample."""
        return 2 * self.B * (self.L - 1) * self.S**3


@dataclass(frozen=True)
class Problem:
    """L layers of maps, or of queries and keys where the shape has a D.

    Attributes:
        kind: `"full"` asks for all of R, any other for the row of position 0; `"chefer"` has gradients beside.
        dtype: of the inputs.
        compared: how many samples are held to the oracle; of 0 the sums of the rows alone, which are 1.
    """

    kind: str
    shape: Shape
    dtype: torch.dtype = torch.float32
    compared: int | None = None


@lru_cache(1)  # the longest are gigabytes
def make_inputs(problem: Problem) -> dict[str, list[Tensor]]:
    """Normal numbers, of which maps are the softmax, by name: L tensors each."""
    shape = problem.shape
    names = ["queries", "keys", "values", "output_gradients"] if shape.D else ["maps", "gradients"]
    if problem.kind != "chefer":
        names = names[: len(names) // 2]
    generator = torch.Generator(host.DEVICE).manual_seed(shape.S)

    def draw(name: str) -> Tensor:
        sizes = (shape.B, shape.H, shape.S, shape.D or shape.S)
        drawn = torch.randn(sizes, generator=generator, device=host.DEVICE)
        return (drawn.softmax(-1) if name == "maps" else drawn).to(problem.dtype)

    return {name: [draw(name) for _ in range(shape.L)] for name in names}


def from_maps(maps: Sequence[Tensor], method: str = "rollout", query: int | None = 0, **options: Any) -> Tensor:
    """Row `query` [B, S], or all of R [B, S, S] when None; options are those of `rollout.attention_rollout`."""
    return rollout.attention_rollout(_widen(maps), query=query, method=method, backend="reference", **options)


def from_qk(queries: Sequence[Tensor], keys: Sequence[Tensor], method: str = "rollout", **options: Any) -> Tensor:
    """The row of position 0 [B, S], or the `COLUMNS`; options are those of `rollout.attention_rollout_qk`."""
    if method == COLUMNS:
        maps = softmax_maps([q.double() for q in queries], [k.double() for k in keys])
        return torch.stack([layer.mean((1, 2)) for layer in maps]).mean(0)
    return rollout.attention_rollout_qk(_widen(queries), keys, query=0, method=method, backend="reference", **options)


def _widen(layers: Sequence[Tensor]) -> list[Tensor]:
    """One layer in float64, which the result then is too; the backend computes in it anyway, sample by sample."""
    return [layers[0].double(), *layers[1:]]


@lru_cache(4)
def expect(problem: Problem, method: str) -> dict[str, Any]:
    """The `reference` by this method, and the `part` of a result that it is compared with, as `measure` takes them."""
    if problem.compared == 0:
        ones = torch.ones(problem.shape.B, dtype=torch.float64, device=host.DEVICE)
        return {"reference": ones, "part": lambda row: row.double().sum(-1)}
    first = {name: [layer[: problem.compared] for layer in layers] for name, layers in make_inputs(problem).items()}
    if problem.shape.D:
        exact = from_qk(**first, method=method)
    else:
        exact = from_maps(**first, method=method, query=None if problem.kind == "full" else 0)
    return {"reference": exact, "part": lambda result: result[: problem.compared]}
