"""The functional API: attention rollout from maps, and from queries and keys."""

from collections.abc import Sequence

from torch import Tensor

from rollout.method import get_method
from rollout.stopwatch import timed
from rollout_kernels import Method, ops


@timed("chain")
def attention_rollout(
    attentions: Sequence[Tensor],
    *,
    query: int | Tensor | None = None,
    lengths: Tensor | None = None,
    gradients: Sequence[Tensor] | None = None,
    values: Sequence[Tensor] | None = None,
    output_weights: Sequence[Tensor] | None = None,
    inputs: Sequence[Tensor] | None = None,
    method: str | Method = "rollout",
    backend: str = "auto",
    validate: bool = True,
) -> Tensor:
    """Attention rollout of a batch from its attention maps.

    R = M_L · … · M_1 with M_l = rownorm(α·I + (1−α)·fuse_h A_l)   (method `"rollout"`: α = ½, mean over heads)

    With a `query` only w·R is computed, by the row chain w ← w·M_l from the top layer down: O(S²) a layer, one read of
    the maps, and of the top layer just one row per head when w is one-hot.

    Args:
        attentions: L maps, input side first, each [B, H, S, S] or [B, S, S] (heads fused already), float32, float64,
            bfloat16 or float16, any strides. A[b, h, i, j] is what row (query position) i takes from column (key) j.
        query: which rows of R. `None`: all, [B, S, S]. An int or long [B]: that row of each sample, [B, S]; a negative
            one counts from the sample's own end. Float [B, S] or [B, R, S]: any real weighting over rows, result of
            the same shape; weights on padded rows count as 0.
        lengths: long [B], the valid prefix of each sample, 1..S; default S. What lies beyond it is never read.
        gradients: ∂(target)/∂A, shaped like `attentions`; read by the gradient-weighted methods only.
        values, output_weights, inputs: for the value-aware methods, one tensor a layer. The values v that the maps mix,
            [B, H_v, S, D_v], H a multiple of H_v; the output projection by heads, [H, D_v, E] (of an `nn.Linear` over
            heads side by side `weight.T.reshape(H, D_v, E)`), no bias; what the residual adds, [B, S, E]. Before
            normalisation or after it is the model's: they are measured as they are given.
        method: a name in `rollout.METHODS`, or a `rollout.Method`.
        backend: `"auto"`, `"triton"` (GPU), `"native"` (CPU, rows from maps, where it was compiled), `"torch"`, or
            `"reference"` (the float64 oracle, slow).
        validate: check values too (range of `query` and `lengths`, finiteness of the result). False: no device
            synchronisation; the caller vouches for them.

    Returns:
        float32 (float64 when a map is), on the maps' device: [B, S], [B, R, S] or [B, S, S]. Exactly 0 on padding.
        For a renormalised method, a row of R sums to 1. Never part of an autograd graph.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what came and what is wanted. Also when the
            result is not finite: the message names the layer and sample of the first NaN or Inf in the input.
        rollout_kernels.BackendError: the backend asked for cannot serve the call; every reason is listed.

    Source: Abnar & Zuidema 2020, arXiv:2005.00928, section 3; the other methods' papers are in `rollout.METHODS`.
    """
    return ops.attention_rollout(
        attentions,
        query=query,
        lengths=lengths,
        gradients=gradients,
        values=values,
        output_weights=output_weights,
        inputs=inputs,
        method=get_method(method),
        backend=backend,
        validate=validate,
    )


@timed("chain")
def attention_rollout_qk(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    query: int | Tensor | None = None,
    lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    alibi_slopes: Tensor | Sequence[Tensor | None] | None = None,
    scale: float | None = None,
    logsumexp: Sequence[Tensor] | None = None,
    softcap: float | None = None,
    sinks: Sequence[Tensor] | None = None,
    values: Sequence[Tensor] | None = None,
    output_weights: Sequence[Tensor] | None = None,
    inputs: Sequence[Tensor] | None = None,
    output_gradients: Sequence[Tensor] | None = None,
    method: str | Method = "rollout",
    backend: str = "auto",
    validate: bool = True,
) -> Tensor:
    """Attention rollout of a batch from its queries and keys: no map is ever stored.

    A_l[b, h, i, j] = softmax_j(cap(scale · q_i·k_j) + mask), then as `attention_rollout`. Tiles of the softmax are
    formed, used and dropped, so the row form needs O(B·H·S) memory beyond its inputs.

    Args:
        queries: L tensors [B, H, S, D], input side first.
        keys: L tensors [B, H_kv, S, D]; H a multiple of H_kv (grouped-query attention: head h reads h // (H / H_kv)).
        query, lengths, method, backend, validate: as in `attention_rollout`. A method of supplied matrices is refused;
            one with gradients takes `values` and `output_gradients`.
        key_mask: bool [B, S], True = may be attended; combined with `lengths` by AND.
        query_mask: bool [B, S], False = this row attends nothing, hence is uniform over the keys of its sample.
        causal: row i attends to columns j ≤ i only.
        window: (left, right): row i attends to i − left ≤ j ≤ i + right; None or −1 is unbounded.
        bias: added to the scaled scores, broadcastable to [B, H, S, S]; −inf masks, a finite fill is added as it is.
            One tensor for all layers, or one (or None) per layer.
        alibi_slopes: float [H], one tensor for all layers, or one (or None) per layer: −alibi_slopes[h]·|i − j| is
            added to the scaled scores (Press et al. 2022, arXiv:2108.12409), with no [S, S] bias in memory.
        scale: default D**-0.5.
        logsumexp: L float32 tensors [B, H, S], natural log of Σ_j exp(scale·q·k_j + mask), as fused attention returns
            it; saves a pass. It must belong to the same mask. One row per sample, head and layer is checked, the rest
            trusted: every row is taken to sum to 1.
        softcap: c, bounds the scaled scores before anything is added to them, cap(s) = c·tanh(s/c) (Gemma 2).
        sinks: L tensors [H], the score of one more column in the softmax of each head, which is no key (GPT-OSS): rows
            sum to less than 1, and are divided by their sum as `method` says. Not with `logsumexp`.
        values, output_weights, inputs: as in `attention_rollout`; beside them the row form takes O(B·H·S) for
            `value_norm`, and a tile. A gradient-weighted method takes the first alone.
        output_gradients: L tensors [B, H, S, D_v], ∂y/∂O of what each head's attention gives before W_O, y the target;
            with `values` they make the gradient of every map, ∂y/∂A_hij = ⟨∂y/∂O_hi, v_hj⟩, tile by tile.

    Returns:
        As `attention_rollout`. A row with no key allowed is uniform over the keys of its sample, 1/lengths[b]; with
        sinks it is 0.

    Raises:
        TypeError, ValueError, rollout_kernels.BackendError: as `attention_rollout`; also when `logsumexp` is not that
            of the scores, by the sum of one row of the softmax per sample, head and layer.

    Source: Abnar & Zuidema 2020, arXiv:2005.00928, section 3; the tiled softmax is that of Dao et al. 2022,
    arXiv:2205.14135.
    """
    return ops.attention_rollout_qk(
        queries,
        keys,
        query=query,
        lengths=lengths,
        key_mask=key_mask,
        query_mask=query_mask,
        causal=causal,
        window=window,
        bias=bias,
        alibi_slopes=alibi_slopes,
        scale=scale,
        logsumexp=logsumexp,
        softcap=softcap,
        sinks=sinks,
        values=values,
        output_weights=output_weights,
        inputs=inputs,
        output_gradients=output_gradients,
        method=get_method(method, "attention_rollout_qk"),
        backend=backend,
        validate=validate,
    )
