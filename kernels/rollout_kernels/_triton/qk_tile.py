"""Device code shared by the kernels from Q and K: tiles of queries and keys, and their product."""

import triton
import triton.language as tl


@triton.jit
def head_matrix(
    table_ptr,  # int64 [L, 4]: address, strides of batch, head and row
    layer, sample, head,
    DTYPE: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Pointer to row 0 of one head's [S, D], and the row stride."""
    row = table_ptr + layer * 4
    base = tl.load(row).to(tl.pointer_type(DTYPE))
    # A loaded address says nothing of its alignment: without the hint every load is scalar.
    if ALIGNED:
        base = tl.multiple_of(base, 16)

    # Strides come in units of VEC, so that the compiler sees they keep the alignment.
    stride_batch = tl.load(row + 1) * VEC
    stride_head = tl.load(row + 2) * VEC
    stride_row = tl.load(row + 3) * VEC
    return base + sample.to(tl.int64) * stride_batch + head * stride_head, stride_row


@triton.jit
def load_rows(matrix, stride_row, offs, n, D: tl.constexpr, UPCAST: tl.constexpr):
    """Rows `offs` of an [S, D] matrix, 0 beyond row n. The interpreter's 16-bit products are wrong: it upcasts."""
    offs_d = tl.arange(0, D)
    pointers = matrix + offs.to(tl.int64)[:, None] * stride_row + offs_d[None, :]
    tile = tl.load(pointers, mask=(offs < n)[:, None], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def load_parts(matrix, stride_row, offs, n, D: tl.constexpr, UPCAST: tl.constexpr, HALVES: tl.constexpr):
    """Rows `offs` of an [S, D] matrix, 0 beyond row n: in two halves of D, or once whole (then twice the same)."""
    if HALVES:
        first = load_rows(matrix, stride_row, offs, n, D // 2, UPCAST)
        return first, load_rows(matrix + D // 2, stride_row, offs, n, D // 2, UPCAST)
    else:
        whole = load_rows(matrix, stride_row, offs, n, D, UPCAST)
        return whole, whole


@triton.jit
def multiply(a, a_rest, b, b_rest, PRECISION: tl.constexpr, HALVES: tl.constexpr):
    """a·bᵀ of two tiles as `load_parts` gives them."""
    product = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if HALVES:
        product = tl.dot(a_rest, tl.trans(b_rest), product, input_precision=PRECISION)
    return product
