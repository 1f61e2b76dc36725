"""How the drop-in runs PyHealth's models on fused attention: in groups of like length, and equal to the whole batch."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("pyhealth", reason="the PyHealth drop-in needs the pyhealth extra")

from pyhealth.models import Transformer

import rollout
from rollout.pyhealth import AttentionRollout, fused
from tests.capture.test_pyhealth_models import CASES, masked_batch
from tests.support.pyhealth_models import (
    Stock,
    assert_same,
    batch,
    maps_of,
    naive_rollout,
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


def ragged(lengths: list[int]) -> dict[str, Any]:
    """Samples of the given lengths, of the codes of "flat"."""
    generator = torch.Generator().manual_seed(3)
    data: dict[str, Any] = {"label": torch.ones(len(lengths), 1)}
    for key in ("conditions", "drugs"):
        ids = torch.randint(2, 7, (len(lengths), max(lengths)), generator=generator)
        data[key] = ids * (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])
    return data


LENGTHS = {
    "short": [3, 9, 5, 5, 12, 1],
    "mixed": [1, 140, 30, 139, 17, 150, 200, 140],
    "equal": [130] * 4,
    "one": [7],
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_mask(case: str, without_maps: None) -> None:
    data = masked_batch(case)
    truncated = [] if "mask" in case else [transformer("flat", max_seq_len=9)]  # PyHealth does not cut a mask given
    for model in (transformer("flat"), *truncated):
        wanted = result(Stock, model, data)
        ours = AttentionRollout(model).attribute(**data)
        for key in wanted:
            read = wanted[key].shape[1]
            torch.testing.assert_close(ours[key][:, :read], wanted[key], atol=1e-5, rtol=0)
            assert torch.count_nonzero(ours[key][:, read:]) == 0


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_ragged_batches(lengths: list[int], calls: list[dict[str, Any]], without_maps: None) -> None:
    model, data = transformer("flat"), ragged(lengths)
    ours = AttentionRollout(model).attribute(**data)
    assert_same(ours, result(Stock, model, data))
    for key, maps in maps_of(model, data).items():
        torch.testing.assert_close(ours[key].double(), naive_rollout(maps)[:, 0], atol=1e-6, rtol=0)
    widths = sorted(width for call in calls for width in [call["shape"][2]] * call["shape"][0])
    padded = sum(widths) - 2 * sum(lengths)
    assert 0 <= padded <= 2 * len(lengths) * fused.GROUP_SLACK
    assert sum(call["shape"][0] for call in calls) == 2 * len(lengths)


@pytest.mark.parametrize("case", [*CASES, "ragged"])
def test_what_the_model_predicts_meanwhile_is_what_it_predicts(case: str, calls: list[dict[str, Any]]) -> None:
    """Only row 0 of the top layer is computed, and that is all the model reads."""
    model, seen = transformer("flat").eval(), []
    data = ragged(LENGTHS["mixed"]) if case == "ragged" else masked_batch(case)
    with torch.inference_mode(), model.fc.register_forward_hook(lambda m, args, out: seen.append((args[0], out))):
        model(**data)
        AttentionRollout(model).attribute(**data)
    (plain, logits), (grouped, grouped_logits) = seen
    torch.testing.assert_close(grouped, plain, atol=2e-5, rtol=0)
    torch.testing.assert_close(grouped_logits, logits, atol=2e-5, rtol=0)
    assert max(call["shape"][0] for call in calls) <= len(plain)


def test_the_query_mask_is_given_only_where_it_matters(calls: list[dict[str, Any]]) -> None:
    """From a valid row only valid rows are reached; a row 0 that is not valid is uniform over all S."""

    def masks(interpreter: AttentionRollout, data: dict[str, Any]) -> list[set[str]]:
        calls.clear()
        interpreter.attribute(**data)
        return [call["masks"] for call in calls]

    flat = AttentionRollout(transformer("flat"))
    assert masks(flat, batch("flat")) == [{"lengths"}, {"lengths"}]
    assert masks(flat, masked_batch("holes"))[0] == {"key_mask"}
    assert masks(flat, ragged([4, 4])) == [set(), set()]
    invalid_start = masks(flat, masked_batch("first id 0"))
    assert invalid_start[:2] == [{"key_mask", "query_mask"}, {"lengths"}] or {"key_mask", "query_mask"} in invalid_start
    assert (
        masks(AttentionRollout(transformer("flat"), method="discard"), batch("flat"))
        == [{"key_mask", "query_mask"}] * 2
    )
    assert masks(AttentionRollout(stage_net("stagenet")), batch("stagenet")) == [{"lengths"}]
    assert masks(AttentionRollout(stage_net("gaps")), batch("gaps")) == [{"key_mask", "query_mask"}]


@given(
    st.integers(1, 300).flatmap(
        lambda seq: st.lists(st.tuples(st.integers(0, seq), st.booleans()), min_size=1, max_size=40).map(
            lambda samples: (seq, samples)
        )
    )
)
def test_groups_hold_every_sample_once_at_its_width(shape: tuple[int, list[tuple[int, bool]]]) -> None:
    seq, samples = shape
    valid = torch.stack([(torch.arange(seq) < n) & ((torch.arange(seq) > 0) | first) for n, first in samples])
    groups = fused.length_groups(valid)
    assert sorted(int(b) for members, _, _ in groups for b in members) == list(range(len(samples)))
    for members, width, row_valid in groups:
        assert bool((valid[members, 0] == row_valid).all())
        assert len(members) == 1 or len(members) * width <= fused.GROUP_POSITIONS
        assert row_valid or width == seq
        assert not bool(valid[members, width:].any())
        if row_valid:
            ends = [int(valid[b].nonzero().max()) + 1 for b in members]
            assert max(ends) == width
            assert width - min(ends) <= (fused.GROUP_SLACK if width <= fused.GROUP_WIDTH else 0)


# Where the batch is run whole, or by stored maps.


def hook(*args: Any) -> None:
    """A hook of someone else's that does nothing."""


class Reader(Transformer):
    """Reads more of a layer than row 0."""

    def forward_from_embedding(self, **data: Any) -> Any:
        outputs: list[Tensor] = []
        with self.transformer["drugs"].register_forward_hook(lambda module, args, out: outputs.append(out[0])):
            result = super().forward_from_embedding(**data)
        result["everything"] = outputs[0].sum()
        return result


@pytest.fixture
def layer_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The batch sizes that groups were made of."""
    runs: list[int] = []
    own = fused.length_groups

    def spy(valid: Tensor) -> Any:
        runs.append(len(valid))
        return own(valid)

    monkeypatch.setattr(fused, "length_groups", spy)
    return runs


@pytest.mark.parametrize("case", ["hook in a layer", "pre-hook", "subclass", "full matrix", "discard"])
def test_the_whole_batch_is_run_when_more_than_row_0_may_be_seen(
    case: str, layer_runs: list[int], without_maps: None
) -> None:
    model, data = transformer("flat", cls=Reader if case == "subclass" else Transformer), batch("flat")
    options: dict[str, Any] = {}
    handles = []
    if case == "hook in a layer":
        handles.append(model.transformer["drugs"].transformer[0].feed_forward.register_forward_hook(hook))
    elif case == "pre-hook":
        handles.append(model.transformer["drugs"].register_forward_pre_hook(hook))
    elif case == "full matrix":
        model.get_relevance_tensor = lambda R, **data: {key: r.mean(1) for key, r in R.items()}
    elif case == "discard":
        options["method"] = "discard"
    wanted = None if case == "discard" else result(Stock, model, data)
    ours = AttentionRollout(model, **options).attribute(**data)
    assert layer_runs == []
    if wanted is not None:
        assert_same(ours, wanted)
    for handle in handles:
        handle.remove()


def test_another_row_than_0_is_found_out(layer_runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a later PyHealth's Transformer read its last row."""
    model, data = transformer("flat"), batch("flat")
    monkeypatch.setattr("rollout.pyhealth.attention_rollout.is_own", lambda model, *names: True)
    monkeypatch.setattr("rollout.pyhealth.interpreter.is_own", lambda model, *names: True)
    model.get_relevance_tensor = lambda R, **data: {key: r[:, -1] for key, r in R.items()}
    assert_same(AttentionRollout(model).attribute(**data), result(Stock, model, data))
    assert layer_runs == [6, 6]


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
