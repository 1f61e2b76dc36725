"""Device code shared by the kernels from Q and K: tiles of queries and keys, their product, the scores made of it.

Scores are in base 2, times log2 e, so that one FFMA and one exponential make an entry of the softmax. With a bias they
are in base e until the row's maximum is taken off: a finite fill such as −1e9 or the lowest float, on every key of
a row, swallows what is added to it, the logarithm of the row's sum too, which is therefore kept apart.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


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
def handed_matrices(
    handed_on_ptr,  # int64 [2, L, 4]: as of `head_matrix`, of values [B, H_v, S, D_v], then of gradients [B, H, S, D_v]
    layer, sample, head, L, value_group,
    DTYPE: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """As `head_matrix`, of the values that one head hands on and of the gradient at its output."""
    v_matrix, stride_v = head_matrix(handed_on_ptr, layer, sample, head // value_group, DTYPE, VEC, ALIGNED)
    g_matrix, stride_g = head_matrix(handed_on_ptr, L + layer, sample, head, DTYPE, VEC, ALIGNED)
    return v_matrix, stride_v, g_matrix, stride_g


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


@triton.jit
def cap(scores, SOFTCAP: tl.constexpr):
    """SOFTCAP·tanh(scores / SOFTCAP), or the scores where SOFTCAP is 0.

    Below 1 the hyperbolic tangent is a continued fraction, exact to float32: 1 − e^(−2x) would lose small scores' bits.
    """
    if SOFTCAP == 0.0:
        return scores
    else:
        x = tl.abs(scores) * (1.0 / SOFTCAP)
        x2 = x * x
        t = tl.exp2(x * (-2.0 * LOG2_E))
        small = x < 1.0
        top = tl.where(small, x * (945.0 + x2 * (105.0 + x2)), 1.0 - t)
        bottom = tl.where(small, 945.0 + x2 * (420.0 + x2 * 15.0), 1.0 + t)
        capped = SOFTCAP * (top / bottom)
        return tl.where(scores < 0.0, -capped, capped)


@triton.jit
def add_bias(
    scores,  # already times the scale
    bias_ptr,  # int64 [L, 5]: address (0 for a layer without one), strides of batch, head, row and column
    slopes_ptr,  # float32 [L, H], in the base of the scores
    layer, sample, head, H, i, j, n,  # i and j broadcast to the shape of the scores
    HAS_BIAS: tl.constexpr, BIAS_DTYPE: tl.constexpr, BIAS_UNIT: tl.constexpr, HAS_SLOPES: tl.constexpr,
):  # fmt: skip
    """The scores of one head with its additive bias and ALiBi's slope."""
    if HAS_BIAS:
        row = bias_ptr + layer * 5
        address = tl.load(row)
        base = address.to(tl.pointer_type(BIAS_DTYPE))
        base += sample.to(tl.int64) * tl.load(row + 1) + head * tl.load(row + 2)
        columns = j.to(tl.int64)
        if not BIAS_UNIT:
            columns = columns * tl.load(row + 4)
        end = tl.where(address == 0, 0, n)
        mask = (i < end) & (j < end)
        scores += tl.load(base + i.to(tl.int64) * tl.load(row + 3) + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_SLOPES:
        scores = add_slopes(scores, slopes_ptr, layer, head, H, i, j)
    return scores


@triton.jit
def add_slopes(scores, slopes_ptr, layer, head, H, i, j):
    """The scores of one head with ALiBi's −slope·|i − j|; the slope is in their base."""
    return scores - tl.load(slopes_ptr + layer * H + head) * tl.abs(i - j).to(tl.float32)


@triton.jit
def load_norms(
    norms_ptr,  # float32 [L, B, H + 1, S]: of each head's transformed values; the last row the residual's weight
    layer, sample, head, B, H, S, offs, n,
):  # fmt: skip
    """Norms of positions `offs`, 0 beyond the sample's end."""
    row = norms_ptr + ((layer.to(tl.int64) * B + sample) * (H + 1) + head) * S
    return tl.load(row + offs, mask=offs < n, other=0.0)


@triton.jit
def load_lse(lse_ptr, rest_stride, offs, n, lse_scale, HAS_BIAS: tl.constexpr):
    """The log-sum-exp of rows `offs` in base 2 (then twice); with a bias the maximum, and log2 of the sum after it."""
    lse = tl.load(lse_ptr + offs, mask=offs < n, other=0.0) * lse_scale
    rest = lse
    if HAS_BIAS:
        rest = tl.load(lse_ptr + rest_stride + offs, mask=offs < n, other=0.0)
    return lse, rest


@triton.jit
def softmax_entries(scores, lse, rest, HAS_BIAS: tl.constexpr):
    """The softmax from scores and what `load_lse` gives of their rows."""
    if HAS_BIAS:
        return tl.exp2((scores - lse) * LOG2_E - rest)
    else:
        return tl.exp2(scores - lse)
