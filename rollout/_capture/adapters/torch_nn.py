"""The capture adapter for torch.nn.MultiheadAttention, and for the encoder layer that bypasses it.

The modules run as they always do, fused paths included; their queries and keys are projected a second time, for the
record. So outputs are the same bits.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rollout._capture.calls import unwatched
from rollout._capture.patch import Around, foreign_forward
from rollout._capture.readers import registered
from rollout._capture.recording import Recording, memo, name_of, recordings_of, whole
from rollout.errors import CaptureError
from rollout.tape import Record
from rollout.tape.handed import Handed, Projected

__all__ = ["adapter"]

Forward = Callable[..., Any]

# S of the padded input, while a TransformerEncoder runs its layers on a nested tensor.
_padded_length: ContextVar[int | None] = ContextVar("rollout_padded_length", default=None)
# What a TransformerEncoder or a layer of it attends with, while it runs as one operation.
_inside: ContextVar["_Inside | None"] = ContextVar("rollout_inside", default=None)


def adapter(model: nn.Module) -> dict[nn.Module, Around]:
    """Watches every `MultiheadAttention`, `TransformerEncoderLayer` and `TransformerEncoder` of the model.

    Raises:
        CaptureError: one has settings, or a forward of its own, that cannot be recorded exactly.
    """
    watched: dict[nn.Module, Around] = {}
    crossing = {m.multihead_attn for m in model.modules() if isinstance(m, nn.TransformerDecoderLayer)}
    for path, module in model.named_modules():
        if registered(module) is not None:
            continue
        if isinstance(module, nn.MultiheadAttention):
            if module not in crossing:
                _refuse_settings(module, f"{type(module).__name__} at {path or 'the root'}")
            watched[module] = _through_crossing if module in crossing else _through_attention
        elif _is_stock(module, nn.TransformerEncoderLayer) and _is_stock(module.self_attn, nn.MultiheadAttention):
            watched[module] = _through_layer
        elif _is_stock(module, nn.TransformerEncoder) and all(
            _is_stock(layer, nn.TransformerEncoderLayer) for layer in module.layers
        ):
            watched[module] = _through_encoder
    return watched


def _is_stock(module: Any, kind: type[nn.Module]) -> bool:
    """Whether the module runs the forward of torch's own kind."""
    return (
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and foreign_forward(module) is None
        and registered(module) is None
    )


def _refuse_settings(module: nn.MultiheadAttention, where: str) -> None:
    if type(module).forward is not nn.MultiheadAttention.forward or foreign_forward(module) is not None:
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


class _Inside:
    """An encoder or a layer of one that runs as one operation: the records of its layers, in order."""

    def __init__(self) -> None:
        self.made: list[tuple[nn.MultiheadAttention, Record | None, Handed | None]] = []


def _through_attention(module: nn.Module, call: Forward, *args: Any, **kwargs: Any) -> Any:
    return _attend(module, call, args, kwargs, crossing=False)


def _through_crossing(module: nn.Module, call: Forward, *args: Any, **kwargs: Any) -> Any:
    """The attention of a decoder layer over its memory."""
    return _attend(module, call, args, kwargs, crossing=True)


def _attend(module: nn.Module, call: Forward, args: Any, kwargs: Any, crossing: bool) -> Any:
    assert isinstance(module, nn.MultiheadAttention)
    with whole(module, args, kwargs) as found:
        output = call(*args, **kwargs)
        inside = _inside.get()
        if inside is not None:
            if found:
                inside.made.append(
                    (module, _record_of(module, *args, **kwargs), _handed(module, output[0], args, kwargs))
                )
            return output
        states = [_by_position(module, state) for state in _call(*args, **kwargs)] if found else []
        result = _by_position(module, output[0])
    for recording in found:
        recording.attended(
            module,
            states,
            result,
            partial(_record_crossing if crossing else _record_of, module, *args, **kwargs),
            crossing=crossing,
            handed=_handed(module, output[0], args, kwargs),
        )
        recording.give(output)
    return output


def _handed(module: nn.MultiheadAttention, output: Tensor | None, args: Any, kwargs: Any) -> Handed:
    """What a module handed on: its output is that of its heads, times W_O."""

    def by_heads(gradient: Tensor) -> Tensor:
        return _heads(module, _by_position(module, gradient).squeeze(1) @ module.out_proj.weight)

    def values() -> Tensor:
        at, bias = 2 * module.embed_dim, module.in_proj_bias
        state = _by_position(module, _call(*args, **kwargs)[2]).squeeze(1)
        return _heads(module, functional.linear(state, module.in_proj_weight[at:], None if bias is None else bias[at:]))

    def weights() -> Tensor:
        return module.out_proj.weight.detach().mT.unflatten(0, (module.num_heads, module.head_dim))

    nested = output is not None and output.is_nested
    queries = None if nested else _call(*args, **kwargs)[0]
    return Handed(output, by_heads, values, queries, Projected(weights, seq_first=not module.batch_first))


def _heads(module: nn.MultiheadAttention, state: Tensor) -> Tensor:
    """[B, S, E] by heads, [B, H, S, D]."""
    return state.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2)


def _by_position(module: nn.MultiheadAttention, state: Tensor) -> Tensor:
    """A state that a module is called with, as [B, 1, S, E]."""
    if state.is_nested:
        state = _padded(state)[0]
    elif state.dim() == 2:
        state = state.unsqueeze(0)
    elif not module.batch_first:
        state = state.transpose(0, 1)
    return state.unsqueeze(1)


def _call(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """What a `MultiheadAttention` is called with, however it is passed."""
    return query, key, value


def _through_layer(module: nn.Module, call: Forward, *args: Any, **kwargs: Any) -> Any:
    """An encoder layer; its fused path does not call its MultiheadAttention."""
    assert isinstance(module, nn.TransformerEncoderLayer)
    inside = _inside.get()
    if inside is not None:
        return _run_layer(module, inside, recordings_of(module), call, args, kwargs)
    with whole(module, args, kwargs) as found, _running_inside() as inside:
        output = _run_layer(module, inside, found, call, args, kwargs)
    _tell(found, module.self_attn, inside, _source(*args, **kwargs), output)
    return output


def _run_layer(
    layer: nn.TransformerEncoderLayer, inside: _Inside, found: list[Recording], call: Forward, args: Any, kwargs: Any
) -> Any:
    """What a layer gives; what its attention did is noted."""
    ran = len(inside.made)
    output = call(*args, **kwargs)
    if not found:
        return output
    if len(inside.made) == ran:
        inside.made.append((layer.self_attn, _record_fused_layer(layer, *args, **kwargs), None))
    if any(recording.values for recording in found) and _adds_to_source(layer):
        module, entry, handed = inside.made[-1]
        inside.made[-1] = (module, entry, _added(layer, handed, _source(*args, **kwargs)))
    return output


def _adds_to_source(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether a layer adds to what it is called with what its attention gives, and nobody stands in between."""
    own = type(layer)._sa_block is nn.TransformerEncoderLayer._sa_block
    hooks = layer.self_attn._forward_hooks or layer.dropout1._forward_hooks or layer.dropout1._forward_pre_hooks
    return own and type(layer.dropout1) is nn.Dropout and foreign_forward(layer.dropout1) is None and not hooks


def _added(layer: nn.TransformerEncoderLayer, handed: Handed | None, src: Tensor) -> Handed:
    """What a layer's attention handed on, and what that was added to: the output itself where it ran fused."""
    with torch.no_grad():
        state = _by_position(layer.self_attn, src).squeeze(1)
        if handed is None:
            hidden = layer.norm1(state) if layer.norm_first else state
            handed = _handed(layer.self_attn, None, (hidden, hidden, hidden), {})
    assert handed.projected is not None
    return replace(handed, projected=replace(handed.projected, inputs=lambda: state))


def _through_encoder(module: nn.Module, call: Forward, src: Tensor, *args: Any, **kwargs: Any) -> Any:
    """An encoder; it may hand its layers a nested tensor in place of a padding mask."""
    assert isinstance(module, nn.TransformerEncoder)
    length = src.shape[1] if isinstance(src, Tensor) and not src.is_nested and src.dim() == 3 else None
    outer = _padded_length.set(length)
    try:
        with whole(module, src) as found, _running_inside() as inside:
            output = call(src, *args, **kwargs)
    finally:
        _padded_length.reset(outer)
    _tell(found, module.layers[0].self_attn, inside, src, output)
    return output


def _source(src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return src


@contextmanager
def _running_inside() -> Iterator[_Inside]:
    token = _inside.set(_Inside())
    try:
        inside = _inside.get()
        assert inside is not None
        yield inside
    finally:
        _inside.reset(token)


def _tell(found: list[Recording], first: nn.MultiheadAttention, inside: _Inside, src: Tensor, output: Tensor) -> None:
    """Tell the captures of the layers that ran as one operation, between what went in and what came out."""
    with unwatched():
        states = [_by_position(first, src)] * 3
        result = None if output.is_nested else _by_position(first, output)
    for recording in found:
        for at, (module, entry, handed) in enumerate(inside.made):
            given = result if at == len(inside.made) - 1 else None
            recording.attended(module, states, given, partial(_given, entry), standing=at > 0, handed=handed)


def _given(entry: Record | None) -> Record | None:
    return entry


def _record_fused_layer(
    layer: nn.TransformerEncoderLayer,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Record:
    """What `torch._transformer_encoder_layer_fwd` attended with.

    It applies the masks, ignores `is_causal`, and takes any number but 0 in a floating-point mask for −inf.
    """
    padding, mask = (None if m is None else m.bool() for m in (src_key_padding_mask, src_mask))
    with torch.no_grad():
        if src.is_nested:
            src, padding = _padded(src)
        hidden = layer.norm1(src) if layer.norm_first else src
        return _record_of(layer.self_attn, hidden, hidden, hidden, key_padding_mask=padding, attn_mask=mask)


def _padded(nested: Tensor) -> tuple[Tensor, Tensor]:
    """A nested [B, *, E] as [B, S, E], and True [B, S] on the padding."""
    lengths = torch.tensor([part.shape[0] for part in nested.unbind()], device=nested.device)
    seq = _padded_length.get() or int(lengths.max())
    dense = nested.to_padded_tensor(0.0, (len(lengths), seq, nested.size(-1)))
    return dense, torch.arange(seq, device=dense.device) >= lengths[:, None]


def _record_crossing(module: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> Record:
    _refuse_settings(module, name_of(module))
    return _record_of(module, *args, **kwargs)


def _record_of(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Record:
    if module.training and module.dropout > 0.0:
        raise CaptureError(f"capture: dropout {module.dropout} is on in {name_of(module)}: call model.eval()")
    with torch.no_grad():
        same = query is key
        query, key_padding_mask = _dense(module, query, key_padding_mask)
        key = query if same else _dense(module, key, None)[0]
        queries, keys = _project(module, query, key)
        masks = _padding(key_padding_mask, queries) | _attention_mask(module, attn_mask, is_causal, queries)
        return Record(queries=queries, keys=keys, **_merge(masks))


def _dense(module: nn.MultiheadAttention, state: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A state as [B, S, E], and its padding [B, S]."""
    if state.is_nested:
        return _padded(state)
    if state.dim() == 2:
        return state.unsqueeze(0), None if padding is None else padding.unsqueeze(0)
    return state if module.batch_first else state.transpose(0, 1), padding


def _project(module: nn.MultiheadAttention, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, H, S, D]; of one state views of one [B, S, 2·E]."""
    width, bias = module.embed_dim, module.in_proj_bias
    if query is key:
        both = functional.linear(query, module.in_proj_weight[: 2 * width], None if bias is None else bias[: 2 * width])
        parts = [both[..., :width], both[..., width:]]
    else:
        parts = [
            functional.linear(state, module.in_proj_weight[at], None if bias is None else bias[at])
            for state, at in ((query, slice(width)), (key, slice(width, 2 * width)))
        ]
    first, second = (_heads(module, part) for part in parts)
    return first, second


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
