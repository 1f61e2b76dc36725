"""What every kernel over maps is handed: tables of addresses, start rows and flags, made once on the host."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache

import torch
import triton.language as tl
from torch import Tensor

from rollout_kernels._problem import MapsProblem
from rollout_kernels._triton import launch, layer
from rollout_kernels._triton.prepare import Prepared, Values, encode, flatten, prepare

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
LONGEST_IN_PAIRS = 4096  # beyond it, and with gradients, words of 4 bytes and the shifts take too many registers
Layout = tuple[tuple[int, ...], int]  # of one tensor: strides, heads
FUSIONS = {
    "mean": layer.MEAN.value,
    "max": layer.MAX.value,
    "min": layer.MIN.value,
    "weights": layer.WEIGHTS.value,
    "norms": layer.NORMS.value,
}
GRADIENTS = {
    None: layer.NO_GRADIENTS.value,
    "clamp_then_fuse": layer.CLAMP_THEN_FUSE.value,
    "fuse_then_clamp": layer.FUSE_THEN_CLAMP.value,
}


@dataclass(eq=False)
class MapInputs:
    """Arguments that the kernels over maps share.

    Attributes:
        problem: what they were made from; its maps are what the tables point to.
        values: the tables and head weights.
        weights: float32 [B, R, S], the start weights, or None for start rows or no start at all.
        scalars: L, R, S, row stride of the head weights, residual, attention.
        key: what the compile-time flags follow from.
        out: float32 [B, R, S], not initialised.
    """

    problem: MapsProblem
    values: Values
    weights: Tensor | None
    scalars: tuple[int | float, ...]
    key: tuple[Hashable, ...]
    out: Tensor
    _prepared: Prepared | None = field(default=None, init=False)

    @property
    def layers(self) -> int:
        return self.problem.layers

    @property
    def vector(self) -> int:
        """Elements of one load."""
        return int(self.flags["VEC"])  # type: ignore[call-overload]

    @property
    def flags(self) -> dict[str, object]:
        """The compile-time flags by name."""
        return _flags(*self.key)

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        """Maps table, gradients table, head weights, start, lengths, in the order of the kernels' signatures."""
        ready = self._prepared or self._prepare(0)
        grads = ready.table if self.problem.gradients is None else ready.table[6 * self.layers :]
        lengths = self.problem.lengths
        return (
            ready.table, grads, ready.weights, ready.start if self.weights is None else self.weights,
            ready.table if lengths is None else lengths.contiguous(),
        )  # fmt: skip

    def counters(self, number: int) -> tuple[Tensor, Tensor]:
        """A ticket, int32 [1], and as many counters, int32 [number]: zeros, new ones at each call."""
        ready = self._prepare(number)
        return ready.ticket, ready.ready

    def _prepare(self, counters: int) -> Prepared:
        self._prepared = prepare(self.problem, self.values, counters)
        return self._prepared


def map_inputs(problem: MapsProblem) -> MapInputs:
    """The kernels' arguments for one problem: in row form with `out` [B, R, S], else with R = 0."""
    method, batch, seq = problem.method, problem.batch, problem.seq
    tensors = problem.maps if problem.gradients is None else (*problem.maps, *problem.gradients)
    addresses = [tensor.data_ptr() for tensor in tensors]
    layouts = tuple([(tensor.stride(), tensor.size(1)) for tensor in tensors])
    dtype, grad_dtype = tensors[0].dtype, tensors[-1].dtype
    vector, pairs, unit = vectors(layouts, seq, (dtype.itemsize, grad_dtype.itemsize), addresses)
    fusion, head_weights, stride_weights = method.head_fusion, tuple[float, ...](), 0
    if problem.head_weights is not None:
        fusion, (head_weights, stride_weights) = "weights", flatten(problem.head_weights)
    weights, starts = None, 0 if problem.rows is None else 1
    if problem.weights is not None:
        weights, starts = problem.weights.float().contiguous(), problem.weights.shape[1]
    return MapInputs(
        problem=problem,
        values=Values(_table(layouts, vector, addresses), head_weights),
        weights=weights,
        scalars=(len(problem.maps), starts, seq, stride_weights, float(method.residual), method.attention_weight),
        key=(
            weights is None, problem.lengths is not None, method.renormalize, fusion, method.gradients,
            dtype, grad_dtype, vector, pairs and problem.gradients is None and seq <= LONGEST_IN_PAIRS, unit,
        ),
        out=torch.empty(batch, starts, seq, dtype=torch.float32, device=problem.device),
    )  # fmt: skip


@cache
def _flags(
    one_hot: bool, lengths: bool, renormalize: bool, fusion: str, gradients: str | None,
    dtype: torch.dtype, grad_dtype: torch.dtype, vector: int, pairs: bool, unit: bool,
) -> dict[str, object]:  # fmt: skip
    return {
        "ONE_HOT": one_hot, "HAS_LENGTHS": lengths, "RENORMALIZE": renormalize,
        "FUSION": FUSIONS[fusion], "GRADIENTS": GRADIENTS[gradients],
        "DTYPE": DTYPES[dtype], "GRAD_DTYPE": DTYPES[grad_dtype],
        "VEC": vector, "PAIRS": pairs, "UNIT_COLUMN": unit,
    }  # fmt: skip


def launch_of(problem: MapsProblem, arguments: MapInputs, name: str) -> launch.RowsLaunch:
    """The launch of the kernels over maps for one problem."""
    dtypes = (
        [problem.maps[0].dtype] if problem.gradients is None else [problem.maps[0].dtype, problem.gradients[0].dtype]
    )
    load = arguments.vector * max(dtype.itemsize for dtype in dtypes)
    return launch.rows_launch(problem.seq, dtypes[0], problem.gradients is not None, load, name)


def vectors(
    layouts: tuple[Layout, ...], seq: int, sizes: tuple[int, ...], addresses: Sequence[int]
) -> tuple[int, bool, bool]:
    """How a kernel may read tensors [B, H, S, S] of elements of some sizes.

    Returns:
        The elements of one load of 16 bytes or less: the largest power of two that divides S and every stride, and
        whose bytes divide every address.
        Whether that is one element of 16 bits, next to its neighbour, for any tensor of so odd an S: loads then go by
        words of 4 bytes.
        Whether every last axis is contiguous.
    """
    power, unit = _common_power(layouts, seq)
    size, common = max(sizes), 0
    for address in addresses:
        common |= address
    aligned = (common & -common) // size  # in elements
    vector = max(1, min(16 // size, power, aligned))
    return vector, seq % 2 == 1 and unit and size == 2, unit


@lru_cache(1024)
def _common_power(layouts: tuple[Layout, ...], seq: int) -> tuple[int, bool]:
    """The largest power of two that divides S and every stride; whether every last axis is contiguous: else it is 1."""
    if any(strides[3] != 1 for strides, _ in layouts):
        return 1, False
    common = math.gcd(seq, *(stride for strides, _ in layouts for stride in strides[:3]))
    return common & -common, True


def _table(layouts: tuple[Layout, ...], vector: int, addresses: Sequence[int]) -> tuple[int, ...]:
    """[L, 6], row after row and encoded: address, strides of batch, head and row in units of `vector`, of column,
    heads."""
    numbers = list(_encoded(layouts, vector))
    numbers[::6] = [encode(address) for address in addresses]
    return tuple(numbers)


@lru_cache(1024)
def _encoded(layouts: tuple[Layout, ...], vector: int) -> tuple[int, ...]:
    """The table of tensors at address 0."""
    rows = [(0, *(stride // vector for stride in strides[:3]), strides[3], heads) for strides, heads in layouts]
    return tuple(encode(number) for row in rows for number in row)
