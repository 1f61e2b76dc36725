"""What the kernels from Q and K are handed, made once on the host."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rollout_kernels._problem import QKProblem
from rollout_kernels._torch.fuse import Scratch
from rollout_kernels._torch.values import ValueTerms, input_norms
from rollout_kernels._triton import inputs
from rollout_kernels._triton.inputs import DTYPES
from rollout_kernels._triton.prepare import Prepared, Values, encode, flatten, prepare

LOG2_E = math.log2(math.e)


@dataclass(eq=False)
class QKInputs:
    """Arguments that the two kernels share or hand on.

    Attributes:
        problem: what they were made from.
        values: tables of queries, keys, log-sum-exp, biases, values and gradients, one after another; head weights.
        masks: uint8 [B, S] of valid keys and of dead rows, or None.
        slopes: float32 [L, H], ALiBi's, or None.
        norms: float32 [L, B, H + 1, S] of each head's transformed values, and last the residual's weight, or None.
        sinks: float32 [L, H], times log2 e unless there is a bias, or None.
        score_scalars: L, B, H, S, queries a key head serves, scale (times log2 e unless there is a bias), left, right.
        score_flags: the compile-time flags of every kernel.
        column_flags: those of all but the log-sum-exp.
        exact: whether products need no decomposition: 16-bit operands, or the interpreter, which knows none.
        column_scalars: factor that makes the log-sum-exp base 2, residual, attention, queries a value head serves.
        normalize: whether rows of F_l are divided by their sums before the residual is added; not where they sum to 1.
        lse: float32 [L, B, H, S] to be filled, base 2, or None when the caller gave it. With a bias [2, L, B, H, S],
            the maximum of each row and log2 of the sum after it, to be filled whatever the caller gave: beside a finite
            fill a log-sum-exp has no bits for the sum, and not all say by −inf that a row is forbidden every key.
        kept: tensors that a table points to and nobody else holds.
        out: float32 [B, R, S], or [B, S, S] for the full matrix, not initialised.
    """

    problem: QKProblem
    values: Values
    masks: tuple[Tensor | None, Tensor | None]
    slopes: Tensor | None
    sinks: Tensor | None
    norms: Tensor | None
    score_scalars: tuple[int | float, ...]
    score_flags: dict[str, object]
    column_scalars: tuple[float, ...]
    column_flags: dict[str, object]
    normalize: bool
    exact: bool
    lse: Tensor | None
    kept: list[Tensor]
    out: Tensor
    _prepared: Prepared | None = field(default=None, init=False)
    _weights: Tensor | None = field(default=None, init=False)

    @property
    def layers(self) -> int:
        return int(self.score_scalars[0])

    @property
    def one_hot(self) -> bool:
        """Whether each sample's chain starts from a row of its own."""
        return self.problem.rows is not None

    @property
    def start(self) -> Tensor:
        """The start rows, long [B], when `one_hot`."""
        return self._ready.start

    @property
    def score_pointers(self) -> tuple[Tensor, ...]:
        """Tables of queries and keys, lengths, valid keys, table of biases, ALiBi slopes."""
        table, lengths, valid = self._ready.table, self.problem.lengths, self.masks[0]
        return (
            table, table[4 * self.layers :],
            table if lengths is None else lengths.contiguous(), table if valid is None else valid,
            table[12 * self.layers :] if self.problem.has_bias else table,
            table if self.slopes is None else self.slopes,
        )  # fmt: skip

    @property
    def column_pointers(self) -> tuple[Tensor, ...]:
        """Table of the log-sum-exp, dead rows, head weights or norms, table of values and gradients."""
        ready, dead = self._ready, self.masks[1]
        weights = ready.weights if self.norms is None else self.norms
        handed_on = ready.table
        if self.problem.handed_on is not None:
            handed_on = handed_on[(17 if self.problem.has_bias else 12) * self.layers :]
        return ready.table[8 * self.layers :], ready.table if dead is None else dead, weights, handed_on

    def scratch(self) -> tuple[Tensor, Tensor, Tensor]:
        """A ticket, int32 [1]; counters, int32 [L·B·R]; w, float32 [2, B, R, S]. Zeros, and w[0] the start weights:
        as new at each call."""
        ready = self._ready if self._weights is not None else self._prepare()
        weights, self._weights = self._weights, None
        assert weights is not None
        return ready.ticket, ready.ready, weights

    @property
    def _ready(self) -> Prepared:
        return self._prepared or self._prepare()

    def _prepare(self) -> Prepared:
        batch, seq, starts = self.problem.batch, self.problem.seq, _starts(self.problem)
        self._weights = torch.empty(2, batch, starts, seq, dtype=torch.float32, device=self.out.device)
        if self.problem.weights is not None:
            self._weights[0] = self.problem.weights
        one_hot = self._weights if self.one_hot else None
        self._prepared = prepare(self.problem, self.values, self.layers * batch * starts, one_hot)
        return self._prepared


def qk_inputs(problem: QKProblem, interpreting: bool) -> QKInputs:
    """The kernels' arguments for one problem."""
    batch, heads, seq, size = problem.queries[0].shape
    rows = seq if problem.form == "full" else _starts(problem)
    handed_on = [_unit_rows(pair[part]) for part in (0, 1) for pair in problem.handed_on or ()]
    vector, aligned = _vectors((*problem.queries, *problem.keys, *handed_on))
    valid, dead = _masks(problem)
    biased, unit = problem.has_bias, 1.0 if problem.has_bias else LOG2_E
    lse, kept = None, handed_on
    if problem.logsumexp is None or biased:
        parts = (2,) if biased else ()
        lse = torch.empty(*parts, problem.layers, batch, heads, seq, dtype=torch.float32, device=problem.device)
        numbers = _filled_rows(lse[0] if biased else lse)
    else:
        given = [_unit_rows(t.float()) for t in problem.logsumexp]
        kept, numbers = kept + given, _table(given, 1)
    numbers += _bias_table(problem) if biased else ()
    numbers += _table(handed_on, vector)
    biases = [bias for bias in problem.bias or () if bias is not None]
    fusion, head_weights = str(problem.method.head_fusion), tuple[float, ...]()
    if problem.head_weights is not None:
        fusion, (head_weights, _) = "weights", flatten(problem.head_weights)
    norms = None if problem.values is None else _norms(problem)
    if norms is not None:
        fusion = "norms"
    left, right = _window(problem)
    method = problem.method
    residual = method.residual if norms is None else 1.0  # which the norms have in them
    summed = needs_row_sums(problem)
    known = method.renormalize and not summed
    total = method.residual + method.attention_weight if known else 1.0
    return QKInputs(
        problem=problem,
        values=Values(_table(problem.queries, vector) + _table(problem.keys, vector) + numbers, head_weights),
        masks=(valid, dead),
        slopes=None if problem.alibi_slopes is None else _slopes(problem, heads).mul_(unit),
        norms=norms,
        sinks=None if problem.sinks is None else torch.stack([sinks.float() for sinks in problem.sinks]).mul_(unit),
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
            "SOFTCAP": 0.0 if problem.softcap is None else problem.softcap * unit,
            "HAS_SINKS": problem.sinks is not None,
            "DTYPE": DTYPES[problem.queries[0].dtype],
            "VEC": vector,
            "ALIGNED": aligned,
            "UPCAST": interpreting,
            "D": size,
        },
        column_scalars=(
            LOG2_E if lse is None else 1.0, residual / total, method.attention_weight / total,
            heads // handed_on[0].shape[1] if handed_on else 1,
        ),
        column_flags={
            "FUSION": inputs.FUSIONS[fusion],
            "GRADIENTS": inputs.GRADIENTS[method.gradients],
            "HAS_DEAD": dead is not None,
            "D_V": handed_on[0].shape[-1] if handed_on else size,
        },
        normalize=method.normalize_attention and summed,
        exact=interpreting or problem.queries[0].dtype != torch.float32,
        lse=lse,
        kept=kept,
        out=torch.empty(batch, rows, seq, dtype=torch.float32, device=problem.device),
    )  # fmt: skip


def fuses_first(problem: QKProblem) -> bool:
    """Whether heads are fused before a row is weighted: by the maximum, the minimum or norms, to be clamped then, or as
    two products of wide float32 heads leave no registers."""
    if problem.values is not None or problem.method.gradients == "fuse_then_clamp":
        return True
    if problem.handed_on is not None and problem.queries[0].dtype == torch.float32 and widest_head(problem) > 64:
        return True
    return problem.head_weights is None and problem.method.head_fusion != "mean"


def widest_head(problem: QKProblem) -> int:
    """The head dimension of queries, or of values if that is more."""
    sizes = [] if problem.handed_on is None else [problem.handed_on[0][0].shape[-1]]
    return max([problem.queries[0].shape[-1], *sizes])


def needs_row_sums(problem: QKProblem) -> bool:
    """Whether a row of F_l or M_l is divided by its sum, and that is not known: rows of F_l are no weighted mean of
    softmax rows."""
    divided = problem.method.renormalize or problem.method.normalize_attention
    return divided and (fuses_first(problem) or problem.sinks is not None or problem.handed_on is not None)


def _norms(problem: QKProblem) -> Tensor:
    """What `QKInputs.norms` holds, 0 on padding."""
    terms, whole = ValueTerms(problem, Scratch(torch.float32, problem.device)), slice(0, problem.batch)
    layers = [
        torch.cat([terms.head_norms(layer, whole), input_norms(problem, layer).unsqueeze(1)], 1)
        for layer in range(problem.layers)
    ]
    return torch.stack(layers)


def _starts(problem: QKProblem) -> int:
    """R, 0 for the full matrix."""
    if problem.weights is not None:
        return problem.weights.shape[1]
    return 0 if problem.rows is None else 1


def _bias_table(problem: QKProblem) -> tuple[int, ...]:
    """[L, 5], row after row and encoded: address, strides of batch, head, row and column; zeros for a layer without."""
    return tuple(
        encode(number)
        for bias in problem.bias or ()
        for number in ((0,) * 5 if bias is None else (bias.data_ptr(), *bias.stride()))
    )


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


def _table(tensors: Sequence[Tensor], vector: int) -> tuple[int, ...]:
    """[L, 4], row after row and encoded: address, strides of batch, head and row in units of `vector`."""
    return tuple(
        encode(number)
        for t in tensors
        for number in (t.data_ptr(), *(stride // vector for stride in (*t.stride(), 1)[:3]))
    )


def _filled_rows(lse: Tensor) -> tuple[int, ...]:
    """The table of a log-sum-exp [L, B, H, S] that is to be filled."""
    layers, _, heads, seq = lse.shape
    layer, address = lse.stride(0) * lse.element_size(), lse.data_ptr()
    strides = (encode(heads * seq), encode(seq), encode(1))
    return tuple(number for i in range(layers) for number in (encode(address + i * layer), *strides))
