"""Rows from maps, few or long samples: every layer's rows split over programs, dependencies per sample.

One launch serves all layers. A program takes a ticket from a counter; tickets are numbered step-major (step 0 is the
top layer), so a program only ever waits for lower tickets, which running programs hold: no order of starting
programs can deadlock, and programs need not be resident together.

A step of a chain (one start row of one sample) has up to PARTS parts. Each writes its partial sum and adds 1 to
`ready[step, chain]`; the one that arrives last adds the partials in order, writes w to `out`, and adds SUMMED, which
the parts of the next step wait for. Those write no partial and no w before they have seen it, so one buffer of each is
enough.
"""

import torch
import triton
import triton.language as tl

from rollout_kernels._triton.inputs import MapInputs
from rollout_kernels._triton.launch import RowsLaunch
from rollout_kernels._triton.layer import any_nonzero, layer_rows, row_weights, sum_rows
from rollout_kernels._triton.run import run
from rollout_kernels._triton.tickets import arrive, wait_for

SUMMED = tl.constexpr(1 << 16)  # more than any number of parts


@triton.jit
def load_w(
    start_ptr,  # float32 [S]: the chain's weighting, unless ONE_HOT
    w_ptr,  # float32 [S]: what the step before wrote
    offs_i, n, step,
    ONE_HOT: tl.constexpr,
):  # fmt: skip
    """w at rows `offs_i` as this step finds it. `.cg`: the first-level cache may hold an older step's w."""
    if ONE_HOT:
        return tl.load(w_ptr + offs_i, mask=offs_i < n, other=0.0, cache_modifier=".cg")
    else:
        source = start_ptr if step == 0 else w_ptr
        return tl.load(source + offs_i, mask=offs_i < n, other=0.0, cache_modifier=".cg")


@triton.jit(
    do_not_specialize=["L", "R", "S", "stride_weights", "chains"],
    do_not_specialize_on_alignment=["start_ptr", "lengths_ptr"],
)
def rows_split_kernel(
    # pointers
    maps_ptr,  # int64 [L, 6]: address, strides of batch, head, row and column, heads
    grads_ptr,  # int64 [L, 6]
    head_weights_ptr,  # float32 [L, H]
    start_ptr,  # int64 [B] when ONE_HOT, else float32 [B, R, S]
    lengths_ptr,  # int64 [B]
    out_ptr,  # float32 [B, R, S]: w of the last step done, and so the result
    partials_ptr,  # float32 [chains, PARTS, SP], chains = B·R
    ready_ptr,  # int32 [L, chains], zeros
    ticket_ptr,  # int32 [1], zero
    # sizes, strides, weights
    L, R, S, stride_weights, residual, attention, chains,
    # flags
    ONE_HOT: tl.constexpr, HAS_LENGTHS: tl.constexpr, RENORMALIZE: tl.constexpr,
    FUSION: tl.constexpr, GRADIENTS: tl.constexpr, DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr,
    VEC: tl.constexpr, PAIRS: tl.constexpr, UNIT_COLUMN: tl.constexpr,
    # blocks
    BLOCK_I: tl.constexpr, SP: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """This program computes one part of w·M_l for one chain: the row blocks part, part + PARTS, … of layer L−1−step."""
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    if ONE_HOT:  # step 0 is one row and has one part: its `chains` tickets come first
        is_top = ticket < chains
        later = tl.maximum(ticket - chains, 0)
        step = tl.where(is_top, 0, 1 + later // (chains * PARTS))
        chain = tl.where(is_top, ticket, later // PARTS % chains)
        part = tl.where(is_top, 0, later % PARTS)
    else:
        is_top = ticket < 0
        step = ticket // (chains * PARTS)
        chain = ticket // PARTS % chains
        part = ticket % PARTS
    layer = L - 1 - step
    sample = chain // R

    offs_j = tl.arange(0, SP)
    n = S
    if HAS_LENGTHS:
        n = tl.load(lengths_ptr + sample).to(tl.int32)
    blocks = tl.cdiv(n, BLOCK_I)
    parts = tl.where(is_top, 1, tl.minimum(blocks, PARTS))

    start_ptr += chain.to(tl.int64) * S if not ONE_HOT else chain
    out_ptr += chain.to(tl.int64) * S
    partials_ptr += chain.to(tl.int64) * (PARTS * SP)
    ready_ptr += step.to(tl.int64) * chains + chain

    if part < parts:
        if is_top:
            offs_start = tl.load(start_ptr).to(tl.int32) + tl.arange(0, 1)
            row = layer_rows(
                maps_ptr, grads_ptr, head_weights_ptr, layer, sample, offs_start, offs_j, n, stride_weights,
                residual, attention,
                FUSION, GRADIENTS, DTYPE, GRAD_DTYPE, VEC, PAIRS, UNIT_COLUMN, STAGES,
            )  # fmt: skip
            total = tl.sum(row * row_weights(row, tl.full((1,), 1.0, tl.float32), RENORMALIZE)[:, None], 0)
        else:
            acc = tl.zeros((BLOCK_I, SP), tl.float32)
            for block in range(part, blocks, PARTS):
                offs_i = block * BLOCK_I + tl.arange(0, BLOCK_I)
                work = block == part
                if block > part:
                    work = any_nonzero(load_w(start_ptr, out_ptr, offs_i, n, step, ONE_HOT))
                if work:
                    rows = layer_rows(
                        maps_ptr, grads_ptr, head_weights_ptr, layer, sample, offs_i, offs_j, n, stride_weights,
                        residual, attention,
                        FUSION, GRADIENTS, DTYPE, GRAD_DTYPE, VEC, PAIRS, UNIT_COLUMN, STAGES,
                    )  # fmt: skip
                    # Maps do not depend on w: a part waits only once its first block is on chip.
                    if block == part and step > 0:
                        wait_for(ready_ptr - chains, SUMMED)
                    w_i = load_w(start_ptr, out_ptr, offs_i, n, step, ONE_HOT)
                    if any_nonzero(w_i):
                        acc += rows * row_weights(rows, w_i, RENORMALIZE)[:, None]
            total = sum_rows(acc)

        tl.store(partials_ptr + part * SP + offs_j, total, mask=offs_j < n)
        if arrive(ready_ptr, 1) == parts - 1:
            w = tl.zeros((SP,), tl.float32)
            for other in range(parts):
                w += tl.load(partials_ptr + other * SP + offs_j, mask=offs_j < n, other=0.0, cache_modifier=".cg")
            tl.store(out_ptr + offs_j, w, mask=offs_j < S)
            arrive(ready_ptr, SUMMED)


def rows_split(inputs: MapInputs, launch: RowsLaunch) -> None:
    """Fills `inputs.out` [B, R, S] with `launch.parts` programs per chain and layer (one for a free top layer).

    Scratch: float32 [B·R, PARTS, SP] partial sums and int32 [L, B·R] counters. The wait between programs is
    checked by the interpreter only in ticket order, one program after another. Not yet run on a GPU.
    """
    batch, starts, _ = inputs.out.shape
    chains, layers = batch * starts, inputs.layers
    tickets = chains * launch.parts * layers
    if inputs.weights is None:
        tickets -= chains * (launch.parts - 1)
    device = inputs.out.device
    partials = torch.empty(chains * launch.parts * launch.padded, dtype=torch.float32, device=device)
    ticket, ready = inputs.counters(layers * chains)
    run(
        rows_split_kernel, tickets,
        (*inputs.pointers, inputs.out, partials, ready, ticket, *inputs.scalars, chains), (inputs.key, launch),
        lambda: {**inputs.flags, **launch.blocks, **launch.options},
    )  # fmt: skip
