"""Rollout of a Hugging Face encoder end to end: captured queries and keys against stored maps, and what capture costs.

Every model has random weights and is made from a config.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import rollout
from bench.machine import host
from bench.providers import chains, oracle

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'attention-rollout[hf]'"
)

# Hidden size, heads, layers, B, S; BERT-base, and a small one for the quick run.
BASE, SMALL = (768, 12, 12, 16, 512), (64, 4, 3, 4, 64)
STREAM = "encoder.layer"


@cache
def bert(hidden: int, heads: int, layers: int, implementation: str) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=4 * hidden
    )
    config._attn_implementation = implementation
    return transformers.BertModel(config, add_pooling_layer=False).eval().to(host.DEVICE)


@cache
def ids(batch: int, seq: int) -> Tensor:
    tokens = torch.randint(1000, 30000, (batch, seq), generator=torch.Generator().manual_seed(seq))
    return tokens.to(host.DEVICE)


def stored_maps(hidden: int, heads: int, layers: int, tokens: Tensor) -> Tensor:
    """As users write it: `output_attentions=True`, then the naive chain."""
    with torch.inference_mode():
        maps = bert(hidden, heads, layers, "eager")(input_ids=tokens, output_attentions=True).attentions
        return chains.naive_chain(maps)


def captured(hidden: int, heads: int, layers: int, tokens: Tensor) -> Tensor:
    model = bert(hidden, heads, layers, "sdpa")
    with torch.inference_mode(), rollout.capture(model) as tape:
        model(input_ids=tokens)
    return tape.rollout(0, backend="torch")[STREAM]


@cache
def reference(hidden: int, heads: int, layers: int, batch: int, seq: int) -> Tensor:
    """The row of position 0 in float64 from the eager model's maps, sample by sample."""
    model = bert(hidden, heads, layers, "eager")
    with torch.inference_mode():
        rows = [
            oracle.from_maps(model(input_ids=sample, output_attentions=True).attentions)
            for sample in ids(batch, seq).split(1)
        ]
    return torch.cat(rows)


@pytest.mark.parametrize("provider", ["naive chain", "ours"])
def test_bert(provider: str, measure: Callable[..., None], quick: bool) -> None:
    """Tokens in, relevance of the first position's row out."""
    hidden, heads, layers, batch, seq = SMALL if quick else BASE
    run = stored_maps if provider == "naive chain" else captured
    measure(
        lambda: run(hidden, heads, layers, ids(batch, seq)),
        reference=reference(hidden, heads, layers, batch, seq),
        tolerance=1e-5,
        suite="BERT-base from tokens",
        provider=provider,
        shape={"B": batch, "H": heads, "S": seq, "L": layers, "E": hidden},
        dtype="float32",
    )


@pytest.mark.parametrize("provider", ["plain forward", "capture", "capture and rollout"])
def test_overhead(provider: str, measure: Callable[..., None], quick: bool) -> None:
    """What recording adds to a forward pass with fused attention; the check is on the model's output."""
    hidden, heads, layers, batch, seq = SMALL if quick else (*BASE[:4], 256)
    model, tokens = bert(hidden, heads, layers, "sdpa"), ids(batch, seq)

    def plain() -> Tensor:
        with torch.inference_mode():
            return model(input_ids=tokens)[0]

    def recorded() -> Tensor:
        with torch.inference_mode(), rollout.capture(model) as tape:
            output = model(input_ids=tokens)[0]
        if provider == "capture and rollout":
            tape.rollout(0, backend="torch")
        return output

    measure(
        plain if provider == "plain forward" else recorded,
        reference=plain().double(),
        tolerance=1e-5,
        suite="overhead of capture",
        provider=provider,
        shape={"B": batch, "H": heads, "S": seq, "L": layers, "E": hidden},
        dtype="float32",
    )
