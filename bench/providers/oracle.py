"""What every provider is checked against before it is timed: float64, from the package's reference backend.

The reference backend forms the full product of every sample, O(S³). Beyond the lengths where that is quick, `row_chain`
takes its place: one row, float64, head by head, from the formula alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rollout.method import get_method
from rollout_kernels import ops, reference


def from_maps(
    maps: Sequence[Tensor],
    method: str = "rollout",
    query: int | None = 0,
    gradients: Sequence[Tensor] | None = None,
) -> Tensor:
    """Row `query` [B, S], or all of R [B, S, S] when None; float64, by `backend="reference"`."""
    return reference.rollout(ops.maps_problem(maps, query, None, gradients, get_method(method), True))


def from_qk(queries: Sequence[Tensor], keys: Sequence[Tensor], method: str = "rollout") -> Tensor:
    """The row of position 0 [B, S], float64, by `backend="reference"`."""
    problem = ops.qk_problem(
        queries, keys, 0, lengths=None, key_mask=None, query_mask=None, causal=False, window=None, bias=None,
        scale=None, logsumexp=None, method=get_method(method), validate=True,
    )  # fmt: skip
    return reference.rollout(problem)


def row_chain(maps: Sequence[Tensor]) -> Tensor:
    """The row of position 0 [B, S] of Abnar & Zuidema's rollout, float64: w ← w·rownorm(½(mean_h A + I)), top first."""
    batch, _, seq, _ = maps[0].shape
    row = torch.zeros(batch, seq, dtype=torch.float64, device=maps[0].device)
    row[:, 0] = 1.0
    for attention in reversed(maps):
        for b, sample in enumerate(attention):
            fused = torch.zeros(seq, seq, dtype=torch.float64, device=sample.device)
            for head in sample:
                fused += head.double()
            fused /= len(sample)
            weights = row[b] / (1.0 + fused.sum(-1))  # the row sums of A + I; the ½ goes out
            row[b] = weights @ fused + weights
    return row


def relative_error(result: Tensor, reference: Tensor) -> float:
    """max|result − reference| / max|reference|; infinite when a shape differs or a number is not finite."""
    if result.shape != reference.shape or not bool(torch.isfinite(result).all()):
        return float("inf")
    return float((result.double() - reference).abs().max() / reference.abs().max())


def row_chain_qk(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """`row_chain` on the softmax of queries and keys, written out in float64 head by head."""
    row = torch.zeros(queries[0].shape[0], queries[0].shape[2], dtype=torch.float64, device=queries[0].device)
    row[:, 0] = 1.0
    for q, k in zip(reversed(queries), reversed(keys), strict=True):
        for b in range(len(row)):
            heads = zip(q[b].double(), k[b].double(), strict=True)
            weighted = [row[b] @ torch.softmax(x @ y.T * x.shape[-1] ** -0.5, -1) for x, y in heads]
            row[b] = 0.5 * (row[b] + torch.stack(weighted).mean(0))
    return row
