"""The matrix M_l of one layer from its maps: heads fused, rows renormalised, the residual added or apart."""

import triton
import triton.language as tl
from torch import Tensor

from rollout_kernels._triton.inputs import MapInputs
from rollout_kernels._triton.launch import RowsLaunch
from rollout_kernels._triton.layer import layer_rows, sum_columns
from rollout_kernels._triton.run import run


@triton.jit(
    do_not_specialize=["S", "stride_weights", "layer", "stride_out"], do_not_specialize_on_alignment=["lengths_ptr"]
)
def fuse_heads_kernel(
    # pointers
    maps_ptr,  # int64 [L, 6]: address, strides of batch, head, row and column, heads
    grads_ptr,  # int64 [L, 6]
    head_weights_ptr,  # float32 [L, H]
    lengths_ptr,  # int64 [B]
    out_ptr,  # float32 [B, S, row], rows of stride_out·OUT_VEC, all written
    residual_ptr,  # float32 [B, S], the diagonal left out, unless IDENTITY
    # sizes, strides, weights
    S, stride_weights, residual, attention, layer, stride_out,
    # flags
    IDENTITY: tl.constexpr, HAS_LENGTHS: tl.constexpr, RENORMALIZE: tl.constexpr,
    FUSION: tl.constexpr, GRADIENTS: tl.constexpr, DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr,
    VEC: tl.constexpr, PAIRS: tl.constexpr, UNIT_COLUMN: tl.constexpr,
    # blocks
    OUT_VEC: tl.constexpr, BLOCK_I: tl.constexpr, SP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """This program computes BLOCK_I rows of M_l for one sample, 0 beyond its n×n block; without IDENTITY the residual's
    part of its diagonal is written apart."""
    blocks = tl.cdiv(S, BLOCK_I)
    sample = tl.program_id(0) // blocks
    offs_i = tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_j = tl.arange(0, SP)
    n = S
    if HAS_LENGTHS:
        n = tl.load(lengths_ptr + sample).to(tl.int32)

    rows = layer_rows(
        maps_ptr, grads_ptr, head_weights_ptr, layer, sample, offs_i, offs_j, n, stride_weights, 0.0, attention,
        FUSION, GRADIENTS, DTYPE, GRAD_DTYPE, VEC, PAIRS, UNIT_COLUMN, STAGES,
    )  # fmt: skip
    diagonal = tl.where(offs_i < n, residual, 0.0)
    if RENORMALIZE:
        sums = tl.where(offs_i < n, residual + sum_columns(rows), 1.0)
        rows = rows / sums[:, None]
        diagonal = diagonal / sums
    if IDENTITY:
        rows += tl.where(offs_i[:, None] == offs_j[None, :], diagonal[:, None], 0.0)
    else:
        tl.store(residual_ptr + sample.to(tl.int64) * S + offs_i, diagonal, mask=offs_i < S)

    row_out = stride_out * OUT_VEC
    row = (sample.to(tl.int64) * S + offs_i) * row_out
    mask = (offs_i < S)[:, None] & (offs_j < row_out)[None, :]
    tl.store(out_ptr + row[:, None] + offs_j[None, :], rows, mask=mask)


def fuse_heads(inputs: MapInputs, launch: RowsLaunch, layer: int, out: Tensor, residual: Tensor | None = None) -> None:
    """Fills `out` (float32 [B, S, S], or a view of that size of rows a little longer, which are filled too) with M_l.

    Given `residual`, float32 [B, S], the identity's part of M_l goes there, and M_l is out + diag(residual).
    Reads the layer's maps once. Not yet run on a GPU.
    """
    batch, seq, _ = out.shape
    vector = 4 if out.stride(1) % 4 == 0 else 1
    maps, grads, weights, _, lengths = inputs.pointers
    _, _, _, stride_weights, share, attention = inputs.scalars

    def constants() -> dict[str, object]:
        given = {"IDENTITY": residual is None, **inputs.flags, "OUT_VEC": vector, **launch.blocks, **launch.options}
        return {name: value for name, value in given.items() if name not in ("ONE_HOT", "PARTS")}

    run(
        fuse_heads_kernel, batch * -(-seq // launch.rows),
        (
            maps, grads, weights, lengths, out, out if residual is None else residual,
            seq, stride_weights, share, attention, layer, out.stride(1) // vector,
        ),
        (inputs.key, launch, vector, residual is None), constants,
    )  # fmt: skip
