"""The capture adapter for timm's `Attention` (its ViT, DeiT and their kin).

The modules run as they always do, fused or not; queries and keys are projected a second time, for the record.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from timm.layers import attention as timm_attention
from torch import Tensor, nn
from torch.nn import functional

from rollout._capture.masks import structure
from rollout._capture.patch import around_forward
from rollout._capture.recording import is_recording, record, registered
from rollout.tape import Record

__all__ = ["adapter"]

Attention = timm_attention.Attention


def adapter(model: nn.Module) -> AbstractContextManager[None] | None:
    """Watches every `timm.layers.Attention` that runs timm's own forward."""
    found = [
        module
        for module in model.modules()
        if isinstance(module, Attention) and type(module).forward is Attention.forward and registered(module) is None
    ]
    return around_forward(dict.fromkeys(found, _through_attention)) if found else None


def _through_attention(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    output = forward(*args, **kwargs)
    if is_recording(module):
        with torch.no_grad():
            record(module, _record(module, *args, **kwargs))
    return output


def _record(module: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Record:
    """The mask is that of `scaled_dot_product_attention`: True = may be attended, or additive."""
    width = 2 * module.num_heads * module.head_dim
    if type(module.qkv) is nn.Linear:
        bias = module.qkv.bias
        both = functional.linear(x, module.qkv.weight[:width], None if bias is None else bias[:width])
    else:
        both = module.qkv(x)[..., :width]
    queries, keys = both.unflatten(-1, (2, module.num_heads, module.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    fields: dict[str, Any] = {"causal": is_causal}
    if attn_mask is not None and not is_causal:
        fields = structure(attn_mask[(None,) * (4 - attn_mask.dim())], x.shape[0])
    return Record(queries=module.q_norm(queries), keys=module.k_norm(keys), scale=float(module.scale), **fields)
