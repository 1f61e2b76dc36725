"""What a backend is handed: a call that has been checked, in one normal form.

Letters: B batch, L layers, H heads, S sequence length, D head dimension, R start rows.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from rollout_kernels.method import Method


@dataclass(frozen=True)
class LayerValues:
    """What the value-aware methods need of one layer.

    Attributes:
        values: [B, H_v, S, D_v], H a multiple of H_v: head h reads h // (H / H_v).
        output_weights: [H, D_v, E], so that f_hj = v_hj · output_weights[h].
        inputs: [B, S, E], what the residual adds.
    """

    values: Tensor
    output_weights: Tensor
    inputs: Tensor


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What maps and Q,K calls share.

    Exactly one of `rows` and `weights` is set for the row form; neither for the full matrix.

    Attributes:
        name: the public function called, the prefix of every message.
        method: how M_l is formed. Its `start_layer` has been applied already: `layers` counts what is left.
        first_layer: the number of layers left out below; messages count the caller's layers.
        head_weights: None, or per layer a float64 [H_l] on CPU that sums to 1.
        rows: the one-hot start row of each sample as the caller gave it: one int for all, or long [B]; a negative one
            counts from the sample's own end. `start_rows` is what they come to.
        values: per layer, or None when the method takes none.
        weights: [B, R, S] in `compute_dtype`, 0 on padded rows: a weighting over rows.
        lengths: long [B], the valid prefix of each sample, or None for S everywhere.
        squeeze: the result of the row form is [B, S] rather than [B, R, S].
        batch, seq: B and S.
        device: where every tensor is, and the result will be.
        compute_dtype: float32, or float64 for float64 input; also the dtype of the result.
    """

    name: str
    method: Method
    first_layer: int
    head_weights: tuple[Tensor, ...] | None
    values: tuple[LayerValues, ...] | None
    rows: int | Tensor | None
    weights: Tensor | None
    lengths: Tensor | None
    squeeze: bool
    batch: int
    seq: int
    device: torch.device
    compute_dtype: torch.dtype

    @property
    def layers(self) -> int:
        """L, the number of layers in the chain."""
        raise AttributeError("a problem of maps or of queries and keys has layers")

    @cached_property
    def start_rows(self) -> Tensor:
        """`rows` as long [B], none of them negative. The GPU kernels find them out on their own."""
        rows, ends = self.rows, self.seq if self.lengths is None else self.lengths
        assert rows is not None
        if isinstance(rows, Tensor):
            return torch.where(rows < 0, rows + ends, rows)
        if rows < 0:
            rows = ends + rows
        return rows if isinstance(rows, Tensor) else torch.full((self.batch,), rows, device=self.device)

    @property
    def form(self) -> Literal["full", "row", "weights"]:
        """The full matrix, one row a sample, or weightings over rows."""
        if self.rows is not None:
            return "row"
        return "full" if self.weights is None else "weights"


@dataclass(frozen=True, kw_only=True)
class MapsProblem(Problem):
    """Rollout from stored attention maps.

    Attributes:
        maps: per layer, input side first, [B, H_l, S, S]; a map given as [B, S, S] is a view with H_l = 1.
        gradients: like `maps`, or None when the method takes none.
    """

    maps: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...] | None

    @property
    def layers(self) -> int:
        return len(self.maps)


@dataclass(frozen=True, kw_only=True)
class QKProblem(Problem):
    """Rollout from queries and keys.

    Attributes:
        queries: per layer [B, H, S, D].
        keys: per layer [B, H_kv, S, D], H a multiple of H_kv.
        logsumexp: per layer float32 [B, H, S], the natural log of Σ_j exp(scale·q·k_j + mask), or None.
        bias: per layer a view [B, H, S, S] (strides may be 0), or None.
        alibi_slopes: per layer [H], or None: −slope·|i − j| is added to the scores.
        key_mask: bool [B, S], True = may be attended, or None; `lengths` is combined with it by AND.
        query_mask: bool [B, S], False = this row attends nothing, hence is uniform over the sample's keys; or None.
        causal: key j is attended from row i only when j ≤ i.
        window: (left, right), None = unbounded: key j is attended only when i − left ≤ j ≤ i + right.
        scale: factor on q·k.
        softcap: c of c·tanh(score/c), taken of the scaled scores before anything is added to them, or None.
        handed_on: per layer the values [B, H_v, S, D_v] and the gradient [B, H, S, D_v] at the attention's output, of
            which the gradient of a map is the product, G_hij = ⟨dO_hi, v_hj⟩; or None.
        sinks: per layer [H], the score of one more column of each head's softmax, which is no key, or None; a row with
            no key allowed is then 0, and rows do not sum to 1.
    """

    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    logsumexp: tuple[Tensor, ...] | None
    bias: tuple[Tensor | None, ...] | None
    alibi_slopes: tuple[Tensor | None, ...] | None
    key_mask: Tensor | None
    query_mask: Tensor | None
    causal: bool
    window: tuple[int | None, int | None]
    scale: float
    softcap: float | None
    sinks: tuple[Tensor, ...] | None
    handed_on: tuple[tuple[Tensor, Tensor], ...] | None = None

    @property
    def layers(self) -> int:
        return len(self.queries)

    @property
    def has_bias(self) -> bool:
        """Whether any layer has one."""
        return self.bias is not None and any(bias is not None for bias in self.bias)


def start_weights(problem: Problem) -> Tensor:
    """The start rows [B, R, S] as weights: `weights`, or `rows` as one-hot vectors."""
    if problem.weights is not None:
        return problem.weights
    weights = torch.zeros(problem.batch, 1, problem.seq, dtype=problem.compute_dtype, device=problem.device)
    return weights.scatter_(2, problem.start_rows.view(-1, 1, 1), 1.0)


def shape_result(problem: Problem, result: Tensor) -> Tensor:
    """[B, R, S] as the caller asked for it: [B, S] when one row a sample was wanted."""
    return result[:, 0] if problem.squeeze else result
