"""What the gate times: each case's call with its inputs, and what it must give in float64.

They are made once, here, and handed to both revisions in a file, so that both get the same numbers and are held to the
same oracle. Cases use the public names only, so that an older revision can run them.
"""

import copy
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import records
from bench.gate import processes
from bench.providers import oracle

LAYERS, HEADS, SIZE, WIDTH, BATCH = 4, 8, 64, 128, 32
# Of max|err| / max|ref|: rows from maps, the full matrix, from Q and K, through a float32 model.
MAPS, FULL, QK, CAPTURED = 1e-6, 3e-6, 3e-6, 1e-5


class Case(NamedTuple):
    """The call that a revision's process times; its result must be `exact`, within `allowed`."""

    run: processes.Run
    exact: Tensor
    allowed: float


def _from_maps(batch: int, seq: int, dtype: torch.dtype = torch.float32, allowed: float = MAPS, **options: Any) -> Case:
    """L softmax maps, by default the row of position 0."""
    maps = [layer.softmax(-1).to(dtype) for layer in torch.randn(LAYERS, batch, HEADS, seq, seq)]
    run = partial(processes.public, "attention_rollout", maps, **{"query": 0} | options)
    return Case(run, oracle.from_maps(maps, **options), allowed)


def _from_qk(batch: int, seq: int) -> Case:
    inputs = [list(layers) for layers in torch.randn(2, LAYERS, batch, HEADS, seq, SIZE)]
    return Case(partial(processes.public, "attention_rollout_qk", *inputs, query=0), oracle.from_qk(*inputs), QK)


def _captured(batch: int, seq: int) -> Case:
    """The maps of a float64 copy of the encoder are multiplied here, layer by layer."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).eval()
    tokens, maps = torch.randn(batch, seq, WIDTH), []
    x = tokens.double()
    with torch.no_grad():
        for each in copy.deepcopy(model).double().layers:
            maps.append(each.self_attn(x, x, x, need_weights=True, average_attn_weights=False)[1])
            x = each(x)
    return Case(partial(processes.captured, model, tokens), oracle.from_maps(maps), CAPTURED)


def _attributed(embedding: int, heads: int, layers: int, *, real: bool) -> Case:
    """PyHealth's Transformer, its interpreter made in the call: log-normal lengths, sorted, or EHR_ROOT's drugs."""
    from rollout.bench import end_to_end

    cpu, vocabulary = torch.device("cpu"), end_to_end.VOCABULARY
    batches = end_to_end.make_batches("log-normal, sorted", BATCH, cpu)
    if real:
        found, vocabulary = records.drugs()
        batches = records.batches_of(found, BATCH, cpu)
    model = end_to_end.make_model(heads, layers, cpu, embedding=embedding, vocabulary=vocabulary)
    run = partial(processes.attributed, model, [batch["codes"] for batch in batches])
    return Case(run, end_to_end.exact(model, batches), CAPTURED)


CASES: dict[str, Callable[[], Case]] = {
    "rows from maps S=64": lambda: _from_maps(32, 64),
    "rows from maps S=128": lambda: _from_maps(32, 128),
    "rows from maps S=256": lambda: _from_maps(32, 256),
    "rows from maps S=512": lambda: _from_maps(8, 512),
    "rows from bf16 maps S=256": lambda: _from_maps(16, 256, torch.bfloat16),
    "rows from maps, ragged S=256": lambda: _from_maps(16, 256, lengths=torch.linspace(32, 256, 16).long()),
    "full matrix S=128": lambda: _from_maps(32, 128, allowed=FULL, query=None),
    "rows from Q,K S=128": lambda: _from_qk(16, 128),
    "rows from Q,K S=256": lambda: _from_qk(8, 256),
    "discard S=128": lambda: _from_maps(8, 128, method="discard"),
    "capture, TransformerEncoder S=128": lambda: _captured(8, 128),
}
for _name, _sizes in (("E64 H2 L2", (64, 2, 2)), ("E128 H8 L4", (128, 8, 4))):
    if find_spec("pyhealth") is not None:
        CASES[f"PyHealth, {_name}, log-normal"] = partial(_attributed, *_sizes, real=False)
        if records.ROOT is not None:
            CASES[f"PyHealth, {_name}, {records.CASE}"] = partial(_attributed, *_sizes, real=True)
