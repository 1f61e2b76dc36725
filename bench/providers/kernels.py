"""Other people's kernels over queries and keys, as far as they go towards a rollout. Not yet run on a GPU."""

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from bench.machine import host

FLEX, COLUMNS = "FlexAttention, Q and K swapped", "flash-colreduce, column means"
compile_once: Callable[..., Callable[..., Tensor]] = cache(partial(torch.compile, dynamic=False))


def flex_rows(queries: Sequence[Tensor], keys: Sequence[Tensor], logsumexp: Sequence[Tensor] | None = None) -> Tensor:
    """Row 0 of the rollout [B, S], a layer at a time, compiled on a GPU; the row of the top layer is written out."""
    step = compile_once(_step) if host.DEVICE.type == "cuda" else _step
    weights = torch.softmax((queries[-1][:, :, :1] @ keys[-1].mT).float() * queries[-1].shape[-1] ** -0.5, -1)
    weights = 0.5 * weights.mean(1)[:, 0]
    weights[:, 0] += 0.5
    for layer in reversed(range(len(queries) - 1)):
        weights = step(queries[layer], keys[layer], logsumexp and logsumexp[layer], weights)
    return weights


def _step(q: Tensor, k: Tensor, logsumexp: Tensor | None, weights: Tensor) -> Tensor:
    """½w + ½mean_h Σ_i w_i·exp(s_ij − lse_i): the exponential of the log-sum-exp, over i, of s_ij + log w_i − lse_i.

    So keys are handed over as queries. Rows of a softmax sum to 1, and need no renormalisation.
    """
    if logsumexp is None:
        logsumexp = flex_attention(q, k, k, return_aux=AuxRequest(lse=True))[1].lse
    bias = weights.log()[:, None] - logsumexp

    def swapped(score: Tensor, b: Tensor, h: Tensor, j: Tensor, i: Tensor) -> Tensor:
        return score + bias[b, h, i]

    sums = flex_attention(k, q, q, score_mod=swapped, return_aux=AuxRequest(lse=True))[1].lse
    return 0.5 * weights + 0.5 * sums.exp().mean(1)


def column_means(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """Of every layer's softmax, over heads and layers too, [B, S]. No chain: flash-colreduce takes no start weights."""
    from flash_colreduce import flash_colreduce

    layers = (flash_colreduce(q, k, reduction="mean") for q, k in zip(queries, keys, strict=True))
    return torch.stack([each.float().mean(1) for each in layers]).mean(0)


def columns_problem() -> str | None:
    """Why flash-colreduce cannot run here, or None."""
    if importlib.util.find_spec("flash_colreduce") is None:
        return "flash-colreduce is not installed: pip install flash-colreduce"
    return None if host.DEVICE.type == "cuda" else "flash-colreduce needs a GPU"
