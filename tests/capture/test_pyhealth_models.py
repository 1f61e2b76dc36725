"""`rollout.capture` of PyHealth's models: outputs as without it, and their maps from the queries and keys."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("pyhealth", reason="PyHealth's models need the pyhealth extra")

from pyhealth.models import JambaEHR
from pyhealth.models.transformer import Attention, MultiHeadedAttention, TransformerBlock

import rollout
from rollout.pyhealth import AttentionRollout
from tests.support.pyhealth_models import (
    Stock,
    assert_same,
    batch,
    dataset,
    maps_of,
    naive_rollout,
    stage_net,
    transformer,
    valid,
    values,
)

MODELS = [pytest.param(transformer, kind, id=f"Transformer-{kind}") for kind in ("flat", "nested", "gaps")] + [
    pytest.param(transformer, "stagenet_tensor", id="Transformer-stagenet_tensor"),
    pytest.param(stage_net, "nested", id="StageAttentionNet-nested"),
    pytest.param(stage_net, "gaps", id="StageAttentionNet-gaps"),
    pytest.param(stage_net, "stagenet_tensor", id="StageAttentionNet-stagenet_tensor"),
]


def outputs(model: Any, data: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The logits and patient embeddings."""
    with torch.inference_mode():
        out = model(**data, embed=True)
    return out["logit"], out["embed"]


def to_dtype(data: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The batch with its numbers, but not its ids, in another dtype."""

    def cast(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(cast, value))
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: cast(value) for name, value in data.items()}


def masked_batch(case: str) -> dict[str, Any]:
    """A batch of flat features, the first stream masked in a way of its own: by its ids, or by a mask beside them."""
    data = batch("flat")
    ids = data["conditions"].clone()
    if case == "first id 0":
        ids[1, 0] = 0
        data["conditions"] = ids
    elif case == "nothing valid":
        ids[2] = 0
        data["conditions"] = ids
    elif case == "holes":
        ids[:, 3] = 0
        data["conditions"] = ids
    elif case == "mask of holes":
        data["conditions"] = (ids, torch.arange(ids.shape[1]).expand(6, -1) % 3 != 1)
    elif case == "mask without any":
        mask = ids != 0
        mask[4] = False
        data["conditions"] = (ids, mask)
    elif case == "all valid":
        data["conditions"] = ids.clamp(min=2)
    return data


CASES = ["first id 0", "nothing valid", "holes", "mask of holes", "mask without any", "all valid"]


@contextmanager
def hooked(model: nn.Module) -> Iterator[list[Tensor]]:
    """The maps PyHealth's own attention makes in the block."""
    maps: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: maps.append(output[1].detach()))
        for module in model.modules()
        if isinstance(module, Attention)
    ]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)], ids=["float32", "float64"]
)


@DTYPES
@pytest.mark.parametrize(("build", "kind"), MODELS)
def test_outputs_and_maps_are_the_models(build: Any, kind: str, dtype: torch.dtype, tolerance: float) -> None:
    if build is stage_net and dtype == torch.float64:
        pytest.skip("PyHealth's StageAttentionNet makes float32 states whatever its dtype")
    model, data = build(kind).to(dtype).eval(), to_dtype(batch(kind), dtype)
    plain = outputs(model, data)
    with rollout.capture(model) as tape:
        captured = outputs(model, data)
    for a, b in zip(captured, plain, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)
    assert tape.streams == tuple(model.feature_keys)
    for key, maps in maps_of(model, data).items():
        for layer, wanted in enumerate(maps):
            torch.testing.assert_close(tape.maps(layer, key).double(), wanted, atol=tolerance, rtol=0)


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_mask(case: str, dtype: torch.dtype, tolerance: float) -> None:
    """A row that is not valid is uniform over all S; what it gives is read when it is row 0."""
    model, data = transformer("flat").to(dtype).eval(), masked_batch(case)
    plain, maps = outputs(model, data), maps_of(model, data)
    with rollout.capture(model) as tape:
        captured = outputs(model, data)
    for a, b in zip(captured, plain, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)
    assert (tape.layers("conditions")[0].key_mask is None) == (case == "all valid")
    for key, wanted in maps.items():
        full = naive_rollout(wanted)
        got = tape.rollout(method="pyhealth")[key]
        torch.testing.assert_close(got.double(), full, atol=min(1e-6, tolerance), rtol=0)
        torch.testing.assert_close(tape.rollout(query=0, method="pyhealth")[key], got[:, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["rollout", "discard", rollout.Method(head_fusion="max")], ids=str)
def test_the_rollout_of_a_tape(method: Any) -> None:
    model, data = transformer("gaps").eval(), batch("gaps")
    with rollout.capture(model) as tape:
        outputs(model, data)
    maps = maps_of(model, data)["visits"]
    wanted = rollout.attention_rollout(maps, query=0, method=method, backend="reference")
    torch.testing.assert_close(tape.rollout(query=0, method=method)["visits"].double(), wanted, atol=2e-6, rtol=0)


def test_the_row_a_stage_attention_net_reads() -> None:
    model, data = stage_net("stagenet").eval(), batch("stagenet")
    stock = Stock(model).attribute(**data)
    with rollout.capture(model) as tape:
        outputs(model, data)
    last = valid(values(data, "visits")).sum(1) - 1
    got = tape.rollout(query=last, method="pyhealth")["visits"]
    torch.testing.assert_close(got, stock["visits"][..., 0], atol=1e-5, rtol=0)


def test_half_precision() -> None:
    """In bfloat16; float16 overflows on PyHealth's fill, with a capture as without."""
    model, data = transformer("flat").eval().bfloat16(), batch("flat")
    plain = outputs(model, data)
    with rollout.capture(model) as tape:
        got = outputs(model, data)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
    assert tape.layers("drugs")[0].queries.dtype == torch.bfloat16


def test_jamba() -> None:
    """Its attention layers, of a stack that mixes positions otherwise in between."""
    torch.manual_seed(5)
    model = JambaEHR(dataset("flat"), embedding_dim=16, heads=2, num_transformer_layers=2, num_mamba_layers=2).eval()
    data = batch("flat")
    with hooked(model) as maps:
        plain = outputs(model, data)
    with pytest.raises(rollout.CaptureError, match=r"positions are mixed by something else"), rollout.capture(model):
        outputs(model, data)
    with rollout.capture(model, allow="attention_layers_only") as tape:
        captured = outputs(model, data)
    assert torch.equal(captured[0], plain[0])
    assert "positions are mixed by something else" in tape.notes[0]
    assert tape.streams == ("conditions", "drugs")
    recorded = [tape.maps(layer, key) for key in tape.streams for layer in range(2)]
    assert len(maps) == 4
    for got, wanted in zip(recorded, maps, strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=0)


class Wrapped(nn.Module):
    """Two PyHealth models in one."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a": transformer("flat"), "b": transformer("flat", num_layers=1)})

    def forward(self, **data: Any) -> dict[str, Tensor]:
        return {name: part(**data)["logit"] for name, part in self.parts.items()}


def test_models_inside_a_model_keep_their_streams_apart() -> None:
    model, data = Wrapped().eval(), batch("flat")
    with rollout.capture(model) as tape, torch.inference_mode():
        model(**data)
    assert tape.streams == ("parts.a.conditions", "parts.a.drugs", "parts.b.conditions", "parts.b.drugs")
    assert [len(tape.layers(stream)) for stream in tape.streams] == [3, 3, 1, 1]
    wanted = naive_rollout(maps_of(model.parts["b"], data)["drugs"])
    got = tape.rollout(method="pyhealth")["parts.b.drugs"]
    torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=0)


class Causal(nn.Module):
    """PyHealth's blocks under a mask that no key mask can say."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList(TransformerBlock(8, 2, 0.1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[0], x.shape[1], x.shape[1]).tril()
        for layer in self.layers:
            x = layer(x, mask)
        return x


def test_another_mask_is_recorded_as_it_is() -> None:
    model, x = Causal().eval(), torch.randn(2, 5, 8)
    with hooked(model) as maps, torch.inference_mode():
        plain = model(x)
    with rollout.capture(model) as tape, torch.inference_mode():
        assert torch.equal(model(x), plain)
    assert tape.streams == ("layers",)
    for layer, wanted in enumerate(maps):
        torch.testing.assert_close(tape.maps(layer), wanted, atol=1e-6, rtol=0)
    assert torch.equal(tape.maps(0).triu(1), torch.zeros(2, 2, 5, 5))


def test_who_asks_for_the_map_gets_it() -> None:
    """Someone else's hook on an `Attention`, and PyHealth's own hooks."""
    model, data = transformer("flat").eval(), batch("flat")
    wanted = maps_of(model, data)
    with rollout.capture(model) as tape, hooked(model) as maps:
        outputs(model, data)
    for got, right in zip(maps, wanted["conditions"] + wanted["drugs"], strict=True):
        torch.testing.assert_close(got.double(), right, atol=2e-6, rtol=0)
    model.set_attention_hooks(True)
    with rollout.capture(model) as tape:
        model(**data)
    for key, layers in model.get_attention_layers().items():
        for layer, (attention, _) in enumerate(layers):
            torch.testing.assert_close(tape.maps(layer, key), attention, atol=2e-6, rtol=0)
    model.set_attention_hooks(False)


class Cross(nn.Module):
    """Attention from one sequence to another of the same length."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = MultiHeadedAttention(2, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attention(x, y, y)


def test_what_is_refused() -> None:
    cross = Cross().eval()
    with (
        pytest.raises(rollout.CaptureError, match=r"was left out, as over another .*: attention"),
        rollout.capture(cross),
    ):
        cross(torch.ones(1, 2, 8), torch.ones(1, 2, 8))
    model, data = transformer("flat").eval(), batch("flat")
    attention = model.transformer["drugs"].transformer[1].attention
    own = attention.attention.forward
    attention.attention.forward = lambda *args, **kwargs: own(*args, **dict(kwargs, mask=None))
    with pytest.raises(rollout.CaptureError, match=r"drugs.transformer.1.attention must run .* Attention, it has its"):
        rollout.capture(model).__enter__()
    del attention.attention.forward

    class Other(MultiHeadedAttention):
        def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return query

    attention.__class__ = Other
    with pytest.raises(rollout.CaptureError, match=r"Other at transformer.drugs.*register_capture"):
        rollout.capture(model).__enter__()
    attention.__class__ = MultiHeadedAttention
    with pytest.raises(rollout.CaptureError, match=r"call model.eval\(\)"), rollout.capture(model.train()):
        model(**data)


class Boom(Exception):
    """Raised inside a model."""


def test_nothing_is_left() -> None:
    model, data = transformer("flat").eval(), batch("flat")
    before = [dict(vars(module)) for module in model.modules()]
    with rollout.capture(model), rollout.capture(model):
        outputs(model, data)

    def boom(*args: Any) -> None:
        raise Boom

    handle = model.fc.register_forward_hook(boom)
    with pytest.raises(Boom), rollout.capture(model):
        outputs(model, data)
    handle.remove()
    assert [dict(vars(module)) for module in model.modules()] == before


def test_a_thread_that_captures_beside_one_that_does_not() -> None:
    model, data = transformer("flat").eval(), batch("flat")
    plain = outputs(model, data)
    go, seen = threading.Barrier(2, timeout=30), []

    def other() -> None:
        go.wait()
        seen.extend(torch.equal(outputs(model, data)[0], plain[0]) for _ in range(20))

    thread = threading.Thread(target=other)
    thread.start()
    with rollout.capture(model) as tape:
        go.wait()
        for _ in range(20):
            outputs(model, data)
        thread.join()
    assert seen == [True] * 20
    assert [len(tape.layers(key)) for key in tape.streams] == [3, 3]


def test_the_interpreter_inside_a_capture() -> None:
    """Its forward pass is one like any other to the tape, and its numbers are the same."""
    model, data = transformer("flat").eval(), batch("flat")
    wanted = AttentionRollout(model).attribute(**data)
    with rollout.capture(model) as tape:
        assert_same(AttentionRollout(model).attribute(**data), wanted, tolerance=1e-6)
    assert_same(tape.rollout(query=0, method="pyhealth"), wanted, tolerance=1e-6)


def test_no_import_of_pyhealth_for_a_model_that_is_not_its() -> None:
    code = (
        "import sys, torch, rollout\n"
        "model = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()\n"
        "x = torch.ones(1, 3, 8)\n"
        "with rollout.capture(model) as tape: model(x, x, x)\n"
        "assert tape.maps(0).shape == (1, 2, 3, 3)\n"
        "print(sorted(name for name in sys.modules if name.startswith('pyhealth')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
