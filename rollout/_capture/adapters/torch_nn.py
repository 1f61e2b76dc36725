"""The capture adapter for torch.nn.MultiheadAttention, and for the encoder layer that bypasses it.

The modules run as they always do, fused paths included; their queries and keys are projected a second time, for the
record. So outputs are the same bits.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rollout._capture.patch import Around, around_forward
from rollout._capture.recording import is_recording, memo, name_of, record, registered
from rollout.errors import CaptureError
from rollout.tape import Record

__all__ = ["adapter"]

Forward = Callable[..., Any]

# S of the padded input, while a TransformerEncoder runs its layers on a nested tensor.
_padded_length: ContextVar[int | None] = ContextVar("rollout_padded_length", default=None)
# The MultiheadAttention modules that have run inside the encoder layer that is running.
_ran: ContextVar[set[nn.Module] | None] = ContextVar("rollout_ran", default=None)


def adapter(model: nn.Module) -> AbstractContextManager[None] | None:
    """Watches every `MultiheadAttention`, `TransformerEncoderLayer` and `TransformerEncoder` of the model.

    Raises:
        CaptureError: one has settings, or a forward of its own, that cannot be recorded exactly.
    """
    watched: dict[nn.Module, Around] = {}
    attends = False
    crossing = {m.multihead_attn for m in model.modules() if isinstance(m, nn.TransformerDecoderLayer)}
    for path, module in model.named_modules():
        if registered(module) is not None:
            continue
        if isinstance(module, nn.MultiheadAttention) and module not in crossing:
            _refuse_settings(module, path)
            watched[module], attends = _through_attention, True
        elif isinstance(module, nn.TransformerEncoderLayer):
            watched[module] = _through_layer
        elif isinstance(module, nn.TransformerEncoder):
            watched[module] = _through_encoder
    return around_forward(watched) if attends else None


def _refuse_settings(module: nn.MultiheadAttention, path: str) -> None:
    where = f"{type(module).__name__} at {path or 'the root'}"
    if type(module).forward is not nn.MultiheadAttention.forward:
        raise CaptureError(
            f"capture: {where} must run torch.nn.MultiheadAttention's forward, it has its own (quantised ones have): "
            f"give rollout.register_capture a function for {type(module).__name__}"
        )
    if module.bias_k is not None:
        raise CaptureError(f"capture: {where} must not have bias_k (add_bias_kv=True): it attends to S + 1 keys")
    if module.add_zero_attn:
        raise CaptureError(f"capture: {where} must not have add_zero_attn=True: it attends to S + 1 keys")
    if not module._qkv_same_embed_dim:
        raise CaptureError(
            f"capture: {where} must have kdim and vdim equal to embed_dim, got kdim={module.kdim}, "
            f"vdim={module.vdim}, embed_dim={module.embed_dim}: its keys are not those of its queries' sequence"
        )


def _through_attention(module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    assert isinstance(module, nn.MultiheadAttention)
    output = forward(*args, **kwargs)
    if is_recording(module):
        _record_attention(module, *args, **kwargs)
        ran = _ran.get()
        if ran is not None:
            ran.add(module)
    return output


def _through_layer(module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """An encoder layer; its fused path does not call its MultiheadAttention."""
    assert isinstance(module, nn.TransformerEncoderLayer)
    if not is_recording(module):
        return forward(*args, **kwargs)
    outer, ran = _ran.get(), set[nn.Module]()
    _ran.set(ran)
    try:
        output = forward(*args, **kwargs)
    finally:
        _ran.set(outer)
    if module.self_attn not in ran:
        if type(module).forward is not nn.TransformerEncoderLayer.forward:
            raise CaptureError(f"capture: {name_of(module)} has a forward of its own and did not run its self_attn")
        _record_fused_layer(module, *args, **kwargs)
    return output


def _through_encoder(module: nn.Module, forward: Forward, src: Tensor, *args: Any, **kwargs: Any) -> Any:
    """An encoder; it may hand its layers a nested tensor in place of a padding mask."""
    assert isinstance(module, nn.TransformerEncoder)
    outer = _padded_length.get()
    _padded_length.set(src.shape[1] if isinstance(src, Tensor) and not src.is_nested and src.dim() == 3 else None)
    try:
        return forward(src, *args, **kwargs)
    finally:
        _padded_length.set(outer)


def _record_fused_layer(
    layer: nn.TransformerEncoderLayer,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> None:
    """What `torch._transformer_encoder_layer_fwd` attended with.

    It applies the masks, ignores `is_causal`, and takes any number but 0 in a floating-point mask for −inf.
    """
    padding, mask = (None if m is None else m.bool() for m in (src_key_padding_mask, src_mask))
    with torch.no_grad():
        if src.is_nested:
            src, padding = _padded(src)
        hidden = layer.norm1(src) if layer.norm_first else src
        _record_attention(layer.self_attn, hidden, hidden, hidden, key_padding_mask=padding, attn_mask=mask)


def _padded(nested: Tensor) -> tuple[Tensor, Tensor]:
    """A nested [B, *, E] as [B, S, E], and True [B, S] on the padding."""
    lengths = torch.tensor([part.shape[0] for part in nested.unbind()], device=nested.device)
    seq = _padded_length.get() or int(lengths.max())
    dense = nested.to_padded_tensor(0.0, (len(lengths), seq, nested.size(-1)))
    return dense, torch.arange(seq, device=dense.device) >= lengths[:, None]


def _record_attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> None:
    if module.training and module.dropout > 0.0:
        raise CaptureError(f"capture: dropout {module.dropout} is on in {name_of(module)}: call model.eval()")
    if query is not key:
        raise CaptureError(
            f"capture: {name_of(module)} must be called with its query as key, the same tensor: cross-attention is no "
            f"layer of a stream; capture the part of the model that attends over one sequence, e.g. its encoder, or "
            f"give rollout.register_capture a function"
        )
    with torch.no_grad():
        if query.is_nested:
            query, key_padding_mask = _padded(query)
        if query.dim() == 2:
            query = query.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not module.batch_first:
            query = query.transpose(0, 1)
        queries, keys = _project(module, query)
        masks = _padding(key_padding_mask, queries) | _attention_mask(module, attn_mask, is_causal, queries)
        record(module, Record(queries=queries, keys=keys, **_merge(masks)))


def _project(module: nn.MultiheadAttention, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, H, S, D], views of one [B, S, 2·E]."""
    width, bias = 2 * module.embed_dim, module.in_proj_bias
    both = functional.linear(hidden, module.in_proj_weight[:width], None if bias is None else bias[:width])
    parts = both.unflatten(-1, (2, module.num_heads, module.head_dim))
    return parts[:, :, 0].transpose(1, 2), parts[:, :, 1].transpose(1, 2)


def _padding(mask: Tensor | None, queries: Tensor) -> dict[str, Any]:
    """`key_padding_mask` [B, S], True or −inf = ignored, as a key mask when it is one, else as a bias."""
    if mask is None:
        return {}
    if mask.dtype == torch.bool:
        return {"key_mask": ~mask}
    attended = memo(mask, "padding", lambda: _attended(mask))
    return {"padding_bias": mask[:, None, None]} if attended is None else {"key_mask": attended}


def _attention_mask(
    module: nn.MultiheadAttention, mask: Tensor | None, is_causal: bool, queries: Tensor
) -> dict[str, Any]:
    """`attn_mask` [S, S] or [B·H, S, S] as `causal` when it is that, else as a bias."""
    if mask is None:
        return {}
    causal = memo(mask, "causal", lambda: mask.dim() == 2 and _is_causal(mask))
    if is_causal and not causal:
        raise CaptureError(
            f"capture: {name_of(module)} was called with is_causal=True and an attn_mask that is not causal; torch "
            f"uses one or the other, as it pleases: leave is_causal out"
        )
    if causal:
        return {"causal": True}
    bias = memo(mask, "bias", lambda: _additive(mask, queries.dtype))
    return {"bias": bias if mask.dim() == 2 else bias.unflatten(0, queries.shape[:2])}


def _merge(masks: dict[str, Any]) -> dict[str, Any]:
    padding, bias = masks.pop("padding_bias", None), masks.get("bias")
    if padding is not None:
        masks["bias"] = padding if bias is None else bias + padding
    return masks


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _attended(mask: Tensor) -> Tensor | None:
    """Where an additive mask of zeros and −inf is 0; None when it has other values."""
    attended = mask == 0
    return attended if bool((attended | (mask == -math.inf)).all()) else None


def _is_causal(mask: Tensor) -> bool:
    ahead = torch.ones(mask.shape, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, ahead)
    attended = _attended(mask)
    return attended is not None and torch.equal(attended, ~ahead)
