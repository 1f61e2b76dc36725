"""Rows from maps, few or long samples: every layer's rows split over programs, dependencies per sample.

One launch serves all layers. A program takes a ticket from a counter; tickets are numbered step-major (step 0 is the
top layer), so a program only ever waits for lower tickets, which running programs hold: no order of starting
programs can deadlock, and programs need not be resident together.

A step of a chain (one start row of one sample) has up to PARTS parts. Each writes its partial sum and adds 1 to
`ready[step, chain]`; each part of the next step waits until all of them have, and adds the partials of its own rows
itself, in order of parts: one wait a step. The last step's last part to arrive adds them all, into `out`.

Two buffers of partials, taken in turn, are enough. A part of step s writes buffer s mod 2 after it has waited for
every part of step s−1; those are the only ones that read what step s−2 left there, and a part arrives after its last
read. So every read of the old partials comes before the first write of the new. One buffer is not: a part of step s
may be done before another has read step s−1.
"""

import torch
import triton
import triton.language as tl

from rollout_kernels._triton.inputs import MapInputs
from rollout_kernels._triton.launch import RowsLaunch
from rollout_kernels._triton.layer import any_nonzero, layer_rows, row_sums, row_weights, sum_rows
from rollout_kernels._triton.run import run
from rollout_kernels._triton.tickets import arrive, wait_for


@triton.jit
def sum_partials(
    partials_ptr,  # float32 [PARTS, SP]: what one step left of one chain
    parts,  # how many of them it wrote
    offs, n,
    PARTS: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """w at columns `offs` as the step left it, 0 from n on, added in order of parts. Up to 8 loads are on their way at
    once, so that a step of short rows waits for memory once or twice; long ones have no registers, and more to do than
    to wait. `.cg`: the first-level cache may hold an older step's partials."""
    AT_ONCE: tl.constexpr = min(PARTS, 8 if SP <= 1024 else 1)
    w = tl.zeros(offs.shape, tl.float32)
    for first in range(0, parts, AT_ONCE):
        for following in tl.static_range(AT_ONCE):
            part = first + following
            mask = offs < tl.where(part < parts, n, 0)
            w += tl.load(partials_ptr + part * SP + offs, mask=mask, other=0.0, cache_modifier=".cg")
    return w


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
    out_ptr,  # float32 [B, R, S]
    partials_ptr,  # float32 [2, chains, PARTS, SP], chains = B·R; step s writes half s mod 2
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
    parts_before = parts  # of the step before
    if ONE_HOT:
        parts_before = tl.where(step == 1, 1, parts)

    # What is read and written only at the end is found only there: there are no registers for it in between.
    start_ptr += chain.to(tl.int64) * S if not ONE_HOT else chain
    half = chains.to(tl.int64) * (PARTS * SP)
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
            one = tl.full((1,), 1.0, tl.float32)
            total = tl.sum(row * row_weights(one, row_sums(row, RENORMALIZE), RENORMALIZE)[:, None], 0)
        else:
            # This part's rows, block after block: local row i is row mine[i] of the map.
            ROWS: tl.constexpr = SP // PARTS if SP > PARTS * BLOCK_I else BLOCK_I
            local = tl.arange(0, ROWS)
            mine = (local // BLOCK_I * PARTS + part) * BLOCK_I + local % BLOCK_I
            w = tl.zeros((ROWS,), tl.float32)
            if not ONE_HOT:  # noqa: SIM102
                if step == 0:  # known at run time, the flag when compiling
                    w = tl.load(start_ptr + mine, mask=mine < n, other=0.0)

            acc = tl.zeros((BLOCK_I, SP), tl.float32)
            for block in range(part, blocks, PARTS):
                offs_i = block * BLOCK_I + tl.arange(0, BLOCK_I)
                offs_w = block // PARTS * BLOCK_I + tl.arange(0, BLOCK_I)
                w_i = tl.gather(w, offs_w, 0)
                unknown = (block == part) & (step > 0)
                if unknown | any_nonzero(w_i):
                    rows = layer_rows(
                        maps_ptr, grads_ptr, head_weights_ptr, layer, sample, offs_i, offs_j, n, stride_weights,
                        residual, attention,
                        FUSION, GRADIENTS, DTYPE, GRAD_DTYPE, VEC, PAIRS, UNIT_COLUMN, STAGES,
                    )  # fmt: skip
                    sums = row_sums(rows, RENORMALIZE)
                    # Maps do not depend on w: a part waits only once its first block and row sums are on chip.
                    if unknown:
                        wait_for(ready_ptr - chains, parts_before)
                        before_ptr = partials_ptr + (1 - step % 2) * half
                        w = sum_partials(before_ptr, parts_before, mine, n, PARTS, SP)
                        w_i = tl.gather(w, offs_w, 0)
                    if any_nonzero(w_i):
                        acc += rows * row_weights(w_i, sums, RENORMALIZE)[:, None]
            total = sum_rows(acc)

        partials_ptr += step % 2 * half
        tl.store(partials_ptr + part * SP + offs_j, total, mask=offs_j < n)
        arrived = arrive(ready_ptr, 1)
        if (step == L - 1) & (arrived == parts - 1):
            w_out = sum_partials(partials_ptr, parts, offs_j, n, PARTS, SP)
            out_ptr += chain.to(tl.int64) * S
            tl.store(out_ptr + offs_j, w_out, mask=offs_j < S)


def rows_split(inputs: MapInputs, launch: RowsLaunch) -> None:
    """Fills `inputs.out` [B, R, S] with `launch.parts` programs per chain and layer (one for a free top layer).

    Scratch: float32 [2, B·R, PARTS, SP] partial sums and int32 [L, B·R] counters. The waits between programs are
    checked under adversarial schedules of the interpreter (tests/kernels/test_triton_schedules.py). Not yet run on a
    GPU.
    """
    batch, starts, _ = inputs.out.shape
    chains, layers = batch * starts, inputs.layers
    tickets = chains * launch.parts * layers
    if inputs.weights is None:
        tickets -= chains * (launch.parts - 1)
    device = inputs.out.device
    partials = torch.empty(2 * chains * launch.parts * launch.padded, dtype=torch.float32, device=device)
    ticket, ready = inputs.counters(layers * chains)
    run(
        rows_split_kernel, tickets,
        (*inputs.pointers, inputs.out, partials, ready, ticket, *inputs.scalars, chains), (inputs.key, launch),
        lambda: {**inputs.flags, **launch.blocks, **launch.options},
    )  # fmt: skip
