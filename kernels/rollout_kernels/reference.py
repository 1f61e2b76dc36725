"""The oracle: the papers' formulas in float64, one sample at a time. Slow on purpose; nothing here is shared with
the code it checks, except the description of the problem."""

import math

import torch
from torch import Tensor

from rollout_kernels._problem import LayerValues, MapsProblem, Problem, QKProblem
from rollout_kernels.method import Method


def rollout(problem: Problem) -> Tensor:
    """R = M_L · … · M_1 of every sample, then the rows wanted; float64, [B, S], [B, R, S] or [B, S, S].

    M_l = rownorm(α·I + β·fuse_h A_l) over the sample's valid block (Abnar & Zuidema 2020, section 3).
    """
    full = torch.zeros(problem.batch, problem.seq, problem.seq, dtype=torch.float64, device=problem.device)
    own = torch.zeros_like(full)
    for b in range(problem.batch):
        n = problem.seq if problem.lengths is None else int(problem.lengths[b])
        product = torch.eye(n, dtype=torch.float64, device=problem.device)
        never_attending = product
        for layer in range(problem.layers):
            matrix, residual = layer_matrix(problem, layer, b, n)
            product, never_attending = matrix @ product, residual @ never_attending
        full[b, :n, :n], own[b, :n, :n] = product, never_attending

    if not problem.method.own_path:
        return without_own_path(problem, full, own)
    return wanted_rows(problem, full)


def without_own_path(problem: Problem, full: Tensor, own: Tensor) -> Tensor:
    """The rows wanted of R − (the product of the residuals alone), over their sums; a row of 0 stays."""
    left = wanted_rows(problem, full - own)
    sums = left.sum(-1, keepdim=True)
    return torch.where(sums == 0, torch.zeros_like(left), left / sums)


def wanted_rows(problem: Problem, full: Tensor) -> Tensor:
    """The rows of a matrix [B, S, S] that the call asks for."""
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
        maps = softmax_maps(problem, layer, b, n)
        if problem.handed_on is None:
            return maps, None
        values, slopes = (part[b, :, :n].double() for part in problem.handed_on[layer])
        values = values.repeat_interleave(len(maps) // len(values), dim=0)
        return maps, torch.einsum("hid,hjd->hij", slopes, values)
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


def layer_matrix(problem: Problem, layer: int, b: int, n: int) -> tuple[Tensor, Tensor]:
    """M_l [n, n] of one sample: fusion, discard, residual addition, renormalisation; and the residual's part of it."""
    method = problem.method
    maps, gradients = layer_maps(problem, layer, b, n)
    residual = method.residual * torch.eye(n, dtype=maps.dtype, device=maps.device)
    if problem.values is None:
        weights = None if problem.head_weights is None else problem.head_weights[layer]
        fused = discard(fuse(maps, gradients, method, weights), method.discard_ratio)
        if method.normalize_attention:
            whole = fused.sum(-1, keepdim=True)
            fused = torch.where(whole == 0, fused, fused / whole)
        matrix = residual + method.attention_weight * fused
    else:
        vectors, inputs = transformed_values(problem.values[layer], b, n)
        if method.values == "norm_then_sum":
            residual = residual * inputs.norm(dim=-1)
            matrix = residual + method.attention_weight * (maps * vectors.norm(dim=-1)[:, None]).sum(0)
        else:
            mixed = method.attention_weight * torch.einsum("hij,hje->ije", maps, vectors)
            matrix = (mixed + residual[:, :, None] * inputs[None]).norm(dim=-1)
    sums = matrix.sum(-1, keepdim=True)
    return (matrix / sums, residual / sums) if method.renormalize else (matrix, residual)


def transformed_values(layer: LayerValues, b: int, n: int) -> tuple[Tensor, Tensor]:
    """f_hj = v_hj·W_O^h [H, n, E] and x_i [n, E] of one sample in one layer, float64 (Kobayashi et al. 2020, eq. 3)."""
    values, weights = layer.values[b, :, :n].double(), layer.output_weights.double()
    values = values.repeat_interleave(weights.shape[0] // values.shape[0], dim=0)
    return values @ weights, layer.inputs[b, :n].double()


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
