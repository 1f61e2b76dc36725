"""Device code: one tile of F_l from Q and K, its heads fused on chip, by any fusion.

The mean and head weights are sums, which the columns kernel takes head after head. The maximum and the minimum are
not: a tile is fused over all heads before it is weighted, summed or written. The norms of what each head hands on go
that way too.
"""

import triton
import triton.language as tl

from rollout_kernels._triton.layer import MAX, MEAN, MIN, NORMS, WEIGHTS
from rollout_kernels._triton.qk_tile import add_bias, cap, head_matrix, load_lse, load_norms, load_rows, softmax_entries


@triton.jit
def fused_tile(
    queries_ptr, keys_ptr, bias_ptr, slopes_ptr, lse_table_ptr, head_weights_ptr,
    key_valid_ptr,  # uint8 [S], the sample's
    layer, sample, heads, offs_i, offs_j, n, L, B, H, S, group, scale, lse_scale, left, right,
    FUSION: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_DTYPE: tl.constexpr, BIAS_UNIT: tl.constexpr, HAS_SLOPES: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    DTYPE: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """F_l[i, j] at [j, i], 0 beyond the sample's n×n block. A row of a head that a bias forbids every key is uniform, 0
    with sinks; one that masks forbid every key is 0, and the caller's to fill. `heads` is H, or 0 where no entry is
    allowed."""
    # Two tiles and their thirds beside two of entries: a wide head takes too many registers at once.
    CHUNK: tl.constexpr = min(D, 32 if DTYPE == tl.float32 else 64)  # noqa: SIM300
    i = offs_i[None, :]
    j = offs_j[:, None]
    inside = (i < n) & (j < n)
    allowed = inside
    if HAS_KEY_MASK:
        allowed = allowed & (tl.load(key_valid_ptr + offs_j, mask=offs_j < n, other=0) != 0)[:, None]
    if HAS_LEFT:
        allowed = allowed & (j >= i - left)
    if HAS_RIGHT:
        allowed = allowed & (j <= i + right)

    fused = tl.zeros(inside.shape, tl.float32)
    if FUSION == MAX:
        fused = tl.full(inside.shape, float("-inf"), tl.float32)
    if FUSION == MIN:
        fused = tl.full(inside.shape, float("inf"), tl.float32)
    for head in range(heads):
        q_matrix, stride_q = head_matrix(queries_ptr, layer, sample, head, DTYPE, VEC, ALIGNED)
        k_matrix, stride_k = head_matrix(keys_ptr, layer, sample, head // group, DTYPE, VEC, ALIGNED)
        lse_matrix, _ = head_matrix(lse_table_ptr, layer, sample, head, tl.float32, 1, False)
        lse, rest = load_lse(lse_matrix, L.to(tl.int64) * B * H * S, offs_i, n, lse_scale, HAS_BIAS)

        scores = tl.zeros(inside.shape, tl.float32)
        for first in range(0, D, CHUNK):
            q = load_rows(q_matrix + first, stride_q, offs_i, n, CHUNK, UPCAST)
            k = load_rows(k_matrix + first, stride_k, offs_j, n, CHUNK, UPCAST)
            scores = tl.dot(k, tl.trans(q), scores, input_precision=PRECISION)
        scores = cap(scores * scale, SOFTCAP)
        scores = add_bias(
            scores, bias_ptr, slopes_ptr, layer, sample, head, H, i, j, n, HAS_BIAS, BIAS_DTYPE, BIAS_UNIT, HAS_SLOPES
        )
        p = softmax_entries(scores, lse[None, :], rest[None, :], HAS_BIAS)
        if HAS_BIAS:
            p = tl.where(allowed, p, 0.0)
            p = tl.where(lse[None, :] == float("-inf"), 0.0 if HAS_SINKS else 1.0 / n, p)

        if FUSION == MAX:
            fused = tl.maximum(fused, p, propagate_nan=tl.PropagateNan.ALL)
        elif FUSION == MIN:
            fused = tl.minimum(fused, p, propagate_nan=tl.PropagateNan.ALL)
        elif FUSION == WEIGHTS:
            fused += p * tl.load(head_weights_ptr + layer * H + head)
        elif FUSION == NORMS:
            fused += p * load_norms(head_weights_ptr, layer, sample, head, B, H, S, offs_j, n)[:, None]
        else:
            fused += p
    if FUSION == MEAN:
        fused = fused / H
    return tl.where(inside if HAS_BIAS else allowed, fused, 0.0)
