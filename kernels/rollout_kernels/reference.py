"""The oracle: the papers' formulas in float64, one sample at a time. Slow on purpose; nothing here is shared with
the code it checks, except the description of the problem."""

import math

import torch
from torch import Tensor

from rollout_kernels._problem import MapsProblem, Problem, QKProblem
from rollout_kernels.method import Method


def rollout(problem: Problem) -> Tensor:
    """R = M_L · … · M_1 of every sample, then the rows wanted; float64, [B, S], [B, R, S] or [B, S, S].

    M_l = rownorm(α·I + β·fuse_h A_l) over the sample's valid block (Abnar & Zuidema 2020, section 3).
    """
    full = torch.zeros(problem.batch, problem.seq, problem.seq, dtype=torch.float64, device=problem.device)
    for b in range(problem.batch):
        n = problem.seq if problem.lengths is None else int(problem.lengths[b])
        product = torch.eye(n, dtype=torch.float64, device=problem.device)
        for layer in range(problem.layers):
            maps, gradients = layer_maps(problem, layer, b, n)
            weights = None if problem.head_weights is None else problem.head_weights[layer]
            product = layer_matrix(maps, gradients, problem.method, weights) @ product
        full[b, :n, :n] = product

    if problem.rows is not None:
        starts = problem.start_rows.tolist()
        rows = torch.stack([full[b, start] for b, start in enumerate(starts)]) if starts else full[:, 0]
        return rows if problem.squeeze else rows[:, None]
    if problem.weights is not None:
        rows = problem.weights.double() @ full
        return rows[:, 0] if problem.squeeze else rows
    return full


def layer_maps(problem: Problem, layer: int, b: int, n: int) -> tuple[Tensor, Tensor | None]:
    """The maps [H, n, n] of one sample in one layer, float64, and their gradients."""
    if isinstance(problem, QKProblem):
        return softmax_maps(problem, layer, b, n), None
    assert isinstance(problem, MapsProblem)
    gradients = None if problem.gradients is None else problem.gradients[layer][b, :, :n, :n].double()
    return problem.maps[layer][b, :, :n, :n].double(), gradients


def softmax_maps(problem: QKProblem, layer: int, b: int, n: int) -> Tensor:
    """softmax(scale·QKᵀ + mask) [H, n, n] of one sample; a row with no key allowed is uniform over its n keys,
    with sinks 0."""
    queries = problem.queries[layer][b, :, :n].double()
    keys = problem.keys[layer][b, :, :n].double()
    keys = keys.repeat_interleave(queries.shape[0] // keys.shape[0], dim=0)
    scores = problem.scale * queries @ keys.transpose(-1, -2)
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if problem.bias is not None and problem.bias[layer] is not None:
        scores = scores + problem.bias[layer][b, :, :n, :n].double()  # type: ignore[index]

    i = torch.arange(n, device=problem.device)[:, None]
    j = torch.arange(n, device=problem.device)[None, :]
    if problem.alibi_slopes is not None and problem.alibi_slopes[layer] is not None:
        scores = scores - problem.alibi_slopes[layer].double()[:, None, None] * (i - j).abs()  # type: ignore[union-attr]
    allowed = torch.ones(n, n, dtype=torch.bool, device=problem.device)
    if problem.causal:
        allowed &= j <= i
    if problem.window[0] is not None:
        allowed &= j >= i - problem.window[0]
    if problem.window[1] is not None:
        allowed &= j <= i + problem.window[1]
    if problem.key_mask is not None:
        allowed &= problem.key_mask[b, :n]
    if problem.query_mask is not None:
        allowed &= problem.query_mask[b, :n, None]
    scores = scores.masked_fill(~allowed, -math.inf)

    if problem.sinks is not None:
        sinks = problem.sinks[layer].double()[:, None, None].expand(*scores.shape[:-1], 1)
        maps = torch.softmax(torch.cat([scores, sinks], -1), dim=-1)[..., :-1]
    elif problem.logsumexp is not None:
        maps = torch.exp(scores - problem.logsumexp[layer][b, :, :n].double()[..., None])
    else:
        maps = torch.softmax(scores, dim=-1)
    nothing_allowed = (scores == -math.inf).all(-1, keepdim=True)
    return torch.where(nothing_allowed, torch.full_like(maps, 0.0 if problem.sinks is not None else 1.0 / n), maps)


def layer_matrix(maps: Tensor, gradients: Tensor | None, method: Method, head_weights: Tensor | None) -> Tensor:
    """M_l [n, n] of one sample from its maps [H, n, n]: fusion, discard, residual addition, renormalisation."""
    fused = discard(fuse(maps, gradients, method, head_weights), method.discard_ratio)
    matrix = method.residual * torch.eye(fused.shape[-1], dtype=fused.dtype, device=fused.device)
    matrix = matrix + method.attention_weight * fused
    return matrix / matrix.sum(-1, keepdim=True) if method.renormalize else matrix


def fuse(maps: Tensor, gradients: Tensor | None, method: Method, head_weights: Tensor | None) -> Tensor:
    """F_l [n, n]: the heads of A_l (or of A_l ∘ G_l) as one matrix."""
    if callable(method.head_fusion):
        grads = None if gradients is None else gradients[None]
        return method.head_fusion(maps[None], grads)[0]
    if method.gradients is not None:
        assert gradients is not None
        maps = maps * gradients
    if method.gradients == "clamp_then_fuse":
        maps = maps.clamp(min=0)

    if head_weights is not None:
        fused = sum(w * a for w, a in zip(head_weights.tolist(), maps, strict=True))
        assert isinstance(fused, Tensor)
    elif method.head_fusion == "mean":
        fused = maps.mean(0)
    elif method.head_fusion == "max":
        fused = maps.max(0).values
    else:
        fused = maps.min(0).values
    return fused.clamp(min=0) if method.gradients == "fuse_then_clamp" else fused


def discard(fused: Tensor, ratio: float) -> Tensor:
    """The ⌊q·n²⌋ smallest entries set to 0, ties by flat index, entry [0, 0] spared."""
    n = fused.shape[-1]
    order = torch.sort(fused.flatten(), stable=True).indices[: math.floor(ratio * n * n)]
    kept = fused.flatten().clone()
    kept[order[order != 0]] = 0.0
    return kept.view(n, n)
