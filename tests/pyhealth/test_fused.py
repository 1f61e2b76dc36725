"""How the drop-in runs PyHealth's models on fused attention where a Transformer's rows are not merged."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("pyhealth", reason="the PyHealth drop-in needs the pyhealth extra")

import rollout
from rollout.pyhealth import AttentionRollout, fused
from tests.capture.test_pyhealth_models import CASES, masked_batch
from tests.support.pyhealth_models import (
    Stock,
    assert_same,
    batch,
    result,
    stage_net,
    transformer,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of the chain: the shape of Q, and which masks it was given."""
    seen: list[dict[str, Any]] = []

    def spy(queries: list[Tensor], keys: list[Tensor], **options: Any) -> Tensor:
        masks = {name for name in ("lengths", "key_mask", "query_mask") if options.get(name) is not None}
        seen.append({"shape": tuple(queries[0].shape), "query": options["query"], "masks": masks})
        return rollout.attention_rollout_qk(queries, keys, **options)

    monkeypatch.setattr(fused, "attention_rollout_qk", spy)
    return seen


@pytest.fixture
def without_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of stored maps is closed."""
    monkeypatch.setattr("rollout.pyhealth.attention_rollout.MapCapture", None)


def whole(model: Any) -> Any:
    """The model with a hook in each layer, so that its rows are not merged."""
    for layer in model.transformer.values():
        layer.transformer[0].feed_forward.register_forward_hook(lambda *args: None)
    return model


@pytest.mark.parametrize("way", [whole, lambda model: model], ids=["whole", "merged"])
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_mask(case: str, way: Any, without_maps: None) -> None:
    data = masked_batch(case)
    truncated = [] if "mask" in case else [transformer("flat", max_seq_len=9)]  # PyHealth does not cut a mask given
    for model in map(way, (transformer("flat"), *truncated)):
        wanted = result(Stock, model, data)
        ours = AttentionRollout(model).attribute(**data)
        for key in wanted:
            read = wanted[key].shape[1]
            torch.testing.assert_close(ours[key][:, :read], wanted[key], atol=1e-5, rtol=0)
            assert torch.count_nonzero(ours[key][:, read:]) == 0


def test_the_query_mask_is_given_only_where_it_matters(calls: list[dict[str, Any]]) -> None:
    """From a valid row only valid rows are reached; a row 0 that is not valid is uniform over all S."""

    def masks(interpreter: AttentionRollout, data: dict[str, Any]) -> list[set[str]]:
        calls.clear()
        interpreter.attribute(**data)
        return [call["masks"] for call in calls]

    flat = AttentionRollout(whole(transformer("flat")))
    assert masks(flat, batch("flat")) == [{"lengths"}, {"lengths"}]
    assert masks(flat, masked_batch("holes"))[0] == {"key_mask"}
    assert masks(flat, masked_batch("all valid")) == [set(), {"lengths"}]
    assert masks(flat, masked_batch("first id 0")) == [{"key_mask", "query_mask"}, {"lengths"}]
    assert (
        masks(AttentionRollout(transformer("flat"), method="discard"), batch("flat"))
        == [{"key_mask", "query_mask"}] * 2
    )
    assert masks(AttentionRollout(stage_net("stagenet")), batch("stagenet")) == [{"lengths"}]
    assert masks(AttentionRollout(stage_net("gaps")), batch("gaps")) == [{"key_mask", "query_mask"}]


@pytest.mark.parametrize("case", ["causal", "dropout", "replaced", "hook"])
def test_stored_maps_where_fused_attention_cannot_stand_in(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that someone made causal, dropout left on in one place, a forward and a hook of someone else's."""
    model, data = transformer("flat").eval(), batch("flat")
    attention = model.transformer["drugs"].transformer[1].attention
    handles = []
    if case == "causal":
        pre = attention.attention.register_forward_pre_hook(
            lambda module, args, kwargs: (args, dict(kwargs, mask=kwargs["mask"].tril())), with_kwargs=True
        )
        handles.append(pre)
    elif case == "dropout":
        attention.dropout.p = 0.3
    elif case == "replaced":
        own = attention.attention.forward
        monkeypatch.setattr(attention.attention, "forward", lambda q, k, v, **kw: own(2 * q, k, v, **kw))
    else:
        handles.append(attention.attention.register_forward_hook(lambda m, args, out: (out[0], out[1].flip(-1))))
    answers = []
    for interpreter in (AttentionRollout, Stock):
        subject = interpreter(model)
        if case == "dropout":
            attention.dropout.train()
        torch.manual_seed(4)
        answers.append(subject.attribute(**data))
    assert_same(*answers)
    for handle in handles:
        handle.remove()
    plain = AttentionRollout(transformer("flat")).attribute(**data)["drugs"]
    assert float((answers[0]["drugs"] - plain).abs().max()) > 1e-4
