"""Who computes a rollout in the benches: ours by backend, the naive chain, its torch.compile, and the published peers.

The floors beside them, one read of the maps and the products QKᵀ alone, are no rollout and are not checked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import rollout
from bench.machine import host
from bench.providers import kernels, oracle, peers
from rollout.bench import chains as naive
from rollout.bench.chains import NAIVE, PRODUCTS, READ
from rollout.bench.measure import OURS
from rollout_kernels import _native

COMPILED, NATIVE = "naive chain, torch.compile", f"{OURS}, native"
GILDENBLAT, CHEFER = "Gildenblat 2020 (vit-explain)", "Chefer 2021 (ICCV)"


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem; D is 0 where there are only maps."""

    B: int
    H: int
    S: int
    L: int
    D: int = 0

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


SEQUENCES, QUICK = (64, 128, 256, 512), 128


def shape_of(seq: int, layers: int = 4, size: int = 0) -> Shape:
    """Of the suites of chains."""
    return Shape(32, 8, seq, layers, size)


def make_random(sizes: tuple[int, ...], count: int, seed: int) -> list[Tensor]:
    """Normal numbers, drawn on the CPU: the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sizes, generator=generator).to(host.DEVICE) for _ in range(count)]


def skip_large(quick: bool, seq: int, provider: str = "", largest: int = QUICK) -> None:
    """Leave this out of the quick run, where compiling for each shape would take tens of seconds."""
    if quick and seq > (64 if provider == COMPILED else largest):
        pytest.skip("left out of the quick run")


Work = Callable[[Shape], tuple[int, int]]  # map entries read, and operations multiplied

EVERY_MAP: Work = lambda s: (s.entries, s.product_flop)  # noqa: E731
EVERY_SCORE: Work = lambda s: (0, 2 * s.D * s.entries + s.product_flop)  # noqa: E731
ROW_OF_MAPS: Work = lambda s: (s.row_entries, 0)  # noqa: E731
ROW_OF_SCORES: Work = lambda s: (0, 2 * s.D * s.row_entries)  # noqa: E731


@dataclass(frozen=True)
class Provider:
    """`run(*inputs)` gives the result; `method` names the oracle it is held to, within `tolerance`; None: a floor.

    `work` is what this provider must itself read and multiply: the naive ones every map and the full product.
    `problem()` says why it cannot run here, or None.
    """

    run: Callable[..., Tensor]
    method: str | None = "rollout"
    tolerance: float = 1e-5
    work: Work = EVERY_MAP
    problem: Callable[[], str | None] = lambda: None

    def on(self, shape: Shape, *inputs: Sequence[Tensor]) -> dict[str, Any]:
        """What `measure` is to be given for these inputs, L tensors each."""
        entries, flop = self.work(shape)
        size, kind = inputs[0][0].element_size(), str(inputs[0][0].dtype).removeprefix("torch.")
        held = sum(layer.nbytes for layers in inputs for layer in layers)
        return {"run": partial(self.run, *inputs), "tolerance": self.tolerance, "shape": shape.sizes, "dtype": kind,
                "inputs": held, "bytes": entries * size, "flop": flop, "problem": self.problem}  # fmt: skip


@cache
def compiler_problem() -> str | None:
    """Why `torch.compile` cannot be timed here, or None: a small function is compiled to find out."""
    try:
        torch.compile(lambda x: (x * 2 + 1).sum(-1))(torch.ones(4, 4, device=host.DEVICE))
    except Exception as error:  # what a missing compiler raises is the compiler's choice
        return "no compiler: " + next(iter(str(error).strip().splitlines()), type(error).__name__)
    return None


def _naive(function: Callable[..., Tensor], work: Work = EVERY_MAP) -> dict[str, Provider]:
    """Beside the chain itself the same compiled when it is first called, one kernel set per shape."""
    compiled = cache(lambda: torch.compile(function, dynamic=False))
    again = Provider(lambda *inputs: compiled()(*inputs), work=work, problem=compiler_problem)
    return {NAIVE: Provider(function, work=work), COMPILED: again}


def _ours(run: Callable[..., Tensor], tolerance: float, work: Work, **options: Any) -> dict[str, Provider]:
    """Ours, checks on: the torch backend anywhere, and beside it what `"auto"` takes: on a GPU triton, and on a CPU
    native for rows from maps, where it was built."""
    backends = {OURS: "torch"} | ({f"{OURS}, triton": "triton"} if host.DEVICE.type == "cuda" else {})
    if work is ROW_OF_MAPS and host.DEVICE.type == "cpu" and _native.unusable() is None:
        backends[NATIVE] = "native"
    return {
        name: Provider(partial(run, backend=backend, **options), tolerance=tolerance, work=work)
        for name, backend in backends.items()
    }


def _row_of(full: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of a full product the row of position 0."""
    return lambda *inputs: full(*inputs)[:, 0]


PUBLISHED = {
    "PyHealth's arithmetic": (peers.pyhealth_maths, "pyhealth"),
    "Abnar & Zuidema 2020": (peers.abnar_zuidema, "rollout"),
    "Chefer 2021 (CVPR) rollout": (peers.chefer_rollout, "chefer_rollout"),
}
MAPS: dict[str, Provider] = {
    READ: Provider(naive.read_maps, None, work=ROW_OF_MAPS),
    **_ours(rollout.attention_rollout, 1e-6, ROW_OF_MAPS, query=0),
    **_naive(naive.naive_chain),
    **{name: Provider(_row_of(full), method) for name, (full, method) in PUBLISHED.items()},
}
FEW = [name for name in (READ, OURS, NATIVE, NAIVE) if name in MAPS]
"""Of these the ones that stand beside ours where there is room for few."""
FULL: dict[str, Provider] = {
    **_ours(rollout.attention_rollout, 1e-6, EVERY_MAP),
    **_naive(naive.naive_full),
    **{name: Provider(full, method) for name, (full, method) in PUBLISHED.items()},
}
QK: dict[str, Provider] = {
    PRODUCTS: Provider(naive.multiply, None, work=ROW_OF_SCORES),
    **_ours(rollout.attention_rollout_qk, 3e-6, ROW_OF_SCORES, query=0),
    **_naive(naive.naive_chain_qk, EVERY_SCORE),
}
# Beside them on a GPU.
KERNELS: dict[str, Provider] = {
    kernels.FLEX: Provider(kernels.flex_rows, work=ROW_OF_SCORES),
    kernels.COLUMNS: Provider(
        kernels.column_means, oracle.COLUMNS, 1e-2, lambda s: (0, 4 * s.D * s.entries), kernels.columns_problem
    ),
}


def _ours_by(method: str) -> Callable[..., Tensor]:
    def run(maps: Sequence[Tensor], gradients: Sequence[Tensor] | None = None) -> Tensor:
        return rollout.attention_rollout(maps, query=0, gradients=gradients, method=method, backend="torch")

    return run


# The other methods: (method, who) → provider. Those with gradients get them as a second input.
METHODS: dict[tuple[str, str], Provider] = {
    ("discard", GILDENBLAT): Provider(_row_of(peers.gildenblat_discard), "discard"),
    ("discard", OURS): Provider(_ours_by("discard"), "discard", 1e-6, lambda s: (s.entries, 0)),
    ("chefer", CHEFER): Provider(
        _row_of(peers.chefer_gradients), "chefer", work=lambda s: (2 * s.entries, s.product_flop)
    ),
    ("chefer", OURS): Provider(_ours_by("chefer"), "chefer", 1e-6, lambda s: (2 * s.row_entries, 0)),
}
