"""Tiny random models of x-transformers, and what a capture must say of each."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from x_transformers import Decoder, Encoder, TransformerWrapper

from tests.support.capture_family import Family, Maps
from tests.support.cases import generator

B, S = 3, 9
INPUTS = {
    "x": torch.randint(0, 90, (B, S), generator=generator(1)),
    "mask": torch.arange(S) < torch.tensor([9, 5, 2])[:, None],
}


def wrapped(kind: Callable[..., Any], memory: int | None = None, **options: Any) -> Callable[[str], Any]:
    """Makes a model of `kind` layers whose attention is fused or plain."""

    def make(implementation: str) -> Any:
        torch.manual_seed(0)
        layers = kind(dim=32, depth=3, heads=4, attn_dim_head=8, attn_flash=implementation == "fused", **options)
        return TransformerWrapper(num_tokens=99, max_seq_len=32, num_memory_tokens=memory, attn_layers=layers).eval()

    return make


def dropped(model: Any, inputs: dict[str, Tensor], tape: Any) -> Maps:
    """The maps that go through the dropout of each attention, when it is not fused."""
    maps: Maps = {stream: [] for stream in tape.streams}
    for stream in tape.streams:
        for path in tape.modules(stream):
            attend = model.get_submodule(path)
            attend.flash = False
            attend.attn_dropout.register_forward_hook(
                lambda module, args, result, stream=stream: maps[stream].append(copy.copy(result))
            )
    with torch.no_grad():
        model(**inputs)
    return maps


def right(kind: Callable[..., Any], both: bool = True, **options: Any) -> Family:
    return Family(
        wrapped(kind, **options), INPUTS, dropped, implementations=("fused", "plain") if both else ("plain",),
        padding="mask",
    )  # fmt: skip


def refused(kind: Callable[..., Any], message: str, **options: Any) -> Family:
    return Family(wrapped(kind, **options), INPUTS, dropped, message, implementations=("plain",))


X_TRANSFORMERS: dict[str, Family] = {
    "encoder": right(Encoder),
    "decoder": right(Decoder),
    "decoder (RoPE, grouped heads)": right(Decoder, rotary_pos_emb=True, attn_kv_heads=2),
    "decoder (ALiBi)": right(Decoder, alibi_pos_bias=True),
    "encoder (relative bias)": right(Encoder, both=False, rel_pos_bias=True),
    "decoder (QK norm)": right(Decoder, attn_qk_norm=True),
    "decoder (sandwich, macaron)": right(Decoder, macaron=True, sandwich_norm=True),
    "decoder (memory keys)": refused(Decoder, "keys of a shortened sequence", attn_num_mem_kv=2),
    "decoder (shifted tokens)": refused(Decoder, "positions are mixed by something else", shift_tokens=1),
}
