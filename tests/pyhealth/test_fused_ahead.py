"""A PyHealth whose attention is fused by itself while its hooks are off: the drop-in asks its hooks, capture sees it.

The stand-in has the form that is proposed for PyHealth's own: `scaled_dot_product_attention` in place of `Attention`
unless maps are asked for, and the lowest number of the dtype in place of -1e9.
"""

from typing import Any

import pytest
import torch
from pyhealth.interpret.methods import AttentionRollout as Stock
from pyhealth.interpret.methods import CheferRelevance as StockChefer
from pyhealth.models.transformer import Attention, MultiHeadedAttention
from torch import Tensor
from torch.nn import functional

import rollout
from rollout.pyhealth import AttentionRollout, CheferRelevance
from tests.support.capture_state import assert_nothing_left, state
from tests.support.cases import same_bits
from tests.support.oracles import assert_close, rollout_matrices
from tests.support.pyhealth_models import assert_same, batch, both, maps_of, result, stage_net, transformer


def fused_unless_hooked(
    self: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, register_hook: bool = False
) -> Tensor:
    parts = (query, key, value)
    q, k, v = (
        layer(x).view(len(x), -1, self.h, self.d_k).transpose(1, 2)
        for layer, x in zip(self.linear_layers, parts, strict=True)
    )
    mask = None if mask is None else mask.unsqueeze(1)
    if register_hook:
        mixed, attention = self.attention(q, k, v, mask=mask, dropout=self.dropout)
        self.attn_map = attention.detach()
        attention.register_hook(self.save_attn_grad)
    else:
        self.attn_map = None
        fill = torch.finfo(q.dtype).min
        bias = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask == 0, fill)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return self.output_linear(mixed.transpose(1, 2).reshape(len(mixed), -1, self.h * self.d_k))


def lowest_fill(
    self: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: Any = None
) -> tuple[Tensor, Tensor]:
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)
    maps = scores.softmax(-1)
    return (maps if dropout is None else dropout(maps)) @ value, maps


@pytest.fixture(autouse=True)
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MultiHeadedAttention, "forward", fused_unless_hooked)
    monkeypatch.setattr(Attention, "forward", lowest_fill)


@pytest.mark.parametrize("kind", ["flat", "gaps", "half_empty"])
def test_rollout_is_the_same(kind: str) -> None:
    model, data = transformer(kind).eval(), batch(kind)
    before = state(model)
    ours = result(AttentionRollout, model, data)
    assert_nothing_left(model, before)
    assert_same(ours, result(Stock, model, data))


def test_the_stage_net_is_the_same() -> None:
    assert_same(*both(stage_net("stagenet"), batch("stagenet")))


def test_chefer_is_the_same() -> None:
    model, data = transformer("flat"), batch("flat")
    assert_same(result(CheferRelevance, model, data), result(StockChefer, model, data))


def test_capture_sees_the_fused_attention() -> None:
    model, data = transformer("flat").double().eval(), batch("flat")
    before = state(model)
    with torch.inference_mode():
        plain = model(**data)["logit"]
        with rollout.capture(model) as tape:
            output = model(**data)["logit"]
    assert same_bits(output.clone(), plain.clone())
    maps = maps_of(model, data)
    for key, layers in maps.items():
        full = rollout_matrices(layers, rollout.METHODS["rollout"])
        stream = next(stream for stream in tape.streams if key in stream)
        assert_close(tape.rollout(torch.zeros(6, dtype=torch.long))[stream], full[:, 0], "qk")
    assert_nothing_left(model, before)
