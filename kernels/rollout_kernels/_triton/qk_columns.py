"""Rows from Q and K: no map in memory, every layer in one launch.

A program owns BLOCK_N columns of one step of one chain (one start row of one sample):

    out_j = residual·w_j + attention·Σ_h c_h Σ_i w_i·2^(score_ij − lse_i)

The maximum or minimum over heads, or their sum weighted by norms, is taken entry by entry first, with rows in the outer
loop and heads in the inner one (`fused_tile`), and w_i is divided by the row sum of M_l where it is renormalised
(`row_sums`). The mean goes that way too with a bias, which may leave a row of one head alone no key, and with a soft
cap or sinks, which take registers. With sinks a row with no key is 0.

Of a gradient-weighted method an entry of the softmax is A_ij·G_ij, G_ij = ⟨dO_i, v_j⟩ a second product of the same
tile. Clamped head by head it is added up as the mean is; clamped after fusing, it is fused first.

It forms the transposed scores K·Qᵀ, so that the sum over rows i is taken once, after the loop. Programs take tickets,
numbered step-major (step 0 is the top layer), and wait for every column of the step before: only for lower tickets,
which running programs hold, so no order of starting programs can deadlock. w lives in two buffers: a step reads one
and writes the other, and the step after it begins for a chain when it has ended.
"""

import triton
import triton.language as tl
from torch import Tensor

from rollout_kernels._triton.launch import ScoresLaunch
from rollout_kernels._triton.layer import FUSE_THEN_CLAMP, MAX, MEAN, MIN, NO_GRADIENTS, NORMS, WEIGHTS, clamp_below
from rollout_kernels._triton.qk_fused_tile import fused_tile
from rollout_kernels._triton.qk_inputs import QKInputs
from rollout_kernels._triton.qk_tile import (
    add_slopes,
    handed_matrices,
    head_matrix,
    load_norms,
    load_parts,
    multiply,
)
from rollout_kernels._triton.tickets import arrive, wait_for


@triton.jit
def load_w(w_ptr, dead_ptr, sums_ptr, offs, n, HAS_DEAD: tl.constexpr, HAS_SUMS: tl.constexpr):
    """w [S] of the step before at `offs`, over what divides its rows, and the part on rows that attend to no key."""
    w = tl.load(w_ptr + offs, mask=offs < n, other=0.0, cache_modifier=".cg")
    if HAS_SUMS:  # a row of weight 0 may have none
        w = w / tl.where(w == 0.0, 1.0, tl.load(sums_ptr + offs, mask=offs < n, other=1.0))
    lost = tl.zeros(offs.shape, tl.float32)
    if HAS_DEAD:
        dead = tl.load(dead_ptr + offs, mask=offs < n, other=0) != 0
        lost = tl.where(dead, w, 0.0)
        w = tl.where(dead, 0.0, w)
    return w, lost


@triton.jit
def add_rows(
    acc, k, k_rest, v, v_rest, q_matrix, stride_q, g_matrix, stride_g,
    lse_ptr, w_ptr, dead_ptr, sums_ptr, slopes_ptr, key_valid_ptr,
    layer, head, H, offs_j, low, inner, outer, high, n, scale, lse_scale, head_weight, left, right,
    HAS_KEY_MASK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_DEAD: tl.constexpr,
    HAS_SUMS: tl.constexpr, WEIGHTED: tl.constexpr, HAS_SLOPES: tl.constexpr,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """acc[j, i mod BLOCK_M] += w_i·A_ij, or w_i·A_ij·max(G_ij, 0) when WEIGHTED, for the rows low … high of one head;
    inner … outer need no mask."""
    for start in range(low, high, BLOCK_M):
        offs_i = start + tl.arange(0, BLOCK_M)
        q, q_rest = load_parts(q_matrix, stride_q, offs_i, n, D, UPCAST, HALVES)
        w, _ = load_w(w_ptr, dead_ptr, sums_ptr, offs_i, n, HAS_DEAD and not WEIGHTED, HAS_SUMS)
        lse = tl.load(lse_ptr + offs_i, mask=offs_i < n, other=0.0) * lse_scale
        # A row of weight 0 may be padding, or have no log-sum-exp: 2^−∞ keeps it out.
        lse = tl.where(w == 0.0, float("inf"), lse)

        scores = multiply(k, k_rest, q, q_rest, PRECISION, HALVES) * scale
        if HAS_SLOPES:
            scores = add_slopes(scores, slopes_ptr, layer, head, H, offs_i[None, :], offs_j[:, None])
        p = tl.exp2(scores - lse[None, :])
        masked = (start < inner) | (start >= outer)  # known at run time, the flags when compiling
        if HAS_LEFT:  # noqa: SIM102
            if masked:
                p = tl.where(offs_j[:, None] >= offs_i[None, :] - left, p, 0.0)
        if HAS_RIGHT:  # noqa: SIM102
            if masked:
                p = tl.where(offs_j[:, None] <= offs_i[None, :] + right, p, 0.0)
        if WEIGHTED:
            if HAS_DEAD:  # weighted key by key, a row that attends to no key is no constant
                if HAS_KEY_MASK:
                    valid = tl.load(key_valid_ptr + offs_j, mask=offs_j < n, other=0) != 0
                    p = tl.where(valid[:, None], p, 0.0)
                dead = tl.load(dead_ptr + offs_i, mask=offs_i < n, other=0) != 0
                p = tl.where(dead[None, :], 1.0 / n, p)
            g, g_rest = load_parts(g_matrix, stride_g, offs_i, n, D_V, UPCAST, False)
            p *= clamp_below(multiply(v, v_rest, g, g_rest, PRECISION, False))
        acc += p * (w * head_weight)[None, :]
    return acc


@triton.jit(do_not_specialize=["L", "B", "R", "H", "S", "group", "left", "right", "chains", "value_group"])
def columns_kernel(
    # pointers
    queries_ptr,  # int64 [L, 4]: address, strides of batch, head and row of [B, H, S, D]
    keys_ptr,  # int64 [L, 4]: the same of [B, H_kv, S, D]
    lengths_ptr,  # int64 [B]
    key_valid_ptr,  # uint8 [B, S]
    bias_ptr,  # int64 [L, 5]: address or 0, strides of batch, head, row and column of [B, H, S, S]
    slopes_ptr,  # float32 [L, H]
    lse_table_ptr,  # int64 [L, 4]: the same of float32 [B, H, S], rows contiguous
    dead_ptr,  # uint8 [B, S]: rows that attend to no key
    head_weights_ptr,  # float32 [L, H], or [L, B, H + 1, S] when FUSION is NORMS
    handed_on_ptr,  # int64 [2, L, 4]: values and gradients, see `handed_matrices`, unless GRADIENTS is NO_GRADIENTS
    sums_ptr,  # float32 [L, B, S] when HAS_SUMS, [2, L, B, S] when NORMALIZE
    w_ptr,  # float32 [2, B, R, S]: the start rows in the first half
    out_ptr,  # float32 [B, R, S]
    ready_ptr,  # int32 [L, chains], zeros; chains = B·R
    ticket_ptr,  # int32 [1], zero
    # sizes, weights
    L, B, H, S, group, scale, left, right, R, chains, lse_scale, residual, attention, value_group,
    # flags
    HAS_LENGTHS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_DEAD: tl.constexpr, HAS_SUMS: tl.constexpr, NORMALIZE: tl.constexpr,
    FUSION: tl.constexpr, GRADIENTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_DTYPE: tl.constexpr, BIAS_UNIT: tl.constexpr, HAS_SLOPES: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    DTYPE: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    # blocks
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """This program computes BLOCK_N columns of w·M_l for one chain, in layer L−1−step."""
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    blocks = tl.cdiv(S, BLOCK_N)
    column = ticket % blocks * BLOCK_N
    chain = ticket // blocks % chains
    step = ticket // blocks // chains
    layer = L - 1 - step
    sample = chain // R
    # A float32 tile is split into thirds before the product: at D = 128 all at once they are too many registers.
    HALVES: tl.constexpr = DTYPE == tl.float32 and D > 64  # noqa: SIM300
    WEIGHTED: tl.constexpr = GRADIENTS != NO_GRADIENTS
    FIRST: tl.constexpr = FUSION == MAX or FUSION == MIN or FUSION == NORMS  # noqa: PLR1714, SIM109, RUF100
    WIDE: tl.constexpr = DTYPE == tl.float32 and max(D, D_V) > 64  # noqa: SIM300
    TILED: tl.constexpr = (
        HAS_BIAS or HAS_SINKS or SOFTCAP != 0.0 or FIRST or GRADIENTS == FUSE_THEN_CLAMP or (WEIGHTED and WIDE)
    )
    # Weighted key by key, a row that attends to no key is no constant, and is filled where it is weighted.
    LOST: tl.constexpr = HAS_DEAD and not (WEIGHTED or FUSION == NORMS)

    n = S
    if HAS_LENGTHS:
        n = tl.load(lengths_ptr + sample).to(tl.int32)
    offs_j = column + tl.arange(0, BLOCK_N)

    half = chains.to(tl.int64) * S
    from_ptr = w_ptr + (step % 2) * half + chain.to(tl.int64) * S
    to_ptr = w_ptr + (1 - step % 2) * half + chain.to(tl.int64) * S
    if step == L - 1:
        to_ptr = out_ptr + chain.to(tl.int64) * S
    ready_ptr += step.to(tl.int64) * chains + chain
    key_valid_ptr += sample.to(tl.int64) * S
    dead_ptr += sample.to(tl.int64) * S
    sums_ptr += (layer.to(tl.int64) * B + sample) * S

    result = tl.zeros((BLOCK_N,), tl.float32)
    if column < n:
        if step > 0:
            wait_for(ready_ptr - chains, tl.cdiv(n, BLOCK_N))

        # The rows low … high hold every weight that is not 0.
        low = n
        high = 0
        lost = 0.0
        reach = 0
        for start in range(0, n, BLOCK_N):
            offs = start + tl.arange(0, BLOCK_N)
            w, lost_here = load_w(from_ptr, dead_ptr, sums_ptr, offs, n, LOST, HAS_SUMS)
            low = tl.minimum(low, tl.min(tl.where(w != 0.0, offs, n), 0))
            high = tl.maximum(high, tl.max(tl.where(w != 0.0, offs + 1, 0), 0))
            lost += tl.sum(lost_here, 0)
            if HAS_DEAD and not LOST:
                dead = tl.load(dead_ptr + offs, mask=offs < n, other=0) != 0
                reach = tl.maximum(reach, tl.max(tl.where(dead & (w != 0.0), n, 0), 0))

        # Of them, whole blocks between inner and outer may attend to every one of these columns.
        inner = low
        outer = high
        # A row that is forbidden every key is uniform, beyond the window too.
        if HAS_RIGHT and not HAS_BIAS:
            low = tl.maximum(low, column - right - reach)
            inner = column + BLOCK_N - 1 - right
        if HAS_LEFT and not HAS_BIAS:
            high = tl.minimum(high, column + BLOCK_N + left + reach)
            outer = column + left - BLOCK_M + 2
        low = low // BLOCK_M * BLOCK_M

        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if TILED:
            for start in range(low, high, BLOCK_M):
                offs_i = start + tl.arange(0, BLOCK_M)
                tile = fused_tile(
                    queries_ptr, keys_ptr, bias_ptr, slopes_ptr, lse_table_ptr, head_weights_ptr, handed_on_ptr,
                    key_valid_ptr, dead_ptr, layer, sample, H, offs_i, offs_j, n, L, B, H, S, group, value_group,
                    scale, lse_scale, left, right, FUSION, GRADIENTS, HAS_DEAD, HAS_KEY_MASK, HAS_LEFT, HAS_RIGHT,
                    HAS_BIAS, BIAS_DTYPE, BIAS_UNIT, HAS_SLOPES, SOFTCAP, HAS_SINKS, DTYPE, VEC, ALIGNED, D, D_V,
                    PRECISION, UPCAST,
                )  # fmt: skip
                w, _ = load_w(from_ptr, dead_ptr, sums_ptr, offs_i, n, LOST, HAS_SUMS)
                acc += tl.where(w[None, :] == 0.0, 0.0, tile * w[None, :])
        else:
            for head in range(H):
                q_matrix, stride_q = head_matrix(queries_ptr, layer, sample, head, DTYPE, VEC, ALIGNED)
                k_matrix, stride_k = head_matrix(keys_ptr, layer, sample, head // group, DTYPE, VEC, ALIGNED)
                lse_matrix, _ = head_matrix(lse_table_ptr, layer, sample, head, tl.float32, 1, False)
                k, k_rest = load_parts(k_matrix, stride_k, offs_j, n, D, UPCAST, HALVES)
                v, v_rest, g_matrix, stride_g = k, k_rest, q_matrix, stride_q
                if WEIGHTED:
                    v_matrix, stride_v, g_matrix, stride_g = handed_matrices(
                        handed_on_ptr, layer, sample, head, L, value_group, DTYPE, VEC, ALIGNED
                    )
                    v, v_rest = load_parts(v_matrix, stride_v, offs_j, n, D_V, UPCAST, False)
                head_weight = 1.0
                if FUSION == WEIGHTS:
                    head_weight = tl.load(head_weights_ptr + layer * H + head)

                acc = add_rows(
                    acc, k, k_rest, v, v_rest, q_matrix, stride_q, g_matrix, stride_g,
                    lse_matrix, from_ptr, dead_ptr, sums_ptr, slopes_ptr, key_valid_ptr,
                    layer, head, H, offs_j, low, inner, outer, high, n, scale, lse_scale, head_weight,
                    left, right, HAS_KEY_MASK, HAS_LEFT, HAS_RIGHT, HAS_DEAD, HAS_SUMS, WEIGHTED, HAS_SLOPES,
                    D, D_V, BLOCK_M, PRECISION, UPCAST, HALVES,
                )  # fmt: skip

        sums = tl.sum(acc, 1)
        if FUSION == MEAN and not TILED:
            sums = sums / H
        if HAS_KEY_MASK and not (TILED or (HAS_DEAD and WEIGHTED)):
            sums = tl.where(tl.load(key_valid_ptr + offs_j, mask=offs_j < n, other=0) != 0, sums, 0.0)
        if LOST and not HAS_SINKS:
            sums += lost / n  # a row that attends to no key is uniform over the sample's keys
        if NORMALIZE:  # what divides the residual's part
            sums_ptr += L.to(tl.int64) * B * S
        own, _ = load_w(from_ptr, dead_ptr, sums_ptr, offs_j, n, False, HAS_SUMS)
        if FUSION == NORMS:
            own = own * load_norms(head_weights_ptr, layer, sample, H, B, H, S, offs_j, n)
        result = tl.where(offs_j < n, residual * own + attention * sums, 0.0)

    tl.store(to_ptr + offs_j, result, mask=offs_j < S)
    arrive(ready_ptr, (column < n).to(tl.int32))


def columns(inputs: QKInputs, launch: ScoresLaunch, sums: Tensor | None = None) -> None:
    """Fills `inputs.out` [B, R, S] from the log-sum-exp of every row, and what `row_sums` gives where it divides.

    Scratch: float32 [2, B, R, S] and int32 [L, B·R]. The waits between programs are checked under adversarial schedules
    of the interpreter (tests/kernels/test_triton_schedules.py). Not yet run on a GPU.
    """
    batch, starts, seq = inputs.out.shape
    chains = batch * starts
    ticket, ready, w = inputs.scratch()
    grid = (inputs.layers * chains * -(-seq // launch.block_n),)
    columns_kernel[grid](
        *inputs.score_pointers, *inputs.column_pointers, w if sums is None else sums,
        w, inputs.out, ready, ticket,
        *inputs.score_scalars, starts, chains, *inputs.column_scalars,
        **inputs.score_flags, **inputs.column_flags, HAS_SUMS=sums is not None,
        NORMALIZE=inputs.normalize,
        PRECISION="ieee" if inputs.exact else launch.precision, **launch.blocks, **launch.options,
    )  # fmt: skip
