"""The row sums of M_l from Q and K, every layer in one launch: what the maximum or minimum over heads is divided by,
and any fusion of heads with sinks, by norms or by gradients. Those of F_l too where they divide it first.

Rows of such an F_l do not sum to 1, and a program that owns some columns sees no whole row: the scores are formed once
more, here by rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rollout_kernels._triton.launch import ScoresLaunch
from rollout_kernels._triton.layer import NO_GRADIENTS, NORMS
from rollout_kernels._triton.qk_fused_tile import fused_tile
from rollout_kernels._triton.qk_inputs import QKInputs
from rollout_kernels._triton.qk_tile import load_norms


@triton.jit(do_not_specialize=["L", "B", "H", "S", "group", "left", "right", "value_group"])
def row_sums_kernel(
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
    start_ptr,  # int64 [B] when ONE_HOT
    sums_ptr,  # float32 [L, B, S], or [2, L, B, S] when NORMALIZE
    # sizes, weights
    L, B, H, S, group, scale, left, right, lse_scale, residual, attention, value_group,
    # flags
    ONE_HOT: tl.constexpr, FUSION: tl.constexpr, GRADIENTS: tl.constexpr, HAS_DEAD: tl.constexpr,
    NORMALIZE: tl.constexpr, RENORMALIZE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_DTYPE: tl.constexpr, BIAS_UNIT: tl.constexpr, HAS_SLOPES: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    DTYPE: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    # blocks
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """This program computes d_i = residual + attention·f_i, f_i = Σ_j F_l[i, j], for BLOCK_M rows of one sample and
    layer.

    When NORMALIZE, F_l is divided by f_i first, or by 1 where that is 0: then f_i·d_i, which divides F_l, and d_i, 1
    unless RENORMALIZE, which divides the residual.
    """
    UNEVEN: tl.constexpr = FUSION == NORMS or GRADIENTS != NO_GRADIENTS
    blocks = tl.cdiv(S, BLOCK_M)
    pid = tl.program_id(0)
    block = pid % blocks
    sample = pid // blocks % B
    layer = pid // blocks // B

    n = S
    if HAS_LENGTHS:
        n = tl.load(lengths_ptr + sample).to(tl.int32)
    start = block * BLOCK_M
    wanted = start < n
    if ONE_HOT:  # the top layer needs the start row alone
        row = tl.load(start_ptr + sample).to(tl.int32)
        wanted = wanted & ((layer < L - 1) | (row // BLOCK_M == block))

    if wanted:
        offs_i = start + tl.arange(0, BLOCK_M)
        rows = sample.to(tl.int64) * S + offs_i
        reach = 0
        if HAS_DEAD:
            dead = tl.load(dead_ptr + rows, mask=offs_i < n, other=0) != 0
            if UNEVEN:
                reach = tl.max(tl.where(dead, n, 0), 0)
        low = 0
        high = n
        if not HAS_BIAS:  # a row that a bias forbids every key reaches beyond the window
            if HAS_LEFT:
                low = tl.maximum(start - left - reach, 0) // BLOCK_N * BLOCK_N
            if HAS_RIGHT:
                high = tl.minimum(start + BLOCK_M + right + reach, n)

        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for first in range(low, high, BLOCK_N):
            acc += fused_tile(
                queries_ptr, keys_ptr, bias_ptr, slopes_ptr, lse_table_ptr, head_weights_ptr, handed_on_ptr,
                key_valid_ptr + sample.to(tl.int64) * S, dead_ptr + sample.to(tl.int64) * S,
                layer, sample, H, offs_i, first + tl.arange(0, BLOCK_N), n, L, B, H, S, group, value_group,
                scale, lse_scale, left, right, FUSION, GRADIENTS, HAS_DEAD, HAS_KEY_MASK, HAS_LEFT, HAS_RIGHT, HAS_BIAS,
                BIAS_DTYPE, BIAS_UNIT, HAS_SLOPES, SOFTCAP, HAS_SINKS, DTYPE, VEC, ALIGNED, D, D_V, PRECISION, UPCAST,
            )  # fmt: skip

        sums = tl.sum(acc, 0)
        if HAS_DEAD and not UNEVEN:
            sums = tl.where(dead, 0.0 if HAS_SINKS else 1.0, sums)
        own = residual
        if FUSION == NORMS:
            own = residual * load_norms(head_weights_ptr, layer, sample, H, B, H, S, offs_i, n)
        sums_ptr += layer.to(tl.int64) * B * S
        if NORMALIZE:
            whole = tl.full((BLOCK_M,), 1.0, tl.float32)
            if RENORMALIZE:
                whole = own + tl.where(sums == 0.0, 0.0, attention)
            tl.store(sums_ptr + L.to(tl.int64) * B * S + rows, whole, mask=offs_i < n)
            tl.store(sums_ptr + rows, tl.where(sums == 0.0, 1.0, sums) * whole, mask=offs_i < n)
        else:
            tl.store(sums_ptr + rows, own + attention * sums, mask=offs_i < n)


def row_sums(inputs: QKInputs, launch: ScoresLaunch) -> Tensor:
    """What divides every row of every M_l, float32 [L, B, S], from the log-sum-exp of every row; of a method that
    normalises F_l first [2, L, B, S], what divides F_l and what divides the residual.

    Set on the rows that the chain reads, as the log-sum-exp. Not yet run on a GPU.
    """
    layers, batch, _, seq = (int(size) for size in inputs.score_scalars[:4])
    parts = (2,) if inputs.normalize else ()
    sums = torch.empty(*parts, layers, batch, seq, dtype=torch.float32, device=inputs.out.device)
    grid = (layers * batch * -(-seq // launch.block_m),)
    row_sums_kernel[grid](
        *inputs.score_pointers, *inputs.column_pointers, inputs.start, sums,
        *inputs.score_scalars, *inputs.column_scalars,
        **inputs.score_flags, **inputs.column_flags, ONE_HOT=inputs.one_hot,
        NORMALIZE=inputs.normalize, RENORMALIZE=inputs.problem.method.renormalize,
        PRECISION="ieee" if inputs.exact else launch.precision, **launch.blocks, **launch.options,
    )  # fmt: skip
    return sums
