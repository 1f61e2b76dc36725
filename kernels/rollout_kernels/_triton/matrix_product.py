"""One step of the full chain, R ← M_l·R, on tensor cores at float32 accuracy.

Tensor cores cut what they add towards zero, relative to the largest term. The residual's term, r_i·R_ij, is by far the
largest, so it stays out of the product and is added in float32 after it: the rest is then cut at its own size.
"""

import triton
import triton.language as tl
from torch import Tensor

from rollout_kernels._triton.launch import ProductLaunch


@triton.jit(do_not_specialize=["S", "stride_in", "stride_out"])
def matrix_product_kernel(
    # pointers
    left_ptr,  # float32 [B, S, row], rows of stride_in·4, 0 beyond each sample's n×n block
    right_ptr,  # float32 [B, S, row], the same
    residual_ptr,  # float32 [B, S]
    lengths_ptr,  # int64 [B]
    out_ptr,  # float32 [B, S, row], rows of stride_out·OUT_VEC, all written
    # sizes, strides
    S, stride_in, stride_out,
    # flags
    HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr, OUT_VEC: tl.constexpr,
    # blocks
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """This program computes a BLOCK_M × BLOCK_N tile of left·right + residual·right for one sample."""
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
    offs_k = tl.arange(0, BLOCK_K)
    row_in = (stride_in * 4).to(tl.int64)
    first = sample.to(tl.int64) * S * row_in
    left = left_ptr + first + offs_i.to(tl.int64)[:, None] * row_in + offs_k[None, :]
    right = right_ptr + first + offs_k.to(tl.int64)[:, None] * row_in + offs_j[None, :]

    wide = (n + 3) // 4 * 4  # loads are masked at a multiple of 16 bytes, or they would fall to 4
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    inside = (start_i < n) & (start_j < n)
    for start in range(0, tl.where(inside, n, 0), BLOCK_K):
        a = tl.load(left + start, mask=(offs_i < n)[:, None] & (start + offs_k < wide)[None, :], other=0.0)
        b = tl.load(right + start * row_in, mask=(start + offs_k < n)[:, None] & (offs_j < wide)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    residual = tl.load(residual_ptr + sample.to(tl.int64) * S + offs_i, mask=offs_i < n, other=0.0)
    own = right_ptr + first + offs_i.to(tl.int64)[:, None] * row_in + offs_j[None, :]
    acc += residual[:, None] * tl.load(own, mask=(offs_i < n)[:, None] & (offs_j < wide)[None, :], other=0.0)

    row_out = stride_out * OUT_VEC
    row = (sample.to(tl.int64) * S + offs_i) * row_out
    mask = (offs_i < S)[:, None] & (offs_j < row_out)[None, :]
    tl.store(out_ptr + row[:, None] + offs_j[None, :], acc, mask=mask)


def matrix_product(
    left: Tensor,
    residual: Tensor,
    right: Tensor,
    lengths: Tensor | None,
    out: Tensor,
    launch: ProductLaunch,
    precision: str,
) -> None:
    """Fills `out` [B, S, S] with (left + diag(residual))·right; `residual` is float32 [B, S], contiguous.

    Both matrices have the same row stride, a multiple of 4. Not yet run on a GPU.
    """
    batch, seq, _ = out.shape
    vector = 4 if out.stride(1) % 4 == 0 else 1
    tiles = -(-seq // launch.block_m) * -(-seq // launch.block_n)
    matrix_product_kernel[(batch * tiles,)](
        left, right, residual, left if lengths is None else lengths, out, seq, left.stride(1) // 4,
        out.stride(1) // vector,
        HAS_LENGTHS=lengths is not None, PRECISION=precision, OUT_VEC=vector, **launch.blocks, **launch.options,
    )  # fmt: skip
