"""The ways to compute a rollout that are timed against each other, and the ceilings they run under.

Every provider takes the same inputs and gives the row of position 0, [B, S]. The peers are written as their users
write them: the full product, then one row of it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import rollout

Provider = Callable[[Sequence[Tensor]], Tensor]
QKProvider = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def naive_chain(maps: Sequence[Tensor]) -> Tensor:
    """Abnar & Zuidema's formula as most public code has it: mean over heads, ½(A + I), row sum, S×S products, row 0."""
    product: Tensor | None = None
    for attention in maps:
        fused = attention.mean(1)
        matrix = 0.5 * (fused + torch.eye(fused.shape[-1], dtype=fused.dtype))
        matrix = matrix / matrix.sum(-1, keepdim=True)
        product = matrix if product is None else torch.bmm(matrix, product)
    assert product is not None
    return product[:, 0]


def pyhealth_maths(maps: Sequence[Tensor]) -> Tensor:
    """PyHealth's arithmetic alone: mean over heads, ½(A + I) not renormalised, product from the identity, row 0."""
    batch, _, seq, _ = maps[0].shape
    product = torch.eye(seq, dtype=maps[0].dtype).expand(batch, seq, seq)
    for attention in maps:
        product = torch.bmm(0.5 * (attention.mean(1) + torch.eye(seq, dtype=attention.dtype)), product)
    return product[:, 0]


def ours(maps: Sequence[Tensor]) -> Tensor:
    """`rollout.attention_rollout`, checks on."""
    return rollout.attention_rollout(maps, query=0, backend="torch")


def read_limit(maps: Sequence[Tensor]) -> Tensor:
    """One read of the maps that must be read: all layers but the top one, whose row 0 suffices. Not a rollout."""
    return torch.stack([attention.view(-1).sum() for attention in maps[:-1]])


def naive_qk(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """softmax(QKᵀ/√D) for every layer, then the naive chain."""
    return naive_chain(
        [torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) for q, k in zip(queries, keys, strict=True)]
    )


def ours_qk(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """`rollout.attention_rollout_qk`, checks on, log-sum-exp not given."""
    return rollout.attention_rollout_qk(queries, keys, query=0, backend="torch")


def oracle(maps: Sequence[Tensor]) -> Tensor:
    """The row in float64, by the naive formula on float64 copies of the same maps."""
    return naive_chain([attention.double() for attention in maps])


def oracle_qk(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """The row in float64 from float64 copies of the same queries and keys."""
    return naive_qk([q.double() for q in queries], [k.double() for k in keys])


def relative_error(result: Tensor, reference: Tensor) -> float:
    """max|result − reference| / max|reference|."""
    return float((result.double() - reference).abs().max() / reference.abs().max())
