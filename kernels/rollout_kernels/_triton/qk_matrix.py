"""The matrix M_l of one layer from Q and K: heads fused inside the tile, so that no map of a head is ever written."""

import triton
import triton.language as tl
from torch import Tensor

from rollout_kernels._triton.launch import ScoresLaunch
from rollout_kernels._triton.layer import NO_GRADIENTS, NORMS
from rollout_kernels._triton.qk_fused_tile import fused_tile
from rollout_kernels._triton.qk_inputs import QKInputs
from rollout_kernels._triton.qk_tile import load_norms


@triton.jit(do_not_specialize=["L", "B", "H", "S", "group", "left", "right", "value_group", "layer", "stride_out"])
def qk_matrix_kernel(
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
    out_ptr,  # float32 [B, S, row], rows of stride_out·OUT_VEC, all written
    residual_ptr,  # float32 [B, S], the diagonal left out, unless IDENTITY
    # sizes, weights
    L, B, H, S, group, scale, left, right, lse_scale, residual, attention, value_group,
    layer, stride_out,
    # flags
    IDENTITY: tl.constexpr, FUSION: tl.constexpr, GRADIENTS: tl.constexpr, HAS_DEAD: tl.constexpr,
    HAS_SUMS: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_DTYPE: tl.constexpr, BIAS_UNIT: tl.constexpr, HAS_SLOPES: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    DTYPE: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    # blocks
    OUT_VEC: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """This program computes BLOCK_M rows × BLOCK_N columns of M_l for one sample, 0 beyond its n×n block; without
    IDENTITY the residual's part of its diagonal is written apart."""
    columns = tl.cdiv(S, BLOCK_N)
    tiles = tl.cdiv(S, BLOCK_M) * columns
    sample = tl.program_id(0) // tiles
    start_i = tl.program_id(0) % tiles // columns * BLOCK_M
    start_j = tl.program_id(0) % columns * BLOCK_N

    n = S
    if HAS_LENGTHS:
        n = tl.load(lengths_ptr + sample).to(tl.int32)
    offs_i = start_i + tl.arange(0, BLOCK_M)
    offs_j = start_j + tl.arange(0, BLOCK_N)
    rows = sample.to(tl.int64) * S + offs_i

    UNEVEN: tl.constexpr = FUSION == NORMS or GRADIENTS != NO_GRADIENTS
    # A tile with no allowed entry has no head to look at; a bias may make any row uniform.
    wanted = (start_i < n) & (start_j < n)
    reach = 0
    if HAS_DEAD:
        dead = tl.load(dead_ptr + rows, mask=offs_i < n, other=0) != 0
        if UNEVEN:
            reach = tl.max(tl.where(dead, n, 0), 0)
    if not HAS_BIAS:
        if HAS_LEFT:
            wanted = wanted & (start_j + BLOCK_N > start_i - left - reach)
        if HAS_RIGHT:
            wanted = wanted & (start_j < start_i + BLOCK_M + right + reach)
    tile = fused_tile(
        queries_ptr, keys_ptr, bias_ptr, slopes_ptr, lse_table_ptr, head_weights_ptr, handed_on_ptr,
        key_valid_ptr + sample.to(tl.int64) * S, dead_ptr + sample.to(tl.int64) * S,
        layer, sample, tl.where(wanted, H, 0), offs_i, offs_j, n, L, B, H, S, group, value_group,
        scale, lse_scale, left, right, FUSION, GRADIENTS, HAS_DEAD, HAS_KEY_MASK, HAS_LEFT, HAS_RIGHT, HAS_BIAS,
        BIAS_DTYPE, BIAS_UNIT, HAS_SLOPES, SOFTCAP, HAS_SINKS, DTYPE, VEC, ALIGNED, D, D_V, PRECISION, UPCAST,
    )  # fmt: skip
    inside = (offs_i < n)[None, :] & (offs_j < n)[:, None]
    if HAS_DEAD and not UNEVEN:
        tile = tl.where(dead[None, :] & inside, 0.0 if HAS_SINKS else 1.0 / n, tile)

    diagonal = tl.where(offs_i < n, residual, 0.0)
    if FUSION == NORMS:
        diagonal = residual * load_norms(head_weights_ptr, layer, sample, H, B, H, S, offs_i, n)
    tile = attention * tile
    if HAS_SUMS:
        sums_ptr += layer.to(tl.int64) * B * S
        sums = tl.load(sums_ptr + rows, mask=offs_i < n, other=1.0)
        tile = tile / sums[None, :]
        if NORMALIZE:
            sums = tl.load(sums_ptr + L.to(tl.int64) * B * S + rows, mask=offs_i < n, other=1.0)
        diagonal = diagonal / sums
    if IDENTITY:
        tile += tl.where(offs_i[None, :] == offs_j[:, None], diagonal[None, :], 0.0)
    elif start_j == 0:
        tl.store(residual_ptr + rows, diagonal, mask=offs_i < S)
    row_out = stride_out * OUT_VEC
    pointers = out_ptr + (rows * row_out)[None, :] + offs_j[:, None]
    tl.store(pointers, tile, mask=(offs_i < S)[None, :] & (offs_j < row_out)[:, None])


def qk_matrix(
    inputs: QKInputs, sums: Tensor | None, launch: ScoresLaunch, layer: int, out: Tensor, residual: Tensor | None
) -> None:
    """Fills `out` (float32 [B, S, S], or a view of that size of rows a little longer, which are filled too) with M_l.

    Given `residual`, float32 [B, S], the identity's part of M_l goes there, and M_l is out + diag(residual). `sums`,
    from `row_sums`, normalises and renormalises. Not yet run on a GPU.
    """
    batch, seq, _ = out.shape
    vector = 4 if out.stride(1) % 4 == 0 else 1
    tiles = -(-seq // launch.block_m) * -(-seq // launch.block_n)
    qk_matrix_kernel[(batch * tiles,)](
        *inputs.score_pointers, *inputs.column_pointers, out if sums is None else sums, out,
        out if residual is None else residual,
        *inputs.score_scalars, *inputs.column_scalars, layer, out.stride(1) // vector,
        **inputs.score_flags, **inputs.column_flags, IDENTITY=residual is None, HAS_SUMS=sums is not None,
        NORMALIZE=inputs.normalize, OUT_VEC=vector,
        PRECISION="ieee" if inputs.exact else launch.precision, **launch.blocks, **launch.options,
    )  # fmt: skip
