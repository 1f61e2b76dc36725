"""The log-sum-exp of every row of scores, every layer in one launch."""

import triton
import triton.language as tl

from rollout_kernels._triton.launch import ScoresLaunch
from rollout_kernels._triton.qk_inputs import QKInputs
from rollout_kernels._triton.qk_tile import LOG2_E, add_bias, cap, head_matrix, load_parts, multiply


@triton.jit(do_not_specialize=["L", "B", "H", "S", "group", "left", "right"])
def logsumexp_kernel(
    # pointers
    queries_ptr,  # int64 [L, 4]: address, strides of batch, head and row of [B, H, S, D]
    keys_ptr,  # int64 [L, 4]: the same of [B, H_kv, S, D]
    lengths_ptr,  # int64 [B]
    key_valid_ptr,  # uint8 [B, S]
    bias_ptr,  # int64 [L, 5]: address or 0, strides of batch, head, row and column of [B, H, S, S]
    slopes_ptr,  # float32 [L, H]
    sinks_ptr,  # float32 [L, H] when HAS_SINKS, in the base of the scores
    start_ptr,  # int64 [B] when ONE_HOT
    lse_ptr,  # float32 [L, B, H, S], or [2, L, B, H, S]
    # sizes
    L, B, H, S, group, scale, left, right,
    # flags
    HAS_BIAS: tl.constexpr, BIAS_DTYPE: tl.constexpr, BIAS_UNIT: tl.constexpr, HAS_SLOPES: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    ONE_HOT: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    DTYPE: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    # blocks
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """This program computes log2 Σ_j 2^score for BLOCK_M rows of one head, −inf for a row with no key allowed.

    With a bias scores are in base e, and it gives their maximum, −inf for such a row, and log2 Σ_j e^(score − maximum).
    A sink is one more score of the sum.
    """
    blocks = tl.cdiv(S, BLOCK_M)
    pid = tl.program_id(0)
    block = pid % blocks
    head = pid // blocks % H
    sample = pid // blocks // H % B
    layer = pid // blocks // H // B
    # As in `columns_kernel`.
    HALVES: tl.constexpr = DTYPE == tl.float32 and D > 64  # noqa: SIM300

    n = S
    if HAS_LENGTHS:
        n = tl.load(lengths_ptr + sample).to(tl.int32)
    start = block * BLOCK_M
    wanted = start < n
    if ONE_HOT:  # the top layer needs the start row alone
        row = tl.load(start_ptr + sample).to(tl.int32)
        wanted = wanted & ((layer < L - 1) | (row // BLOCK_M == block))

    if wanted:
        offs_i = start + tl.arange(0, BLOCK_M)
        q_matrix, stride_q = head_matrix(queries_ptr, layer, sample, head, DTYPE, VEC, ALIGNED)
        k_matrix, stride_k = head_matrix(keys_ptr, layer, sample, head // group, DTYPE, VEC, ALIGNED)
        key_valid_ptr += sample.to(tl.int64) * S
        q, q_rest = load_parts(q_matrix, stride_q, offs_i, n, D, UPCAST, HALVES)

        # Of the keys low … high, whole blocks between inner and outer are allowed for every row of this block.
        low = 0
        high = n
        inner = 0
        outer = n - BLOCK_N + 1
        if HAS_LEFT:
            low = tl.maximum(start - left, 0) // BLOCK_N * BLOCK_N
            inner = start + BLOCK_M - 1 - left
        if HAS_RIGHT:
            high = tl.minimum(start + BLOCK_M + right, n)
            outer = tl.minimum(start + right, n - 1) - BLOCK_N + 2
        if HAS_KEY_MASK:
            outer = 0

        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + layer * H + head)
            top = tl.full((BLOCK_M,), 0.0, tl.float32) + sink
            total = tl.where(top == float("-inf"), 0.0, 1.0)
        for first in range(low, high, BLOCK_N):
            offs_j = first + tl.arange(0, BLOCK_N)
            k, k_rest = load_parts(k_matrix, stride_k, offs_j, n, D, UPCAST, HALVES)
            scores = cap(multiply(q, q_rest, k, k_rest, PRECISION, HALVES) * scale, SOFTCAP)
            scores = add_bias(
                scores, bias_ptr, slopes_ptr, layer, sample, head, H, offs_i[:, None], offs_j[None, :], n,
                HAS_BIAS, BIAS_DTYPE, BIAS_UNIT, HAS_SLOPES,
            )  # fmt: skip
            if (first < inner) | (first >= outer):
                allowed = offs_j < n
                if HAS_KEY_MASK:
                    allowed = tl.load(key_valid_ptr + offs_j, mask=offs_j < n, other=0) != 0
                scores = tl.where(allowed[None, :], scores, float("-inf"))
                after = offs_j[None, :] - offs_i[:, None]
                if HAS_LEFT:
                    scores = tl.where(after >= -left, scores, float("-inf"))
                if HAS_RIGHT:
                    scores = tl.where(after <= right, scores, float("-inf"))

            highest = tl.maximum(top, tl.max(scores, 1))
            shift = tl.where(highest == float("-inf"), 0.0, highest)
            before = top - shift
            entries = scores - shift[:, None]
            if HAS_BIAS:
                before = before * LOG2_E
                entries = entries * LOG2_E
            total = total * tl.exp2(before) + tl.sum(tl.exp2(entries), 1)
            top = highest

        rest = tl.log2(tl.where(total == 0.0, 1.0, total))
        rows = lse_ptr + ((layer.to(tl.int64) * B + sample) * H + head) * S + offs_i
        if HAS_BIAS:
            tl.store(rows, top, mask=offs_i < n)
            tl.store(rows + L.to(tl.int64) * B * H * S, rest, mask=offs_i < n)
        else:
            tl.store(rows, tl.where(total == 0.0, float("-inf"), top + rest), mask=offs_i < n)


def logsumexp(inputs: QKInputs, launch: ScoresLaunch) -> None:
    """Fills `inputs.lse`, as `logsumexp_kernel` says, on the rows that the chain reads: valid ones, and of the top
    layer only the block of a one-hot start row. Not yet run on a GPU.
    """
    assert inputs.lse is not None
    layers, batch, heads, seq = inputs.lse.shape[-4:]
    grid = (layers * batch * heads * -(-seq // launch.block_m),)
    logsumexp_kernel[grid](
        *inputs.score_pointers, inputs.lse if inputs.sinks is None else inputs.sinks, inputs.start, inputs.lse,
        *inputs.score_scalars, **inputs.score_flags, ONE_HOT=inputs.one_hot,
        PRECISION="ieee" if inputs.exact else launch.precision, **launch.blocks, **launch.options,
    )  # fmt: skip
