"""The problems of a chain, and what each provider is checked against first: float64, from the reference backend."""

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
class Problem:
    """L layers of maps, or of queries and keys where there is a D.

    Attributes:
        kind: `"full"` asks for all of R, any other for the row of position 0; `"chefer"` has gradients beside.
        B, H, S, L, D: sizes.
        dtype: of the inputs.
        compared: how many samples are held to the oracle; of 0 the sums of the rows alone, which are 1.
        drawn_on: the CPU, so that all devices get the same numbers, or what is faster.
    """

    kind: str
    B: int
    H: int
    S: int
    L: int
    D: int = 0
    dtype: torch.dtype = torch.float32
    compared: int | None = None
    drawn_on: str = "cpu"

    def __str__(self) -> str:
        return "-".join([self.kind, *(f"{letter}{size}" for letter, size in self.shape.items())])

    @property
    def shape(self) -> dict[str, int]:
        return {letter: size for letter in "BHSLD" if (size := getattr(self, letter))}

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


@lru_cache(1)  # the longest are gigabytes
def make_inputs(of: Problem) -> dict[str, list[Tensor]]:
    """L tensors of each name, normal; maps are the softmax of such."""
    names = ["queries", "keys", "values", "output_gradients"] if of.D else ["maps", "gradients"]
    if of.kind != "chefer":
        names = names[: len(names) // 2]
    generator = torch.Generator(of.drawn_on).manual_seed(of.S)

    def draw(name: str) -> Tensor:
        drawn = torch.randn(of.B, of.H, of.S, of.D or of.S, generator=generator, device=of.drawn_on)
        return (drawn.softmax(-1) if name == "maps" else drawn).to(host.DEVICE, of.dtype)

    return {name: [draw(name) for _ in range(of.L)] for name in names}


def from_maps(maps: Sequence[Tensor], method: str = "rollout", query: int | None = 0, **options: Any) -> Tensor:
    """Row `query` [B, S], or all of R [B, S, S] when None; options are those of `rollout.attention_rollout`."""
    wide = [maps[0].double(), *maps[1:]]  # for a float64 result; the backend computes in it anyway, sample by sample
    return rollout.attention_rollout(wide, query=query, method=method, backend="reference", **options)


def from_qk(queries: Sequence[Tensor], keys: Sequence[Tensor], method: str = "rollout", **options: Any) -> Tensor:
    """The row of position 0 [B, S], or the `COLUMNS`; options are those of `rollout.attention_rollout_qk`."""
    if method == COLUMNS:
        maps = softmax_maps([q.double() for q in queries], [k.double() for k in keys])
        return torch.stack([layer.mean((1, 2)) for layer in maps]).mean(0)
    wide = [queries[0].double(), *queries[1:]]
    return rollout.attention_rollout_qk(wide, keys, query=0, method=method, backend="reference", **options)


@lru_cache(4)
def expect(of: Problem, method: str) -> dict[str, Any]:
    """The `reference` by this method, and the `part` of a result that it is compared with, as `measure` takes them."""
    if of.compared == 0:
        ones = torch.ones(of.B, dtype=torch.float64, device=host.DEVICE)
        return {"reference": ones, "part": lambda row: row.double().sum(-1)}
    first = {name: [layer[: of.compared] for layer in layers] for name, layers in make_inputs(of).items()}
    if of.D:
        exact = from_qk(**first, method=method)
    else:
        exact = from_maps(**first, method=method, query=None if of.kind == "full" else 0)
    return {"reference": exact, "part": lambda result: result[: of.compared]}
