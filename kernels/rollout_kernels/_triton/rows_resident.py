"""Rows from maps, many samples: one program per sample and start row, w on chip through all layers."""

import triton
import triton.language as tl

from rollout_kernels._triton.inputs import MapInputs
from rollout_kernels._triton.launch import RowsLaunch
from rollout_kernels._triton.layer import any_nonzero, layer_rows, row_sums, row_weights, sum_rows
from rollout_kernels._triton.run import run


@triton.jit(
    do_not_specialize=["L", "R", "S", "stride_weights"],
    do_not_specialize_on_alignment=["start_ptr", "lengths_ptr"],
)
def rows_resident_kernel(
    # pointers
    maps_ptr,  # int64 [L, 6]: address, strides of batch, head, row and column, heads
    grads_ptr,  # int64 [L, 6]
    head_weights_ptr,  # float32 [L, H]
    start_ptr,  # int64 [B] when ONE_HOT, else float32 [B, R, S]
    lengths_ptr,  # int64 [B]
    out_ptr,  # float32 [B, R, S]
    # sizes, strides, weights
    L, R, S, stride_weights, residual, attention,
    # flags
    ONE_HOT: tl.constexpr, HAS_LENGTHS: tl.constexpr, RENORMALIZE: tl.constexpr,
    FUSION: tl.constexpr, GRADIENTS: tl.constexpr, DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr,
    VEC: tl.constexpr, PAIRS: tl.constexpr, UNIT_COLUMN: tl.constexpr,
    # blocks
    BLOCK_I: tl.constexpr, SP: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """This program computes one row of out: w ← w·M_l from the top layer to the bottom one."""
    chain = tl.program_id(0)
    sample = chain // R

    offs_j = tl.arange(0, SP)
    n = S
    if HAS_LENGTHS:
        n = tl.load(lengths_ptr + sample).to(tl.int32)
    blocks = tl.cdiv(n, BLOCK_I)
    parts = tl.minimum(blocks, PARTS)

    top = L - 1
    if ONE_HOT:
        # The top layer is free: a one-hot w needs its row alone.
        offs_start = tl.load(start_ptr + sample).to(tl.int32) + tl.arange(0, 1)
        row = layer_rows(
            maps_ptr, grads_ptr, head_weights_ptr, top, sample, offs_start, offs_j, n, stride_weights,
            residual, attention,
            FUSION, GRADIENTS, DTYPE, GRAD_DTYPE, VEC, PAIRS, UNIT_COLUMN, STAGES,
        )  # fmt: skip
        one = tl.full((1,), 1.0, tl.float32)
        w = tl.sum(row * row_weights(one, row_sums(row, RENORMALIZE), RENORMALIZE)[:, None], 0)
        top -= 1
    else:
        w = tl.load(start_ptr + chain.to(tl.int64) * S + offs_j, mask=offs_j < n, other=0.0)

    for step in range(top + 1):
        layer = top - step
        total = tl.zeros((SP,), tl.float32)
        # Parts are summed in the order in which the split kernel sums them: same bits.
        for part in range(parts):
            acc = tl.zeros((BLOCK_I, SP), tl.float32)
            for block in range(part, blocks, PARTS):
                offs_i = block * BLOCK_I + tl.arange(0, BLOCK_I)
                w_i = tl.gather(w, offs_i, 0)
                if any_nonzero(w_i):
                    rows = layer_rows(
                        maps_ptr, grads_ptr, head_weights_ptr, layer, sample, offs_i, offs_j, n, stride_weights,
                        residual, attention,
                        FUSION, GRADIENTS, DTYPE, GRAD_DTYPE, VEC, PAIRS, UNIT_COLUMN, STAGES,
                    )  # fmt: skip
                    acc += rows * row_weights(w_i, row_sums(rows, RENORMALIZE), RENORMALIZE)[:, None]
            total += sum_rows(acc)
        w = total

    tl.store(out_ptr + chain.to(tl.int64) * S + offs_j, w, mask=offs_j < S)


def rows_resident(inputs: MapInputs, launch: RowsLaunch) -> None:
    """Fills `inputs.out` [B, R, S] with one program per sample and start row.

    Reads every map once per start row (the top layer: one row per head when the start is one-hot); no memory beyond
    `out`. Not yet run on a GPU.
    """
    run(
        rows_resident_kernel, inputs.out.shape[0] * inputs.out.shape[1],
        (*inputs.pointers, inputs.out, *inputs.scalars), (inputs.key, launch),
        lambda: {**inputs.flags, **launch.blocks, **launch.options},
    )  # fmt: skip
