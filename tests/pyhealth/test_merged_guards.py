"""Where a Transformer's rows are not merged: another way runs, and its numbers are right."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("pyhealth", reason="the PyHealth drop-in needs the pyhealth extra")

from pyhealth.models import Transformer
from pyhealth.models.transformer import TransformerLayer

import rollout
from rollout.pyhealth import AttentionRollout
from rollout.pyhealth.merged import blocks, trial
from tests.support.merged_records import merges, repeated, sines
from tests.support.pyhealth_models import Stock, assert_same, batch, maps_of, result, stage_net, transformer


class Reader(Transformer):
    """Reads more of a layer than row 0."""

    def forward_from_embedding(self, **data: Any) -> Any:
        outputs: list[Tensor] = []
        with self.transformer["drugs"].register_forward_hook(lambda module, args, out: outputs.append(out[0])):
            found = super().forward_from_embedding(**data)
        found["everything"] = outputs[0].sum()
        return found


def nothing(*args: Any) -> None:
    """A hook that does nothing."""


def hooked(subject: Any) -> None:
    subject.transformer["drugs"].transformer[0].feed_forward.register_forward_hook(nothing)


def pre_hooked(subject: Any) -> None:
    subject.transformer["drugs"].register_forward_pre_hook(nothing)


def with_another_norm(subject: Any) -> None:
    subject.transformer["drugs"].transformer[1].output_sublayer.norm = nn.RMSNorm(16)


def with_biases(subject: Any) -> None:
    subject.transformer["drugs"].transformer[0].attention.linear_layers[0] = nn.Linear(16, 16)


def with_another_forward(subject: Any) -> None:
    part = subject.transformer["drugs"].transformer[0].feed_forward
    own = part.forward
    part.forward = lambda x, mask=None: own(2 * x, mask)


def with_positions_beside(subject: Any) -> None:
    subject.transformer["drugs"].transformer[0].register_buffer("positions", torch.zeros(20))


class Quantized(torch.Tensor):
    """Weights of a kind of their own."""


def with_other_weights(subject: Any) -> None:
    linear = subject.transformer["drugs"].transformer[0].feed_forward.w_1
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantized))


def with_a_position_parameter(subject: Any) -> None:
    subject.transformer["drugs"].transformer[0].position = nn.Parameter(torch.zeros(16))


def with_another_pass(subject: Any) -> None:
    own = subject.forward_from_embedding
    subject.forward_from_embedding = lambda **data: own(**data)


def with_another_readout(subject: Any) -> None:
    subject.get_relevance_tensor = lambda R, **data: {key: r.mean(1) for key, r in R.items()}


CHANGES: list[Callable[[Any], None]] = [
    hooked,
    pre_hooked,
    with_another_norm,
    with_biases,
    with_another_forward,
    with_positions_beside,
    with_a_position_parameter,
    with_other_weights,
    with_another_pass,
    with_another_readout,
]


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which captures were made."""
    made: list[str] = []
    for name in ("MergedCapture", "FusedCapture", "MapCapture"):
        kind = getattr(rollout.pyhealth.attention_rollout, name)

        def make(*args: Any, kind: Any = kind, name: str = name, **kwargs: Any) -> Any:
            made.append(name)
            return kind(*args, **kwargs)

        monkeypatch.setattr(rollout.pyhealth.attention_rollout, name, make)
    return made


def test_the_plain_model_is_served(ways: list[str]) -> None:
    assert_same(
        AttentionRollout(transformer("flat")).attribute(**repeated()), result(Stock, transformer("flat"), repeated())
    )
    assert ways == ["MergedCapture"]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_is_run_whole(change: Callable[[Any], None], ways: list[str]) -> None:
    torch.manual_seed(5)
    subject = transformer("flat").eval()
    change(subject)
    wanted = result(Stock, subject, repeated())
    assert_same(AttentionRollout(subject).attribute(**repeated()), wanted)
    assert ways == ["FusedCapture"]


def test_a_subclass_is_run_whole(ways: list[str]) -> None:
    subject = transformer("flat", cls=Reader)
    assert_same(AttentionRollout(subject).attribute(**repeated()), result(Stock, subject, repeated()))
    assert ways == ["FusedCapture"]


def test_another_row_than_0_is_found_out(ways: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a later PyHealth's Transformer read its last row."""
    subject = transformer("flat")
    monkeypatch.setattr("rollout.pyhealth.interpreter.is_own", lambda model, *names: True)
    subject.get_relevance_tensor = lambda R, **data: {key: r[:, -1] for key, r in R.items()}
    assert_same(AttentionRollout(subject).attribute(**repeated()), result(Stock, subject, repeated()))
    assert ways == ["MergedCapture", "FusedCapture"]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "discard"},
        {"method": rollout.Method(head_fusion=lambda maps, gradients: maps.mean(1))},
        {"backend": "reference"},
    ],
    ids=["discard", "function", "reference"],
)
def test_other_methods_and_backends_run_whole(options: dict[str, Any], ways: list[str]) -> None:
    subject = transformer("flat")
    method = options.get("method", "pyhealth")
    ours = AttentionRollout(subject, **options).attribute(**repeated())
    assert ways == ["FusedCapture"]
    for key, maps in maps_of(subject, repeated()).items():
        wanted = rollout.attention_rollout(maps, query=0, method=method, backend="reference")
        torch.testing.assert_close(ours[key].double(), wanted, atol=1e-6, rtol=0)


def test_the_stage_net_runs_whole(ways: list[str]) -> None:
    subject, data = stage_net("stagenet"), batch("stagenet")
    assert_same(AttentionRollout(subject).attribute(**data), result(Stock, subject, data))
    assert ways == ["FusedCapture"]


@pytest.mark.parametrize("case", ["bfloat16", "training", "capture"])
def test_stored_maps(case: str, ways: list[str]) -> None:
    subject, data = transformer("flat", dropout=0.3), repeated()
    interpreter = AttentionRollout(subject)
    if case == "bfloat16":
        subject.bfloat16()
    elif case == "training":
        subject.train()
    if case == "capture":
        with rollout.capture(subject):
            interpreter.attribute(**data)
    else:
        interpreter.attribute(**data)
    assert ways == ["MapCapture"]


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyHealth's layer adds positions, as if it had always done so."""
    own = TransformerLayer.forward

    def forward(self: Any, x: Tensor, mask: Tensor | None = None, register_hook: bool = False) -> Any:
        return own(self, x + sines(x), mask, register_hook)

    monkeypatch.setattr(TransformerLayer, "forward", forward)
    monkeypatch.setitem(blocks.FORWARDS, TransformerLayer, forward)


def test_a_layer_that_adds_positions_is_found_out(later: None, ways: list[str]) -> None:
    subject = transformer("flat").eval()
    assert all(blocks.blocks_of(layer) is not None for layer in subject.transformer.values())
    assert_same(AttentionRollout(subject).attribute(**repeated()), result(Stock, subject, repeated()))
    assert ways == ["FusedCapture"]


def test_a_layer_is_tried_once_and_left_as_it_was() -> None:
    subject = copy.deepcopy(transformer("flat")).eval()
    subject.requires_grad_(True)
    Stock(subject).attribute(**repeated())
    layer = subject.transformer["drugs"]
    maps = [part.attention.attn_map for part in layer.transformer]
    calls: list[int] = []
    own = trial._behaves

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "_behaves", lambda *args: calls.append(1) or own(*args))
        for _ in range(3):
            assert merges(subject)
    assert len(calls) == 2
    assert all(part.attention.attn_map is seen for part, seen in zip(layer.transformer, maps, strict=True))


def test_heads_that_differ_from_the_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"head_fusion weights must be \[H\] = \[2\]"):
        AttentionRollout(transformer("flat"), torch.ones(3)).attribute(**repeated())
    with pytest.raises(ValueError, match="start_layer must leave a layer, less than L = 3, got 3"):
        AttentionRollout(transformer("flat"), method=rollout.Method(start_layer=3)).attribute(**repeated())


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (lambda subject: None, {}, "on the distinct rows of each record"),
        (
            lambda subject: None,
            {"method": "discard"},
            "on all positions with fused attention: the method looks at whole",
        ),
        (lambda subject: None, {"backend": "reference"}, "fused attention: backend 'reference' was asked for"),
        (lambda subject: hooked(subject), {}, "fused attention: of 'drugs' a layer is not all PyHealth's own"),
        (lambda subject: with_another_pass(subject), {}, "fused attention: the model has a forward pass of its own"),
        (lambda subject: with_another_readout(subject), {}, "fused attention: the model has a readout of its own"),
        (lambda subject: subject.bfloat16(), {}, "from stored maps"),
        (lambda subject: setattr(subject, "get_attention_layers", dict), {}, "by PyHealth's protocol"),
    ],
    ids=str,
)
def test_the_way_is_told(change: Callable[[Any], None], options: dict[str, Any], said: str) -> None:
    subject = transformer("flat")
    change(subject)
    assert said in AttentionRollout(subject, **options).describe_path()
