"""Device code shared by the kernels that read maps: one block of rows of M_l, fused over heads on chip."""

import triton
import triton.language as tl

MEAN = tl.constexpr(0)
MAX = tl.constexpr(1)
MIN = tl.constexpr(2)
WEIGHTS = tl.constexpr(3)

NO_GRADIENTS = tl.constexpr(0)
CLAMP_THEN_FUSE = tl.constexpr(1)
FUSE_THEN_CLAMP = tl.constexpr(2)


@triton.jit
def clamp_below(x):
    """max(x, 0), NaN kept."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def block_pointers(
    table_ptr,  # int64 [L, 6]: address, strides of batch, head, row and column, heads
    layer, sample, offs_i, offs_j,
    DTYPE: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr, UNIT_COLUMN: tl.constexpr,
):  # fmt: skip
    """Pointers [BI, SP] to head 0 of rows `offs_i` of one map, the head stride, the number of heads."""
    row = table_ptr + layer * 6
    base = tl.load(row).to(tl.pointer_type(DTYPE))
    # A loaded address says nothing of its alignment: without the hint every load is scalar.
    if ALIGNED:
        base = tl.multiple_of(base, 16)

    # Strides come in units of VEC, so that the compiler sees they keep the alignment.
    stride_batch = tl.load(row + 1) * VEC
    stride_head = tl.load(row + 2) * VEC
    stride_row = tl.load(row + 3) * VEC
    columns = offs_j.to(tl.int64)
    if not UNIT_COLUMN:
        columns = columns * tl.load(row + 4)
    heads = tl.load(row + 5).to(tl.int32)

    pointers = base + sample.to(tl.int64) * stride_batch + offs_i.to(tl.int64)[:, None] * stride_row + columns[None, :]
    return pointers, stride_head, heads


@triton.jit
def layer_rows(
    maps_ptr, grads_ptr,  # int64 [L, 6], see `block_pointers`
    head_weights_ptr,  # float32 [L, H]
    layer, sample, offs_i, offs_j, n, stride_weights,
    residual, attention,
    FUSION: tl.constexpr, GRADIENTS: tl.constexpr,
    DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
    UNIT_COLUMN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows `offs_i` of residual·I + attention·F_l for one sample: float32 [BI, SP], 0 beyond its n×n block."""
    pointers, stride_head, heads = block_pointers(
        maps_ptr, layer, sample, offs_i, offs_j, DTYPE, VEC, ALIGNED, UNIT_COLUMN
    )
    grad_pointers = pointers
    grad_stride_head = stride_head
    if GRADIENTS != NO_GRADIENTS:
        grad_pointers, grad_stride_head, _ = block_pointers(
            grads_ptr, layer, sample, offs_i, offs_j, GRAD_DTYPE, VEC, ALIGNED, UNIT_COLUMN
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
        a = tl.load(pointers + head * stride_head, mask=mask_load, other=0.0, eviction_policy="evict_first")
        a = a.to(tl.float32)
        if GRADIENTS != NO_GRADIENTS:
            g = tl.load(
                grad_pointers + head * grad_stride_head, mask=mask_load, other=0.0, eviction_policy="evict_first"
            )
            a = a * g.to(tl.float32)
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
    return tl.sum(rows, 1) if RENORMALIZE else tl.full((rows.shape[0],), 1.0, tl.float32)


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
