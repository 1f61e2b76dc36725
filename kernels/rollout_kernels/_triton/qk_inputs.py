"""What the kernels from Q and K are handed, made once on the host."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rollout_kernels._problem import QKProblem, start_weights
from rollout_kernels._triton import inputs, layer
from rollout_kernels._triton.inputs import DTYPES, device_table, head_weights

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class QKInputs:
    """Arguments that the two kernels share or hand on.

    Attributes:
        score_pointers: tables of queries and keys, lengths, valid keys, table of biases, ALiBi slopes.
        score_scalars: L, B, H, S, queries a key head serves, scale (times log2 e unless there is a bias), left, right.
        score_flags: the compile-time flags of every kernel.
        column_flags: those of all but the log-sum-exp.
        exact: whether products need no decomposition: 16-bit operands, or the interpreter, which knows none.
        column_pointers: table of the log-sum-exp, dead rows, head weights.
        column_scalars: factor that makes the log-sum-exp base 2, residual, attention.
        start: long [B] when `one_hot`.
        weights: float32 [B, R, S], the start rows; [B, 0, S] for the full matrix.
        lse: float32 [L, B, H, S] to be filled, base 2, or None when the caller gave it. With a bias [2, L, B, H, S],
            the maximum of each row and log2 of the sum after it, to be filled whatever the caller gave: beside a finite
            fill a log-sum-exp has no bits for the sum, and not all say by −inf that a row is forbidden every key.
        kept: tensors that a table points to and nobody else holds.
        out: float32 [B, R, S], or [B, S, S] for the full matrix, not initialised.
    """

    score_pointers: tuple[Tensor, ...]
    score_scalars: tuple[int | float, ...]
    score_flags: dict[str, object]
    column_pointers: tuple[Tensor, ...]
    column_scalars: tuple[float, ...]
    column_flags: dict[str, object]
    exact: bool
    start: Tensor
    one_hot: bool
    weights: Tensor
    lse: Tensor | None
    kept: list[Tensor]
    out: Tensor

    @property
    def layers(self) -> int:
        return int(self.score_scalars[0])


def qk_inputs(problem: QKProblem, interpreting: bool) -> QKInputs:
    """The kernels' arguments for one problem."""
    batch, heads, seq, _ = problem.queries[0].shape
    if problem.form == "full":
        weights = torch.empty(batch, 0, seq, dtype=torch.float32, device=problem.device)
        out = torch.empty(batch, seq, seq, dtype=torch.float32, device=problem.device)
    else:
        weights = start_weights(problem).float()
        out = torch.empty_like(weights)
    vector, aligned = _vectors((*problem.queries, *problem.keys))
    valid, dead = _masks(problem)
    biased, unit = problem.has_bias, 1.0 if problem.has_bias else LOG2_E
    lse = None
    if problem.logsumexp is None or biased:
        parts = (2,) if biased else ()
        lse = torch.empty(*parts, problem.layers, batch, heads, seq, dtype=torch.float32, device=problem.device)
    rows = [_unit_rows(t.float()) for t in problem.logsumexp or ()] if lse is None else list(lse[0] if biased else lse)
    biases = [bias for bias in problem.bias or () if bias is not None]
    left, right = _window(problem)
    method = problem.method
    fusion = layer.WEIGHTS if problem.head_weights is not None else inputs.FUSIONS[str(method.head_fusion)]
    # Rows of a mean of softmax rows sum to 1.
    total = method.residual + method.attention_weight if method.renormalize and not takes_extremes(problem) else 1.0
    nothing = weights  # a pointer that is not read
    return QKInputs(
        score_pointers=(
            _table(problem.queries, vector, problem.device),
            _table(problem.keys, vector, problem.device),
            nothing if problem.lengths is None else problem.lengths.contiguous(),
            nothing if valid is None else valid,
            _bias_table(problem) if biased else nothing,
            nothing if problem.alibi_slopes is None else _slopes(problem, heads).mul_(unit),
        ),
        score_scalars=(
            problem.layers, batch, heads, seq, heads // problem.keys[0].shape[1], problem.scale * unit,
            0 if left is None else min(left, seq), 0 if right is None else min(right, seq),
        ),
        score_flags={
            "HAS_LENGTHS": problem.lengths is not None,
            "HAS_KEY_MASK": valid is not None,
            "HAS_LEFT": left is not None,
            "HAS_RIGHT": right is not None,
            "HAS_BIAS": biased,
            "BIAS_DTYPE": DTYPES[biases[0].dtype if biased else torch.float32],
            "BIAS_UNIT": all(bias.stride(-1) == 1 for bias in biases),
            "HAS_SLOPES": problem.alibi_slopes is not None,
            "DTYPE": DTYPES[problem.queries[0].dtype],
            "VEC": vector,
            "ALIGNED": aligned,
            "UPCAST": interpreting,
            "D": problem.queries[0].shape[-1],
        },
        column_pointers=(
            _table(rows, 1, problem.device),
            nothing if dead is None else dead,
            nothing if problem.head_weights is None else head_weights(problem.head_weights, problem.device),
        ),
        column_scalars=(
            LOG2_E if lse is None else 1.0, method.residual / total, method.attention_weight / total,
        ),
        column_flags={"FUSION": fusion.value, "HAS_DEAD": dead is not None},
        exact=interpreting or problem.queries[0].dtype != torch.float32,
        start=nothing if problem.rows is None else problem.rows.contiguous(),
        one_hot=problem.rows is not None,
        weights=weights,
        lse=lse,
        kept=rows,
        out=out,
    )  # fmt: skip


def takes_extremes(problem: QKProblem) -> bool:
    """Whether heads are fused by the maximum or minimum, so that rows of F_l do not sum to 1."""
    return problem.head_weights is None and problem.method.head_fusion != "mean"


def _bias_table(problem: QKProblem) -> Tensor:
    """int64 [L, 5] on the device: address, strides of batch, head, row and column; zeros for a layer without one."""
    rows = tuple(
        (0, 0, 0, 0, 0) if bias is None else (bias.data_ptr(), *(bias.stride(axis) for axis in range(4)))
        for bias in problem.bias or ()
    )
    return device_table(rows, problem.device)


def _slopes(problem: QKProblem, heads: int) -> Tensor:
    """float32 [L, H], 0 for a layer without."""
    none = torch.zeros(heads, dtype=torch.float32, device=problem.device)
    return torch.stack([none if slopes is None else slopes.float() for slopes in problem.alibi_slopes or ()])


def _unit_rows(lse: Tensor) -> Tensor:
    return lse if lse.stride(-1) == 1 else lse.contiguous()


def _window(problem: QKProblem) -> tuple[int | None, int | None]:
    left, right = problem.window
    return left, 0 if problem.causal else right


def _masks(problem: QKProblem) -> tuple[Tensor | None, Tensor | None]:
    """uint8 [B, S] of the keys that may be attended, and of the dead rows: those that attend to no key. None when
    every key may be, and no row can be dead."""
    rows = None if problem.query_mask is None else ~problem.query_mask
    if problem.key_mask is None:
        return None, None if rows is None else rows.to(torch.uint8)
    seq = problem.seq
    position = torch.arange(seq, device=problem.device)
    valid = problem.key_mask
    if problem.lengths is not None:
        valid = valid & (position < problem.lengths[:, None])
    before = torch.nn.functional.pad(valid.cumsum(1), (1, 0))
    left, right = _window(problem)
    first = torch.zeros_like(position) if left is None else (position - left).clamp(min=0)
    last = torch.full_like(position, seq) if right is None else (position + right + 1).clamp(max=seq)
    dead = before[:, last] == before[:, first]
    if rows is not None:
        dead = dead | rows
    return valid.to(torch.uint8), dead.to(torch.uint8)


def _vectors(tensors: Sequence[Tensor]) -> tuple[int, bool]:
    """Elements in a 16-byte load of a row when every stride allows it, else 1; whether addresses are aligned."""
    aligned = all(t.data_ptr() % 16 == 0 for t in tensors)
    vector = 16 // tensors[0].element_size()
    fits = all(
        stride % vector == 0
        for t in tensors
        for stride, size in zip(t.stride()[:-1], t.shape, strict=False)
        if size > 1
    )
    return (vector, True) if aligned and fits else (1, aligned)


def _table(tensors: Sequence[Tensor], vector: int, device: torch.device) -> Tensor:
    """int64 [L, 4] on the device: address, strides of batch, head and row in units of `vector`."""
    return device_table(tuple((t.data_ptr(), *(t.stride(i) // vector for i in range(3))) for t in tensors), device)
