"""Rollout written a second time, in NumPy float64 with plain loops, from the papers; and the tolerances.

Nothing here calls the package: a layer's matrix is formed row by row, the softmax is taken over an explicit list of
allowed keys, and the chain is multiplied from the top down, where the package's own oracle goes from the bottom up.
"""

from collections.abc import Sequence
from math import floor

import numpy as np
import torch
from torch import Tensor

from rollout import Method

# max|error| / max|reference| of each sample, against float64 on the same (rounded) inputs, by the dtype of the result.
TOLERANCES = {
    ("maps", torch.float32): 1e-6,
    ("maps", torch.float64): 1e-13,
    ("qk", torch.float32): 3e-6,
    ("qk", torch.float64): 1e-12,
}

Arrays = list[np.ndarray]


def array(tensor: Tensor) -> np.ndarray:
    """Any tensor as float64 on the host."""
    return tensor.detach().to("cpu", torch.float64).numpy()


def assert_close(actual: Tensor, expected: np.ndarray | Tensor, kind: str = "maps") -> None:
    """The largest error of every sample is within the tolerance of `kind`, relative to its largest value."""
    wanted = array(expected) if isinstance(expected, Tensor) else expected
    got = array(actual)
    assert got.shape == wanted.shape
    assert np.isfinite(got).all(), "the result is not finite"
    for b in range(len(got)):
        error, size = np.abs(got[b] - wanted[b]).max(initial=0.0), np.abs(wanted[b]).max(initial=0.0)
        tolerance = TOLERANCES[kind, actual.dtype]
        assert error <= tolerance * size, f"sample {b}: error {error:.3g} of {size:.3g}, tolerance {tolerance:g}"


def rollout_matrices(
    maps: Sequence[Tensor | np.ndarray],
    method: Method,
    lengths: Sequence[int] | None = None,
    gradients: Sequence[Tensor] | None = None,
) -> np.ndarray:
    """R = M_L · … · M_1 of every sample, [B, S, S], 0 on padding."""
    layers = [m if isinstance(m, np.ndarray) else array(m) for m in maps]
    layers = [m[:, None] if m.ndim == 3 else m for m in layers]
    slopes: list[np.ndarray | None] = [None] * len(layers)
    if method.gradients is not None:
        assert gradients is not None
        slopes = [array(g) for g in gradients]
        slopes = [g[:, None] if g.ndim == 3 else g for g in slopes]
    batch, seq = layers[0].shape[0], layers[0].shape[-1]
    result = np.zeros((batch, seq, seq))
    for b in range(batch):
        n = seq if lengths is None else int(lengths[b])
        chain = np.eye(n)
        for layer in range(len(layers) - 1, method.start_layer - 1, -1):
            slope = slopes[layer]
            block = None if slope is None else slope[b, :, :n, :n]
            chain = chain @ layer_matrix(layers[layer][b, :, :n, :n], block, method, layer)
        result[b, :n, :n] = chain
    return result


def joint_rollout(
    encoder: Sequence[Tensor], decoder: Sequence[Tensor], crossing: Sequence[Tensor], residual: float = 0.5
) -> np.ndarray:
    """Rows of the decoder of the chain over [decoder; encoder], [B, S, S + S'], from maps [B, H, ., .]."""
    batch, seq, over = crossing[0].shape[0], crossing[0].shape[2], crossing[0].shape[3]
    chain = np.broadcast_to(np.eye(seq + over), (batch, seq + over, seq + over))
    rest = 1.0 - residual
    for maps in encoder:
        layer = np.broadcast_to(np.eye(seq + over), chain.shape).copy()
        layer[:, seq:, seq:] = residual * np.eye(over) + rest * array(maps).mean(1)
        chain = layer @ chain
    for own, across in zip(decoder, crossing, strict=True):
        layer = np.broadcast_to(np.eye(seq + over), chain.shape).copy()
        layer[:, :seq, :seq] = residual * np.eye(seq) + rest * array(own).mean(1)
        chain = layer @ chain
        layer = np.broadcast_to(np.eye(seq + over), chain.shape).copy()
        layer[:, :seq, :seq] = residual * np.eye(seq)
        layer[:, :seq, seq:] = rest * array(across).mean(1)
        chain = layer @ chain
    return chain[:, :seq]


def layer_matrix(maps: np.ndarray, gradients: np.ndarray | None, method: Method, layer: int) -> np.ndarray:
    """M_l [n, n] from the heads [H, n, n] of one sample, row by row."""
    n = maps.shape[-1]
    fused = np.stack(
        [fuse_row(maps[:, i], None if gradients is None else gradients[:, i], method, layer) for i in range(n)]
    )
    entries = sorted((fused[i, j], i * n + j) for i in range(n) for j in range(n)) if method.discard_ratio else []
    for _, flat in entries[: floor(method.discard_ratio * n * n)]:
        if flat != 0:
            fused[flat // n, flat % n] = 0.0
    share = 1.0 - method.residual if method.attention is None else method.attention
    for i in range(n):
        if method.normalize_attention and fused[i].sum() != 0:
            fused[i] /= fused[i].sum()
        fused[i] *= share
        fused[i, i] += method.residual
        if method.renormalize:
            fused[i] /= fused[i].sum()
    return fused


def fuse_row(maps: np.ndarray, gradients: np.ndarray | None, method: Method, layer: int) -> np.ndarray:
    """One row [n] of F_l from that row in each head, [H, n]."""
    heads = len(maps)
    values = [maps[h] if gradients is None else maps[h] * gradients[h] for h in range(heads)]
    if method.gradients == "clamp_then_fuse":
        values = [np.where(value > 0, value, 0.0) for value in values]
    weights = [1.0 / heads] * heads
    if isinstance(method.head_fusion, Tensor) and heads > 1:
        given = array(method.head_fusion)
        given = given[layer] if given.ndim == 2 else given
        weights = [float(w) / float(given.sum()) for w in given]
    row = np.zeros(maps.shape[-1])
    for h in range(heads):
        if method.head_fusion == "max":
            row = values[h] if h == 0 else np.maximum(row, values[h])
        elif method.head_fusion == "min":
            row = values[h] if h == 0 else np.minimum(row, values[h])
        else:
            row = row + weights[h] * values[h]
    return np.where(row > 0, row, 0.0) if method.gradients == "fuse_then_clamp" else row.copy()


def take_rows(full: np.ndarray, query: int | Tensor | None, lengths: Sequence[int] | None = None) -> np.ndarray:
    """The rows of R that `query` asks for."""
    batch, seq = full.shape[0], full.shape[-1]
    ends = [seq] * batch if lengths is None else [int(n) for n in lengths]
    if query is None:
        return full
    if isinstance(query, int) or not query.is_floating_point():
        wanted = [query] * batch if isinstance(query, int) else query.tolist()
        rows = [full[b, q if q >= 0 else ends[b] + q] for b, q in enumerate(wanted)]
        return np.stack(rows) if rows else full[:, 0]
    weights = array(query)
    result = np.zeros(weights.shape)
    for b in range(batch):
        for i in range(ends[b]):
            result[b] += weights[b, ..., i, None] * full[b, i]
    return result


def softmax_maps(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    lengths: Sequence[int] | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    bias: Sequence[Tensor | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Sequence[Tensor] | None = None,
) -> tuple[Arrays, Arrays]:
    """Per layer the maps [B, H, S, S] and the natural log-sum-exp [B, H, S], one row at a time; 0 on padding.

    With sinks a row that may attend to no key is 0, and the log-sum-exp is without them.
    """
    maps, sums = [], []
    for layer, (query, key) in enumerate(zip(queries, keys, strict=True)):
        batch, heads, seq, dim = query.shape
        q, k, group = array(query), array(key), heads // key.shape[1]
        extra = (
            None
            if bias is None or bias[layer] is None
            else np.broadcast_to(array(bias[layer]), (batch, heads, seq, seq))
        )
        layer_maps, layer_sums = np.zeros((batch, heads, seq, seq)), np.full((batch, heads, seq), -np.inf)
        for b in range(batch):
            n = seq if lengths is None else int(lengths[b])
            for i in range(n):
                attending = query_mask is None or bool(query_mask[b, i])
                allowed = [j for j in range(n) if attending and attends(i, j, b, key_mask, causal, window)]
                for h in range(heads):
                    scores = k[b, h // group, allowed] @ q[b, h, i] * (dim**-0.5 if scale is None else scale)
                    if softcap is not None:
                        scores = softcap * np.tanh(scores / softcap)
                    if extra is not None:
                        scores = scores + extra[b, h, i, allowed]
                    sink = None if sinks is None else float(array(sinks[layer])[h])
                    if not len(scores) or np.isneginf(scores).all():
                        layer_maps[b, h, i, :n] = 1.0 / n if sink is None else 0.0
                        continue
                    exponentials = np.exp(scores - scores.max())
                    beside = 0.0 if sink is None else np.exp(sink - scores.max())
                    layer_maps[b, h, i, allowed] = exponentials / (exponentials.sum() + beside)
                    layer_sums[b, h, i] = np.log(exponentials.sum()) + scores.max()
        maps.append(layer_maps)
        sums.append(layer_sums)
    return maps, sums


def attends(
    i: int, j: int, b: int, key_mask: Tensor | None, causal: bool, window: tuple[int | None, int | None]
) -> bool:
    """Whether row i of sample b may attend to key j, beside its length."""
    left, right = window
    if key_mask is not None and not bool(key_mask[b, j]):
        return False
    if causal and j > i:
        return False
    return (left is None or i - j <= left) and (right is None or j - i <= right)
