"""Which entries of each record are kept: all but its top share, and its top share alone.

Two ways to say what a share is. ERASER's counts the real codes: of n codes the top q % are ⌈q/100 · n⌉. PyHealth's
takes a quantile over all entries of the batch's row, padding included, and what ties with it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TIE = 1e-5
"""Scores this close, relatively, tie: a code that stands in a record twice gets the same score but for rounding."""


def kept_entries(scores: Tensor, valid: Tensor, shares: Sequence[float]) -> Tensor:
    """The entries kept, by ERASER's count: without the top share of each record, then its top share alone.

    A record never loses its last code: many models cannot run without one.

    Args:
        scores: float [B, ...], finite where valid.
        valid: bool, the same shape: the real codes.
        shares: Q, in percent, each in (0, 100].

    Returns:
        bool [2, Q, B, ...]; only valid entries.

    Source: DeYoung et al. 2020, ERASER, arXiv:1911.03429, section 4.
    """
    rank = ranks(scores, valid)
    without = [valid & (rank >= _count(valid, share, spare=1)) for share in shares]
    only = [valid & (rank < _count(valid, share)) for share in shares]
    return torch.stack([torch.stack(without), torch.stack(only)])


def pyhealth_kept_entries(scores: Tensor, values: Tensor, shares: Sequence[float]) -> Tensor:
    """The entries kept, as PyHealth 2.1.0's `RemovalBasedMetric` chooses them.

    Of a sample's n entries, padding included, the top q % are those not below the order statistic at
    ⌈(1 − q/100)(n − 1)⌉; where all are equal, the first max(1, ⌊q/100 · n⌋). A record of codes that would lose all of
    them keeps its first.

    Args:
        scores: float [B, ...], finite.
        values: the same shape: ids of codes, 0 for padding, or numbers.
        shares: Q, in percent, each in (0, 100].

    Returns:
        bool [2, Q, B, ...].
    """
    top = _pyhealth_top(scores.flatten(1), shares).view(len(shares), *scores.shape)
    kept = torch.stack([~top, top])
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        return kept
    real = (values != 0).flatten(1)
    flat = kept.flatten(3)
    emptied = ~(flat & real).any(-1) & real.any(-1)
    first = torch.zeros_like(real).scatter_(1, real.byte().argmax(1, keepdim=True), value=True)
    return (flat | (emptied[..., None] & first)).view(kept.shape)


def _pyhealth_top(flat: Tensor, shares: Sequence[float]) -> Tensor:
    """bool [Q, B, n]."""
    quantiles = torch.tensor([1.0 - share / 100.0 for share in shares], dtype=flat.dtype, device=flat.device)
    thresholds = torch.quantile(flat, quantiles, dim=1, interpolation="higher")
    top = flat >= thresholds[:, :, None]
    low, high = flat.aminmax(dim=1)
    counts = [max(1, int(flat.shape[1] * share / 100.0)) for share in shares]
    first = torch.arange(flat.shape[1], device=flat.device) < torch.tensor(counts, device=flat.device)[:, None]
    return torch.where((low == high)[None, :, None], first[:, None], top)


def top_codes(scores: Tensor, valid: Tensor, percentage: float) -> Tensor:
    """The ⌈percentage/100 · n⌉ highest-scored of each sample's n valid positions.

    Args:
        scores: float [B, ...].
        valid: bool, the same shape; the others are never chosen.
        percentage: in (0, 100].

    Returns:
        bool, the same shape. Ties go to the lower position.
    """
    return valid & (ranks(scores, valid) < _count(valid, percentage))


def ranks(scores: Tensor, valid: Tensor) -> Tensor:
    """The rank of each position within its sample, 0 the highest; what is not valid comes last.

    Scores that are equal to rounding (`TIE`) go by position.
    """
    flat = scores.masked_fill(~valid, -torch.inf).flatten(1)
    ordered, order = flat.sort(dim=1, descending=True, stable=True)
    lower, higher = ordered[:, 1:], ordered[:, :-1]
    apart = higher - lower > TIE * torch.maximum(lower.abs(), higher.abs())
    place = torch.zeros_like(order).scatter(1, order[:, 1:], apart.cumsum(1))
    place = place.masked_fill(~valid.flatten(1), flat.shape[1])
    return place.argsort(dim=1, stable=True).argsort(dim=1).view(scores.shape)


def _count(valid: Tensor, share: float, spare: int = 0) -> Tensor:
    """⌈share/100 · n⌉ per sample, at most n − spare; shaped to compare with [B, ...]."""
    count = valid.flatten(1).sum(1)
    wanted = (count.double() * (share / 100) - 1e-9).ceil().long()
    return wanted.minimum(count - spare).clamp(min=0).view(-1, *[1] * (valid.dim() - 1))
