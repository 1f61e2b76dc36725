"""Device code: one tile of F_l from Q and K, its heads fused on chip, by any fusion.

The mean and head weights are sums, which the columns kernel takes head after head. The maximum and the minimum are
not: a tile is fused over all heads before it is weighted, summed or written. The norms of what each head hands on go
that way too, and every form of the gradient-weighted methods: A∘G, where G_ij = ⟨dO_i, v_j⟩ is one more product of the
same tile.
"""

import triton
import triton.language as tl

from rollout_kernels._triton.layer import (
    CLAMP_THEN_FUSE,
    FUSE_THEN_CLAMP,
    MAX,
    MEAN,
    MIN,
    NO_GRADIENTS,
    NORMS,
    WEIGHTS,
    clamp_below,
)
from rollout_kernels._triton.qk_tile import (
    add_bias,
    cap,
    handed_matrices,
    head_matrix,
    load_lse,
    load_norms,
    load_rows,
    softmax_entries,
)


@triton.jit
def chunked_product(
    a_matrix, stride_a, offs_a, b_matrix, stride_b, offs_b, n,
    D: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows `offs_a` of one [S, D] matrix times rows `offs_b` of another, CHUNK columns at a time."""
    product = tl.zeros((offs_a.shape[0], offs_b.shape[0]), tl.float32)
    for first in range(0, D, CHUNK):
        b = load_rows(b_matrix + first, stride_b, offs_b, n, CHUNK, UPCAST)
        a = load_rows(a_matrix + first, stride_a, offs_a, n, CHUNK, UPCAST)
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
    return product


@triton.jit
def fused_tile(
    queries_ptr, keys_ptr, bias_ptr, slopes_ptr, lse_table_ptr, head_weights_ptr, handed_on_ptr,
    key_valid_ptr, dead_ptr,  # uint8 [S], the sample's
    layer, sample, heads, offs_i, offs_j, n, L, B, H, S, group, value_group, scale, lse_scale, left, right,
    FUSION: tl.constexpr, GRADIENTS: tl.constexpr, HAS_DEAD: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_DTYPE: tl.constexpr, BIAS_UNIT: tl.constexpr, HAS_SLOPES: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    DTYPE: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
    D: tl.constexpr, D_V: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """F_l[i, j] at [j, i], 0 beyond the sample's n×n block. A row of a head that a bias forbids every key is uniform, 0
    with sinks; one that masks forbid every key too where heads are weighted key by key, and else 0 and the caller's to
    fill. `heads` is H, or 0 where no entry is allowed."""
    # Two tiles and their thirds beside those of entries: a wide head takes too many registers at once. With two
    # products each takes half as much at a time: loads of one are not all made while the other is formed.
    WIDEST: tl.constexpr = (32 if DTYPE == tl.float32 else 64) // (1 if GRADIENTS == NO_GRADIENTS else 2)  # noqa: SIM300
    CHUNK: tl.constexpr = min(D, WIDEST)
    CHUNK_V: tl.constexpr = min(D_V, WIDEST)
    BY_KEY: tl.constexpr = HAS_DEAD and (FUSION == NORMS or GRADIENTS != NO_GRADIENTS)
    FILLED: tl.constexpr = HAS_BIAS or BY_KEY
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
    dead = offs_i < 0
    if BY_KEY:
        dead = tl.load(dead_ptr + offs_i, mask=offs_i < n, other=0) != 0

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
        if BY_KEY:
            lse = tl.where(dead, float("-inf"), lse)

        scores = chunked_product(k_matrix, stride_k, offs_j, q_matrix, stride_q, offs_i, n, D, CHUNK, PRECISION, UPCAST)
        scores = cap(scores * scale, SOFTCAP)
        scores = add_bias(
            scores, bias_ptr, slopes_ptr, layer, sample, head, H, i, j, n, HAS_BIAS, BIAS_DTYPE, BIAS_UNIT, HAS_SLOPES
        )
        p = softmax_entries(scores, lse[None, :], rest[None, :], HAS_BIAS)
        if FILLED:
            p = tl.where(allowed, p, 0.0)
            p = tl.where(lse[None, :] == float("-inf"), 0.0 if HAS_SINKS else 1.0 / n, p)
        if GRADIENTS != NO_GRADIENTS:
            v_matrix, stride_v, g_matrix, stride_g = handed_matrices(
                handed_on_ptr, layer, sample, head, L, value_group, DTYPE, VEC, ALIGNED
            )
            p *= chunked_product(
                v_matrix, stride_v, offs_j, g_matrix, stride_g, offs_i, n, D_V, CHUNK_V, PRECISION, UPCAST
            )
        if GRADIENTS == CLAMP_THEN_FUSE:
            p = clamp_below(p)

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
    if GRADIENTS == FUSE_THEN_CLAMP:
        fused = clamp_below(fused)
    return tl.where(inside if FILLED else allowed, fused, 0.0)
