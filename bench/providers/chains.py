"""Who computes a rollout in the benches: ours by backend, the naive chain, its torch.compile, and the published peers.

The floors beside them, one read of the maps and the products QKᵀ alone, are no rollout and are not checked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import rollout
from bench.machine import host
from bench.providers import kernels, peers
from bench.providers.oracle import COLUMNS, Problem, expect, make_inputs
from rollout.bench import chains as naive
from rollout.bench.chains import NAIVE, PRODUCTS, READ
from rollout.bench.measure import OURS
from rollout_kernels import _native

COMPILED, NATIVE = "naive chain, torch.compile", f"{OURS}, native"
GILDENBLAT, CHEFER = "Gildenblat 2020 (vit-explain)", "Chefer 2021 (ICCV)"
SEQUENCES, QUICK = (64, 128, 256, 512), 128


def skip_large(quick: bool, seq: int, provider: str = "", largest: int = QUICK) -> None:
    """Leave this out of the quick run, where compiling for each shape would take tens of seconds."""
    if quick and seq > (64 if provider == COMPILED else largest):
        pytest.skip("left out of the quick run")


Work = Callable[[Problem], tuple[int, int]]  # map entries read, and operations multiplied

EVERY_MAP: Work = lambda p: (p.entries, p.product_flop)  # noqa: E731
EVERY_SCORE: Work = lambda p: (0, 2 * p.D * p.entries + p.product_flop)  # noqa: E731
ROW_OF_MAPS: Work = lambda p: (p.row_entries, 0)  # noqa: E731
ROW_OF_SCORES: Work = lambda p: (0, 2 * p.D * p.row_entries)  # noqa: E731


@dataclass(frozen=True)
class Provider:
    """`run(**inputs)` gives the result; `method` names the oracle it is held to; None: a floor.

    `tolerance` is of float32 inputs, `tolerance_bf16` of bfloat16 ones, in which most providers also add. `work` is
    what this provider must itself read and multiply: the naive ones every map and the full product. `problem()` says
    why it cannot run here, or None.
    """

    run: Callable[..., Tensor]
    method: str | None = "rollout"
    tolerance: float = 1e-5
    work: Work = EVERY_MAP
    problem: Callable[[], str | None] = lambda: None
    tolerance_bf16: float = 5e-2

    def on(self, given: Problem, method: str | None = None) -> dict[str, Any]:
        """What `measure` is to be given for this problem; `method` where another one has the same rows."""
        inputs = make_inputs(given)
        entries, flop = self.work(given)
        return {
            "run": partial(self.run, **inputs),
            "tolerance": self.tolerance if given.dtype == torch.float32 else self.tolerance_bf16,
            "shape": given.shape,
            "dtype": str(given.dtype).removeprefix("torch."),
            "inputs": sum(layer.nbytes for layers in inputs.values() for layer in layers),
            "bytes": entries * given.dtype.itemsize,
            "flop": flop,
            "problem": self.problem,
            **(expect(given, method or self.method) if self.method else {}),
        }


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
    plain = Provider(function, work=work)
    compiled = replace(plain, run=lambda **inputs: kernels.compile_once(function)(**inputs), problem=compiler_problem)
    return {NAIVE: plain, COMPILED: compiled}


def _ours(run: Callable[..., Tensor], tolerance: float, work: Work) -> dict[str, Provider]:
    """Ours, checks on: the torch backend anywhere, and beside it what `"auto"` takes: on a GPU triton, and on a CPU
    native for rows from maps, where it was built."""
    backends = {OURS: "torch"}
    if host.DEVICE.type == "cuda":
        backends[f"{OURS}, triton"] = "triton"
    elif work is ROW_OF_MAPS and _native.unusable() is None:
        backends[NATIVE] = "native"
    made = Provider(run, tolerance=tolerance, tolerance_bf16=tolerance, work=work)
    return {name: replace(made, run=partial(run, backend=backend)) for name, backend in backends.items()}


def _from_maps(maps: Sequence[Tensor], **options: Any) -> Tensor:
    """Of ours, the input by the name that the others give it."""
    return rollout.attention_rollout(maps, **options)


def _row_of(full: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of a full product the row of position 0."""
    return lambda **inputs: full(**inputs)[:, 0]


PUBLISHED = {
    "PyHealth's arithmetic": Provider(peers.pyhealth_maths, "pyhealth"),
    "Abnar & Zuidema 2020": Provider(peers.abnar_zuidema),
    "Chefer 2021 (CVPR) rollout": Provider(peers.chefer_rollout, "chefer_rollout"),
}
FULL = _ours(_from_maps, 1e-6, EVERY_MAP) | _naive(naive.naive_full) | PUBLISHED
MAPS = (
    {READ: Provider(naive.read_maps, None, work=ROW_OF_MAPS)}
    | _ours(partial(_from_maps, query=0), 1e-6, ROW_OF_MAPS)
    | _naive(naive.naive_chain)
    | {name: replace(each, run=_row_of(each.run)) for name, each in PUBLISHED.items()}
)
FEW = [name for name in (READ, OURS, NATIVE, NAIVE) if name in MAPS]  # where there is room for few beside ours
QK = (
    {PRODUCTS: Provider(naive.multiply, None, work=ROW_OF_SCORES)}
    | _ours(partial(rollout.attention_rollout_qk, query=0), 3e-6, ROW_OF_SCORES)
    | _naive(naive.naive_chain_qk, EVERY_SCORE)
)
# Beside them on a GPU.
KERNELS = {
    kernels.FLEX: Provider(kernels.flex_rows, work=ROW_OF_SCORES),
    kernels.COLUMNS: Provider(
        kernels.column_means, COLUMNS, 1e-2, lambda p: (0, 4 * p.D * p.entries), kernels.columns_problem
    ),
}
_row_by = partial(_from_maps, query=0, backend="torch")
METHODS = {  # the other ones; Chefer's has the gradients for a second input
    "discard": {
        GILDENBLAT: Provider(_row_of(peers.gildenblat_discard), "discard"),
        OURS: Provider(partial(_row_by, method="discard"), "discard", 1e-6, lambda p: (p.entries, 0)),
    },
    "chefer": {
        CHEFER: Provider(_row_of(peers.chefer_gradients), "chefer", work=lambda p: (2 * p.entries, p.product_flop)),
        OURS: Provider(partial(_row_by, method="chefer"), "chefer", 1e-6, lambda p: (2 * p.row_entries, 0)),
    },
}
TABLES = {"maps": MAPS, "full": FULL, "Q,K": QK} | METHODS  # who computes each kind of problem
