"""The tape: layers that differ, streams and their names, masks taken apart."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rollout
from rollout import Record
from rollout._capture.masks import structure
from rollout._capture.streams import stream_names
from rollout.tape import Tape
from tests.support.capture_models import ROLLOUT, Mixer, read_mixer
from tests.support.cases import generator, random_qk, random_weights
from tests.support.oracles import assert_close, rollout_matrices, softmax_maps, take_rows


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    rollout.register_capture(Mixer, read_mixer)
    yield
    rollout.register_capture(Mixer, None)


def record_of(layer: int, given: dict[str, Any], queries: list[Tensor], keys: list[Tensor]) -> Record:
    fields = {name: values[layer] for name, values in given.items()}
    return Record(queries=queries[layer], keys=keys[layer], **fields)


MASK = torch.tensor([[True] * 5, [True, True, False, True, False]])
PER_LAYER: dict[str, dict[str, list[Any]]] = {
    "same": {"causal": [True] * 3, "key_mask": [MASK, MASK.clone(), MASK], "scale": [0.3] * 3},
    "scales": {"scale": [0.3, None, -0.2]},
    "causal-differs": {"causal": [True, False, True]},
    "windows-differ": {"window": [(1, None), None, (2, 1)], "causal": [True, True, False]},
    "masks-differ": {"key_mask": [MASK, None, MASK.flip(1)], "scale": [1.0, 0.0, 1.0]},
    "query-masks": {"query_mask": [MASK, MASK, MASK]},
    "query-masks-differ": {"query_mask": [None, MASK, MASK.flip(0)], "causal": [False, True, False]},
    "bias-and-masks": {
        "bias": [random_weights(4, 1, 5), None, random_weights(2, 1, 1, 5)],
        "key_mask": [MASK, None, MASK],
    },
}


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("case", PER_LAYER)
def test_layers_may_differ_in_everything(case: str, groups: int):
    """Each layer's maps by the loops, by `Tape.maps`, and the chain from what is passed for all layers at once."""
    given = PER_LAYER[case]
    queries, keys = random_qk(2, 4, 5, groups=groups, dtype=torch.float64)
    tape, maps = Tape(), []
    for layer in range(3):
        record = record_of(layer, given, queries, keys)
        tape.add("a", f"a.{layer}", record)
        alone, _ = softmax_maps(
            [queries[layer]], [keys[layer]], key_mask=record.key_mask, causal=record.causal,
            window=record.window or (None, None), bias=[record.bias], scale=record.scale,
        )  # fmt: skip
        if record.query_mask is not None:
            alone[0][~record.query_mask.numpy().astype(bool)[:, None].repeat(4, 1)] = 1 / 5
        maps.append(alone[0])
        assert_close(tape.maps(layer), alone[0], "qk")
    full = rollout_matrices(maps, ROLLOUT)
    for query in (None, torch.zeros(2, dtype=torch.long), random_weights(2, 3, 5)):
        for backend in ("torch", "reference"):
            assert_close(tape.rollout(query, backend=backend)["a"], take_rows(full, query), "qk")


def test_streams_queries_and_lengths_by_name():
    tape, full = Tape(), {}
    lengths = torch.tensor([4, 2])
    for stream, seq, seed in (("a", 5, 0), ("b", 4, 1)):
        queries, keys = random_qk(2, 4, seq, dtype=torch.float64, seed=seed)
        for layer in range(3):
            tape.add(stream, f"{stream}.{layer}", Record(queries=queries[layer], keys=keys[layer]))
        ends = lengths.tolist() if stream == "b" else None
        full[stream] = rollout_matrices(softmax_maps(queries, keys, ends)[0], ROLLOUT, ends)
    result = tape.rollout({"b": torch.tensor([3, 1]), "a": -1}, lengths={"b": lengths})
    assert list(result) == ["b", "a"]
    assert_close(result["b"], take_rows(full["b"], torch.tensor([3, 1]), [4, 2]), "qk")
    assert_close(result["a"], full["a"][:, -1], "qk")
    assert not result["b"][1, 2:].any()
    assert list(tape.rollout({"a": 0})) == ["a"]
    assert list(tape.rollout(0)) == ["a", "b"]
    with pytest.raises(KeyError, match=r"query must name one of the streams \['a', 'b'\]"):
        tape.rollout({"c": 0})
    with pytest.raises(KeyError, match=r"lengths must name one"):
        tape.rollout(0, lengths={"c": lengths})
    with pytest.raises(ValueError, match=r"Tape.layers: stream must be one of \['a', 'b'\], got None"):
        tape.layers()


def test_a_stream_is_one_sequence():
    tape = Tape()
    queries, keys = random_qk(2, 4, 5)
    tape.add("a", "a.0", Record(queries=queries[0], keys=keys[0]))
    with pytest.raises(
        ValueError, match=r"layers of stream 'a' must see one sequence; a.1 ran on \(B, S\) = \(2, 4\), a.0 on \(2, 5\)"
    ):
        tape.add("a", "a.1", Record(queries=queries[0][:, :, :4], keys=keys[0][:, :, :4]))
    with pytest.raises(ValueError, match=r"as many keys as queries; a\.1 has 5 queries and 4 keys"):
        tape.add("a", "a.1", Record(queries=queries[0], keys=keys[0][:, :, :4]))
    tape.add("b", "b.0", Record(queries=queries[0][:, :, :4], keys=keys[0]), source="a")
    with pytest.raises(ValueError, match=r"a\.1 ran in 'a' after b.0 had attended over that"):
        tape.add("a", "a.1", Record(queries=queries[0], keys=keys[0]))


def test_records_are_checked():
    queries, keys = (t[0] for t in random_qk(2, 4, 5))
    mask = torch.ones(2, 5, dtype=torch.bool)
    for fields, error, message in (
        ({"queries": queries[0]}, ValueError, r"queries must be \[B, H, S, D\]"),
        ({"keys": keys[..., :4]}, ValueError, "with the same B and D"),
        ({"keys": keys[:, :, :4], "key_mask": mask}, ValueError, r"key_mask must be bool \[B, S'\] = \[2, 4\]"),
        ({"keys": keys[:, :3]}, ValueError, "H must be a multiple of H_kv, got 4 and 3"),
        ({"key_mask": mask.float()}, ValueError, "key_mask must be bool"),
        ({"query_mask": mask[:1]}, ValueError, "query_mask must be bool"),
        ({"bias": 3}, TypeError, "bias must be a tensor, got int"),
    ):
        with pytest.raises(error, match=f"Record: .*{message}|Record: {message}"):
            Record(**{"queries": queries, "keys": keys, **fields})


def paths(*names: str) -> dict[str, nn.Module]:
    every = {""}
    for name in names:
        parts = name.split(".")
        every |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    return {name: nn.ModuleList() if name.endswith(("layers", "blocks")) else nn.Module() for name in sorted(every)}


@pytest.mark.parametrize(
    "wanted",
    [
        {"encoder.layers.0.attn": "encoder.layers", "encoder.layers.1.attn": "encoder.layers"},
        {"encoder.layers.layer_0.attn": "encoder.layers", "encoder.layers.layer_1.attn": "encoder.layers"},
        {"block.0.layer.0.Attn": "block", "block.1.layer.0.Attn": "block", "block.0.layer.1.ff": "block.0.layer"},
        {"towers.0.layers.0.attn": "towers.0.layers", "towers.1.layers.0.attn": "towers.1.layers"},
        {"to.0.layers.0.a": "to.0.layers", "to.0.layers.1.a": "to.0.layers", "to.1.layers.0.a": "to.1.layers"},
        {"blocks.0.attn.0.fn": "blocks", "blocks.1.attn.0.fn": "blocks"},
        {"blocks.0.attn": "blocks"},
        {"model.attn1": "model", "model.attn2": "model"},
        {"0.attn": "layers", "1.attn": "layers"},
        {"attention": "layers"},
        {"text.attention": "text"},
    ],
    ids=lambda wanted: next(iter(wanted)),
)  # fmt: skip
def test_stream_names(wanted: dict[str, str]):
    found = stream_names(paths(*wanted))
    assert {name: found[name][0] for name in wanted} == wanted


def additive(mask: Tensor, low: float) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, low)


@pytest.mark.parametrize("low", [None, -math.inf, torch.finfo(torch.float32).min], ids=["bool", "inf", "min"])
def test_masks_are_taken_apart_exactly(low: float | None):
    seq = 7
    i, j = torch.arange(seq)[:, None], torch.arange(seq)
    keys = torch.tensor([[True] * 7, [False, False, True, True, True, False, True]])
    patterns = {
        "causal": (j <= i, {"causal"}),
        "causal-window": ((j <= i) & (j >= i - 2), {"causal", "window"}),
        "window": ((j <= i + 1) & (j >= i - 2), {"window"}),
        "all": (torch.ones(seq, seq, dtype=torch.bool), set()),
        "packed": ((i // 4) == (j // 4), {"bias"}),
        "future": (j >= i, {"window"}),
    }
    for pattern, names in patterns.values():
        for padded in (False, True):
            mask = (pattern & keys[:, None] if padded else pattern.expand(1, seq, seq))[:, None]
            fields = structure(mask if low is None else additive(mask, low), 2)
            if "bias" not in fields:
                assert fields.keys() - {"key_mask"} == names
                assert ("key_mask" in fields) == padded
            else:
                assert names == {"bias"}
            record = Record(queries=torch.zeros(2, 1, seq, 4), keys=torch.zeros(2, 1, seq, 4), **fields)
            wanted = mask.float() / mask.sum(-1, keepdim=True).clamp(min=1)
            wanted = torch.where(mask.any(-1, keepdim=True), wanted, 1 / seq).expand(2, 1, seq, seq)
            assert torch.allclose(record.maps(), wanted, atol=1e-7)
    other = torch.randn(2, 1, seq, seq, generator=generator(0))
    assert structure(other, 2)["bias"] is other
    same = patterns["causal"][0].expand(2, 4, seq, seq)  # one mask, seen by every head
    assert structure(same, 2) == {"causal": True}
    per_head = torch.stack([j <= i, j >= i])[None]
    assert torch.equal(structure(per_head, 2)["bias"] == 0, per_head)


@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min, -1e9])
def test_keys_that_a_bias_hides_from_every_row_are_padding(low: float):
    """ALiBi with a padding mask: the ends of the samples are known. Where a row hides its own key they are not."""
    i, j = torch.arange(5)[:, None], torch.arange(5)
    keys = (torch.arange(5) < torch.tensor([5, 3])[:, None])[:, None, None]
    slopes = torch.tensor([0.5, 0.25])[None, :, None, None] * j
    fields = structure(slopes + torch.zeros(2, 1, 5, 5).masked_fill(~(keys & (j <= i)), low), 2)
    assert torch.equal(fields["key_mask"], keys[:, 0, 0])
    sparse = keys & (j <= i) & ((i != j) | (i == 0))
    assert "key_mask" not in structure(slopes + torch.zeros(2, 1, 5, 5).masked_fill(~sparse, low), 2)
    q = torch.zeros(2, 2, 5, 4)
    bias = slopes + torch.zeros(2, 1, 5, 5).masked_fill(~sparse, low)
    tape = Tape()
    tape.add("a", "x", Record(queries=q, keys=q, bias=bias))
    with pytest.raises(ValueError, match="so where a sample ends cannot be told"):
        tape.rollout(-1)
    last = torch.tensor([4, 2])
    assert torch.equal(tape.rollout(last)["a"], tape.rollout()["a"][torch.arange(2), last])


@pytest.mark.parametrize("causal", [False, True])
def test_positions_that_read_themselves_alone_may_be_padding(causal: bool) -> None:
    """As XLNet's padding does; where no row looks ahead, the last position is so of itself."""
    seq, valid = 6, torch.tensor([6, 3])
    shown = (torch.arange(seq) < valid[:, None])[:, None, None] | torch.eye(seq, dtype=torch.bool)
    shown = shown & torch.ones(seq, seq, dtype=torch.bool).tril() if causal else shown
    bias = torch.linspace(-1, 1, seq) + torch.zeros(shown.shape).masked_fill(~shown, -1e30)
    q, k = torch.randn(2, 2, 2, seq, 4, generator=generator(5))
    tape = Tape()
    tape.add("layers", "0", Record(queries=q, keys=k, bias=bias))
    with pytest.raises(ValueError, match="so where a sample ends cannot be told"):
        tape.rollout(-1)
    ends = tape.rollout(valid - 1)["layers"]
    assert torch.equal(ends, tape.rollout(-1, lengths=valid)["layers"])
    assert_close(ends, tape.rollout()["layers"][torch.arange(2), valid - 1], "qk")
    whole = Tape()
    whole.add("layers", "0", Record(queries=q[:1], keys=k[:1], bias=bias[:1]))
    assert_close(whole.rollout(-1)["layers"], whole.rollout()["layers"][:, -1], "qk")
