"""A Transformer on the distinct rows of its records: PyHealth's own numbers."""

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("pyhealth", reason="the PyHealth drop-in needs the pyhealth extra")

from pyhealth.models.transformer import Attention

import rollout
from rollout.pyhealth import AttentionRollout
from rollout.pyhealth.merged import attend, blocks, capture, rows
from tests.support.merged_records import batches, merges, record, repeated, sines, with_masked_starts
from tests.support.pyhealth_models import Stock, assert_same, batch, maps_of, result, transformer

LAYERS, HEADS = 3, 4


@cache
def model(layers: int = LAYERS, heads: int = HEADS) -> Any:
    return transformer("flat", num_layers=layers, heads=heads).double().eval()


# The numbers.


@settings(deadline=None)
@given(batches(), st.integers(1, LAYERS))
def test_pyhealths_own_one_by_one(data: dict[str, Any], layers: int) -> None:
    subject = model(layers)
    assert merges(subject)
    ours = AttentionRollout(subject).attribute(**data)
    for b in range(len(data["label"])):
        stock = Stock(subject).attribute(**record(data, b))
        for key, wanted in stock.items():
            torch.testing.assert_close(ours[key][b : b + 1], wanted.detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "lengths", [[1, 140, 30, 139, 17, 150, 200, 140], [130] * 4, [7]], ids=["mixed", "equal", "one"]
)
def test_long_records(lengths: list[int]) -> None:
    subject, generator = transformer("flat"), torch.Generator().manual_seed(3)
    data: dict[str, Any] = {"label": torch.ones(len(lengths), 1)}
    for key in ("conditions", "drugs"):
        ids = torch.randint(2, 8, (len(lengths), max(lengths)), generator=generator)
        data[key] = ids * (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])
    assert_same(AttentionRollout(subject).attribute(**data), result(Stock, subject, data))


FUSIONS = st.sampled_from(["mean", "max", "min"]) | st.sampled_from(
    [torch.tensor([3.0, 1.0, 2.0, 0.5]), torch.arange(1.0, 1 + LAYERS * HEADS).view(LAYERS, HEADS)]
)
METHODS = st.builds(
    rollout.Method,
    head_fusion=FUSIONS,
    residual=st.sampled_from([0.5, 1.0, 0.2]),
    attention=st.sampled_from([None, 1.0]),
    renormalize=st.booleans(),
    normalize_attention=st.booleans(),
    start_layer=st.integers(0, LAYERS - 1),
)


@settings(deadline=None)
@given(batches(), METHODS, st.booleans())
def test_every_method_that_is_served(data: dict[str, Any], method: rollout.Method, kept: bool) -> None:
    """F_l is kept, or made again by tiles of two rows."""
    subject = model()
    assert merges(subject, method)
    with pytest.MonkeyPatch.context() as patch:
        if not kept:
            patch.setattr(attend, "KEPT_BYTES", 0)
            patch.setattr(attend, "TILE_BYTES", 128)
        ours = AttentionRollout(subject, method=method).attribute(**data)
    for key, maps in maps_of(subject, data).items():
        wanted = rollout.attention_rollout(maps, query=0, method=method, backend="reference")
        torch.testing.assert_close(ours[key], wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "tiles"])
@pytest.mark.parametrize(
    "method",
    [
        rollout.METHODS["rollout"],
        rollout.METHODS["chefer_rollout"],
        rollout.Method(head_fusion="max", residual=0.2, renormalize=False),
        rollout.Method(head_fusion=torch.tensor([3.0, 1.0, 2.0, 0.5]), start_layer=1),
        rollout.Method(residual=1.0, renormalize=False),  # F_l counts nothing: a row of 0
    ],
    ids=["rollout", "chefer_rollout", "max", "weights", "nothing else"],
)
def test_rows_without_their_own_path(method: rollout.Method, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the oracle, the same model run by its maps, and what comes of it with the own path."""
    method = replace(method, own_path=False)
    subject, data = model(), with_masked_starts()
    assert merges(subject, method)
    if not kept:
        monkeypatch.setattr(attend, "KEPT_BYTES", 0)
        monkeypatch.setattr(attend, "TILE_BYTES", 128)
    ours = AttentionRollout(subject, method=method).attribute(**data)
    plain = AttentionRollout(subject, method=replace(method, own_path=True)).attribute(**data)
    watched = copy.deepcopy(subject)
    for layer in watched.transformer.values():
        layer.transformer[0].attention.attention.register_forward_hook(lambda *args: None)
    by_maps = AttentionRollout(watched, method=method).attribute(**data)
    for key, maps in maps_of(subject, data).items():
        wanted = rollout.attention_rollout(maps, query=0, method=method, backend="reference")
        torch.testing.assert_close(ours[key], wanted, atol=1e-12, rtol=0)
        torch.testing.assert_close(ours[key], by_maps[key], atol=1e-12, rtol=0)
        assert float((ours[key] - plain[key]).abs().max()) > 0.1


@settings(deadline=None)
@given(batches())
def test_what_the_model_predicts_meanwhile_is_what_it_predicts(data: dict[str, Any]) -> None:
    subject, seen = model(), []
    with subject.register_forward_hook(lambda module, args, output: seen.append(output)):
        AttentionRollout(subject).attribute(**data, embed=True)
    with torch.no_grad():
        plain = subject(**data, embed=True)
    (found,) = seen
    assert found.keys() == plain.keys() >= {"logit", "y_prob", "loss", "y_true", "embed"}
    for name, wanted in plain.items():
        torch.testing.assert_close(found[name].clone(), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["nested", "gaps", "stagenet", "stagenet_tensor", "timeseries"])
def test_what_is_not_looked_up_is_told_apart_by_its_bits(kind: str, looked_at: list[rows.Rows]) -> None:
    subject, data = transformer(kind).eval(), batch(kind)
    assert merges(subject)
    assert_same(AttentionRollout(subject).attribute(**data), result(Stock, subject, data))
    assert len(looked_at) == len(subject.feature_keys)


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[rows.Rows]:
    """The batches whose rows were told apart by their bits."""
    seen: list[rows.Rows] = []

    def spy(x: Tensor, valid: Tensor) -> rows.Rows:
        seen.append(rows.rows_of(x, valid))
        return seen[-1]

    monkeypatch.setattr(capture, "rows_of", spy)
    return seen


def test_a_position_in_the_embedding_leaves_equal_codes_apart(looked_at: list[rows.Rows]) -> None:
    """A hook on the embedding makes each position's row its own."""
    subject, data = transformer("flat"), repeated()

    def add_positions(module: Any, args: Any, output: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: x + sines(x) for key, x in output.items()}

    plain = AttentionRollout(subject).attribute(**data)
    assert looked_at == []
    with subject.embedding_model.register_forward_hook(add_positions):
        ours, stock = AttentionRollout(subject).attribute(**data), Stock(subject).attribute(**data)
    assert_same(ours, {key: value.detach() for key, value in stock.items()})
    assert len(looked_at) == 2
    assert min(len(each.table) for each in looked_at) > 20
    assert float((ours["drugs"] - plain["drugs"]).abs().max()) > 1e-3


# The rows.


@given(batches())
def test_a_record_has_as_many_rows_as_it_has_codes(data: dict[str, Any]) -> None:
    ids = data["drugs"][0] if isinstance(data["drugs"], tuple) else data["drugs"]
    table = torch.arange(13.0)[:, None]
    valid = ids != 0
    merged = rows.Merged(rows.Rows(table, ids, valid))
    seen = []
    for group in merged.groups:
        for b, codes, counts in zip(group.samples.tolist(), group.rows.tolist(), group.counts.tolist(), strict=True):
            seen.append(b)
            first, *others = (ids[b] if not valid[b, 0] else ids[b][valid[b]]).tolist()
            wanted = {code: others.count(code) for code in others}
            size = 1 + len(wanted)
            assert (codes[0], counts[0]) == (first, 1)
            assert dict(zip(codes[1:size], counts[1:size], strict=True)) == wanted
            assert counts[size:] == [0] * (len(counts) - size)
            assert (
                group.valid is None
                or group.valid[seen.index(b) - seen.index(group.samples[0].item())][0] == valid[b, 0]
            )
    assert sorted(seen) == list(range(len(ids)))


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=40).flatmap(
        lambda sizes: st.tuples(st.just(sizes), st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    )
)
def test_groups_are_of_like_width_and_of_one_kind(drawn: tuple[list[int], list[bool]]) -> None:
    sizes, starts = drawn
    groups = rows._alike(torch.tensor(sizes), torch.tensor(starts)[:, None])
    assert sorted(b for members, _ in groups for b in members) == list(range(len(sizes)))
    for members, width in groups:
        assert width == max(sizes[b] for b in members)
        assert len({starts[b] for b in members}) == 1
        assert len(members) == 1 or len(members) * width <= rows.GROUP_POSITIONS
        assert width - min(sizes[b] for b in members) <= (rows.GROUP_SLACK if width <= rows.GROUP_WIDTH else 0)


def test_rows_of_equal_sums_are_left_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    x[1] = x[0]
    valid = torch.ones(2, 6, dtype=torch.bool)
    assert len(rows.rows_of(x, valid).table) == 6
    monkeypatch.setattr(rows, "_sums", lambda bits: torch.zeros(len(bits), dtype=torch.long))
    found = rows.rows_of(x, valid)
    assert torch.equal(found.table[found.index], x)
    assert len(found.table) == 12


def test_a_nan_makes_no_row_equal_to_another() -> None:
    x = torch.full((1, 3, 2), torch.nan)
    x[0, 2, 1] = 1.0
    found = rows.rows_of(x, torch.ones(1, 3, dtype=torch.bool))
    assert found.index.tolist() in ([[0, 0, 1]], [[1, 1, 0]])


@pytest.mark.parametrize("ids", [[[1, 99]], [[-1, 1]]], ids=["too large", "negative"])
def test_an_id_that_is_not_known_is_the_models_error(ids: list[list[int]]) -> None:
    data = dict(repeated(), drugs=torch.tensor(ids), conditions=torch.tensor([[1, 2]]), label=torch.ones(1, 1))
    ours, stock = (result(interpreter, transformer("flat"), data) for interpreter in (AttentionRollout, Stock))
    assert type(ours) is type(stock) is IndexError
    assert str(ours) == str(stock)


# How it runs.


def test_no_padded_position_is_run_and_equal_ones_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is a map of the whole batch made: PyHealth's attention does not run."""
    subject, data = transformer("flat").eval(), repeated()
    wanted = result(Stock, subject, data)
    assert merges(subject)
    ran: list[int] = []
    own = capture.encode

    def spy(layers: list[blocks.Block], found: rows.Rows, method: rollout.Method) -> Any:
        counted = [replace(layer, norm=lambda x, norm=layer.norm: ran.append(len(x)) or norm(x)) for layer in layers]
        return own(counted, found, method)

    monkeypatch.setattr(capture, "encode", spy)
    monkeypatch.setattr("pyhealth.models.transformer.Attention.forward", None)
    monkeypatch.setitem(blocks.FORWARDS, Attention, None)
    assert_same(AttentionRollout(subject).attribute(**data), wanted)
    distinct = 4 * (1 + 3)  # of each record position 0, and the three codes after it
    assert ran == [3, distinct, 4, 3, distinct, 4]  # the table, layer 1, and of the top layer a batch of 4


# Where F_l is kept.


def test_fused_maps_are_kept_where_they_find_room() -> None:
    room = attend.KEPT_BYTES
    assert attend.keeps_maps(torch.ones(1, 1024), 3)
    fits = room // (4 * 100 * 100)
    assert attend.keeps_maps(torch.ones(fits, 100), 1)
    assert not attend.keeps_maps(torch.ones(fits + 1, 100), 1)
    assert not attend.keeps_maps(torch.ones(fits, 100), 2)


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 2000))
def test_tiles_cover_every_score_once_and_fit(heads: int, samples: int, width: int) -> None:
    seen = torch.zeros(heads, width, dtype=torch.long)
    for h, r in attend.tiles(heads, samples, width, 4):
        seen[h, r] += 1
        entries = (h.stop - h.start) * samples * (r.stop - r.start) * width
        assert 4 * entries <= attend.TILE_BYTES or (h.stop - h.start, r.stop - r.start) == (1, 1)
    assert bool((seen == 1).all())
