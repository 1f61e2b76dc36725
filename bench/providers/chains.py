"""Who computes a rollout in the benches: ours by backend, the naive chain, its torch.compile, and the published peers.

A `Provider` takes the suite's inputs and gives a result that is compared with the oracle of its own method before it is
timed. `work` says what it must read and multiply, for its share of the machine's ceilings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

import rollout
from bench.machine import host
from bench.providers import peers
from bench.providers.oracle import relative_error
from rollout.bench import naive_chain, naive_chain_qk, naive_full

__all__ = ["FULL", "MAPS", "METHODS", "QK", "Provider", "Shape", "compiler_problem", "relative_error"]

Maps = Sequence[Tensor]
NAIVE, COMPILED, OURS, READ = "naive chain", "naive chain, torch.compile", "ours", "one read of the maps"


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem; D is 0 where there are only maps."""

    B: int
    H: int
    S: int
    L: int
    D: int = 0

    @property
    def map_entries(self) -> int:
        """Entries of one layer's maps."""
        return self.B * self.H * self.S**2

    def row_bytes(self, itemsize: int = 4) -> int:
        """What a row chain must read: the maps of every layer but the top one, and one row per head of that."""
        return (self.map_entries * (self.L - 1) + self.B * self.H * self.S) * itemsize

    def all_bytes(self, itemsize: int = 4) -> int:
        """Every map."""
        return self.map_entries * self.L * itemsize

    @property
    def product_flop(self) -> int:
        """The L − 1 products [S, S]·[S, S] of each sample."""
        return 2 * self.B * (self.L - 1) * self.S**3

    @property
    def row_scores_flop(self) -> int:
        """The scores a row chain from Q and K needs: all but the top layer's, one row per head of that."""
        return 2 * self.D * (self.map_entries * (self.L - 1) + self.B * self.H * self.S)

    @property
    def all_scores_flop(self) -> int:
        """The scores of every layer."""
        return 2 * self.D * self.map_entries * self.L


@dataclass(frozen=True)
class Provider:
    """`run(*inputs)` gives the result; `method` names the oracle it is held to, within `tolerance`.

    `work(shape)` is (values read of the maps as bytes in float32, operations multiplied) of what this provider does;
    the naive ones read every map and multiply out the full product, ours does not.
    """

    run: Callable[..., Tensor]
    method: str = "rollout"
    tolerance: float = 1e-5
    work: Callable[[Shape], tuple[int, int]] = lambda shape: (shape.all_bytes(), shape.product_flop)


def ours(maps: Maps, backend: str = "torch") -> Tensor:
    """`rollout.attention_rollout`, checks on."""
    return rollout.attention_rollout(maps, query=0, backend=backend)


def ours_full(maps: Maps, backend: str = "torch") -> Tensor:
    return rollout.attention_rollout(maps, backend=backend)


def ours_qk(queries: Maps, keys: Maps, backend: str = "torch") -> Tensor:
    """`rollout.attention_rollout_qk`, checks on, log-sum-exp not given."""
    return rollout.attention_rollout_qk(queries, keys, query=0, backend=backend)


def read_limit(maps: Maps) -> Tensor:
    """One read of the maps that must be read: all layers but the top one, whose row 0 suffices. Not a rollout."""
    return torch.stack([attention.view(-1).sum() for attention in maps[:-1]])


@cache
def compiler_problem() -> str | None:
    """Why `torch.compile` cannot be timed here, or None: a small function is compiled to find out."""
    try:
        probe = torch.compile(lambda x: (x * 2 + 1).sum(-1))
        probe(torch.ones(4, 4, device=host.DEVICE))
    except Exception as error:  # what a missing compiler raises is the compiler's choice
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return None


@cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.compile` of a chain, one kernel set per shape."""
    return torch.compile(function, dynamic=False)


def _first_row(full: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The row of position 0 of a provider that gives the full product."""
    return lambda *inputs: full(*inputs)[:, 0]


def _by_backend(
    name: str, run: Callable[..., Tensor], tolerance: float, work: Callable[[Shape], tuple[int, int]]
) -> dict[str, Provider]:
    """Ours by backend: torch anywhere; triton beside it on a GPU, where it is what `"auto"` takes."""
    found = {name: Provider(run, tolerance=tolerance, work=work)}
    if host.DEVICE == "cuda":
        found[f"{name}, triton"] = Provider(lambda *x: run(*x, backend="triton"), tolerance=tolerance, work=work)
    return found


def _row_work(shape: Shape) -> tuple[int, int]:
    return shape.row_bytes(), 0


def _naive_chain_qk_work(shape: Shape) -> tuple[int, int]:
    return 0, shape.all_scores_flop + shape.product_flop


MAPS: dict[str, Provider] = {
    **_by_backend(OURS, ours, 1e-6, _row_work),
    NAIVE: Provider(naive_chain),
    COMPILED: Provider(lambda maps: compiled(naive_chain)(maps)),
    "PyHealth's arithmetic": Provider(_first_row(peers.pyhealth_maths), "pyhealth"),
    "Abnar & Zuidema 2020": Provider(_first_row(peers.abnar_zuidema)),
    "Chefer 2021 (CVPR) rollout": Provider(_first_row(peers.chefer_rollout), "chefer_rollout"),
}
FULL: dict[str, Provider] = {
    NAIVE: Provider(naive_full),
    **_by_backend(OURS, ours_full, 1e-6, lambda shape: (shape.all_bytes(), shape.product_flop)),
    COMPILED: Provider(lambda maps: compiled(naive_full)(maps)),
    "PyHealth's arithmetic": Provider(peers.pyhealth_maths, "pyhealth"),
    "Abnar & Zuidema 2020": Provider(peers.abnar_zuidema),
    "Chefer 2021 (CVPR) rollout": Provider(peers.chefer_rollout, "chefer_rollout"),
}
QK: dict[str, Provider] = {
    NAIVE: Provider(naive_chain_qk, work=_naive_chain_qk_work),
    **_by_backend(OURS, ours_qk, 3e-6, lambda shape: (0, shape.row_scores_flop)),
    COMPILED: Provider(lambda q, k: compiled(naive_chain_qk)(q, k), work=_naive_chain_qk_work),
}


def _ours_by(method: str, backend: str = "torch") -> Callable[..., Tensor]:
    def run(maps: Maps, gradients: Maps | None = None) -> Tensor:
        return rollout.attention_rollout(maps, query=0, gradients=gradients, method=method, backend=backend)

    return run


# The other methods: (method, who) → provider. Those with gradients get them as a second input.
METHODS: dict[tuple[str, str], Provider] = {
    ("discard", "Gildenblat 2020 (vit-explain)"): Provider(_first_row(peers.gildenblat_discard), "discard"),
    ("discard", OURS): Provider(_ours_by("discard"), "discard", 1e-6, lambda shape: (shape.all_bytes(), 0)),
    ("chefer", "Chefer 2021 (ICCV)"): Provider(
        _first_row(peers.chefer_gradients), "chefer", work=lambda s: (2 * s.all_bytes(), s.product_flop)
    ),
    ("chefer", OURS): Provider(_ours_by("chefer"), "chefer", 1e-6, lambda shape: (2 * shape.row_bytes(), 0)),
}
