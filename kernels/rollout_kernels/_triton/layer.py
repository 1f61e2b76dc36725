"""Device code shared by the kernels that read maps: one block of rows of M_l, fused over heads on chip."""

import triton
import triton.language as tl

MEAN = tl.constexpr(0)
MAX = tl.constexpr(1)
MIN = tl.constexpr(2)
WEIGHTS = tl.constexpr(3)
NORMS = tl.constexpr(4)  # of each key and head, from Q and K alone

NO_GRADIENTS = tl.constexpr(0)
CLAMP_THEN_FUSE = tl.constexpr(1)
FUSE_THEN_CLAMP = tl.constexpr(2)


@triton.jit
def clamp_below(x):
    """max(x, 0), NaN kept."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sum_columns(x):
    """Sums [BI, SP] over its columns, [BI]: neighbours meet, then pairs of neighbours, and so on.

    Every addition has two operands, so the bits are the same in any layout: that of a plain `tl.sum` follows the width
    of the loads, the number of warps and the release of Triton. It takes as many shuffles as that.
    """
    for _ in tl.static_range(16):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), 2)
    return tl.reshape(x, (x.shape[0],))


@triton.jit
def sum_rows(x):
    """Sums [BI, SP] over its rows, [SP], two operands at a time as `sum_columns`: row i meets row i + BI/2, and so on,
    which one thread often holds."""
    for _ in tl.static_range(16):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, (2, x.shape[0] // 2, x.shape[1])), 0)
    return tl.reshape(x, (x.shape[1],))


@triton.jit
def block_offsets(
    table_ptr,  # int64 [L, 6]: address, strides of batch, head, row and column, heads
    layer, sample, offs_i, offs_j,
    VEC: tl.constexpr, UNIT_COLUMN: tl.constexpr,
):  # fmt: skip
    """Of rows `offs_i` of one map: its address, offsets [BI, SP] in head 0, the head stride, the number of heads."""
    row = table_ptr + layer * 6
    # Strides come in units of VEC, so that the compiler sees they keep the alignment.
    stride_batch = tl.load(row + 1) * VEC
    stride_head = tl.load(row + 2) * VEC
    stride_row = tl.load(row + 3) * VEC
    columns = offs_j.to(tl.int64)
    if not UNIT_COLUMN:
        columns = columns * tl.load(row + 4)
    offsets = sample.to(tl.int64) * stride_batch + offs_i.to(tl.int64)[:, None] * stride_row + columns[None, :]
    return tl.load(row), offsets, stride_head, tl.load(row + 5).to(tl.int32)


@triton.jit
def load_head(address, offsets, mask, DTYPE: tl.constexpr, VEC: tl.constexpr, PAIRS: tl.constexpr):
    """Elements of 2·VEC or 4·VEC bytes each load, float32.

    PAIRS: 16-bit elements at odd strides. An asynchronous copy takes 4 bytes at least, so each element comes with the
    neighbour in its 4-byte word, which may lie outside the tensor but in no other word than one of its own.
    """
    if PAIRS:
        place = (address >> 1) + offsets
        words = ((place >> 1) << 2).to(tl.pointer_type(tl.int32))
        word = tl.load(words, mask=mask, other=0, eviction_policy="evict_first")
        half = (word >> ((place & 1).to(tl.int32) * 16)).to(tl.int16)
        return half.to(DTYPE, bitcast=True).to(tl.float32)
    else:
        # A loaded address says nothing of its alignment: without the hint every load is scalar.
        base = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), VEC * DTYPE.primitive_bitwidth // 8)
        return tl.load(base + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def layer_rows(
    maps_ptr, grads_ptr,  # int64 [L, 6], see `block_offsets`
    head_weights_ptr,  # float32 [L, H]
    layer, sample, offs_i, offs_j, n, stride_weights,
    residual, attention,
    FUSION: tl.constexpr, GRADIENTS: tl.constexpr,
    DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, VEC: tl.constexpr, PAIRS: tl.constexpr,
    UNIT_COLUMN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows `offs_i` of residual·I + attention·F_l for one sample: float32 [BI, SP], 0 beyond its n×n block."""
    address, offsets, stride_head, heads = block_offsets(maps_ptr, layer, sample, offs_i, offs_j, VEC, UNIT_COLUMN)
    grad_address, grad_offsets, grad_stride_head = address, offsets, stride_head
    if GRADIENTS != NO_GRADIENTS:
        grad_address, grad_offsets, grad_stride_head, _ = block_offsets(
            grads_ptr, layer, sample, offs_i, offs_j, VEC, UNIT_COLUMN
        )

    # Loads are masked at n rounded up to the vector width, or they would fall to 4 bytes.
    wide = (n + VEC - 1) // VEC * VEC
    mask_load = (offs_i < n)[:, None] & (offs_j < wide)[None, :]
    mask = (offs_i < n)[:, None] & (offs_j < n)[None, :]

    fused = tl.zeros(mask.shape, tl.float32)
    if FUSION == MAX:
        fused = tl.full(mask.shape, float("-inf"), tl.float32)
    if FUSION == MIN:
        fused = tl.full(mask.shape, float("inf"), tl.float32)
    for head in tl.range(0, heads, num_stages=STAGES):
        a = load_head(address, offsets + head * stride_head, mask_load, DTYPE, VEC, PAIRS)
        if GRADIENTS != NO_GRADIENTS:
            a *= load_head(grad_address, grad_offsets + head * grad_stride_head, mask_load, GRAD_DTYPE, VEC, PAIRS)
        if GRADIENTS == CLAMP_THEN_FUSE:
            a = clamp_below(a)
        if FUSION == MAX:
            fused = tl.maximum(fused, a, propagate_nan=tl.PropagateNan.ALL)
        elif FUSION == MIN:
            fused = tl.minimum(fused, a, propagate_nan=tl.PropagateNan.ALL)
        elif FUSION == WEIGHTS:
            fused += a * tl.load(head_weights_ptr + layer * stride_weights + head)
        else:
            fused += a

    if GRADIENTS == FUSE_THEN_CLAMP:
        fused = clamp_below(fused)
    if FUSION == MEAN:
        attention = attention / heads.to(tl.float32)
    rows = attention * fused + tl.where(offs_i[:, None] == offs_j[None, :], residual, 0.0)
    return tl.where(mask, rows, 0.0)


@triton.jit
def row_sums(rows, RENORMALIZE: tl.constexpr):
    """Row sums of a block of M, where they are wanted."""
    return sum_columns(rows) if RENORMALIZE else tl.full((rows.shape[0],), 1.0, tl.float32)


@triton.jit
def row_weights(w, sums, RENORMALIZE: tl.constexpr):
    """w / rowsum(M): what each row of M is multiplied by. A row of weight 0 takes no part, whatever its sum."""
    if RENORMALIZE:
        w = w / tl.where(w == 0.0, 1.0, sums)
    return w


@triton.jit
def any_nonzero(w):
    """Whether a block of start weights has work to do; NaN counts as work."""
    return tl.sum((w != 0.0).to(tl.int32), 0) > 0
