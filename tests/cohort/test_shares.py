"""The share of relevance on padding, and the sums of rows: measured, written down, exact where no batch is padded."""

import dataclasses
import json

import numpy as np
import polars as pl
import pytest
import torch

from rollout.cohort.rows import Decoder, measured_rows, vocabulary_array
from rollout.cohort.shares import measure, wrong_sums
from rollout.results.padding import add_up_shares, count_shares, padding_note
from tests.support.toy_cohort import Attention, Records, attribute, collate, explain, rows


def test_the_share_is_what_lies_where_no_entry_is() -> None:
    scores = np.array([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.5, 0.5, np.nan]])
    at = np.array([0, 0, 1, 1, 1, 3, 4]), np.array([0, 1, 0, 1, 2, 0, 0])
    found = measure(scores, at, torch.float32)
    np.testing.assert_allclose(found.share, [0.25, 0.0, np.nan, np.nan, np.nan])
    np.testing.assert_allclose(found.total, [1.0, 1.0, 1.0, 0.0, np.nan])
    assert found.has_entries.tolist() == [True, True, False, True, True]
    assert list(wrong_sums({"f": found}, np.arange(5))) == [3, 4]


def test_a_row_of_nothing_is_right_where_the_method_may_leave_nothing() -> None:
    scores = np.array([[0.0, 0.0], [0.5, 0.4], [0.5, -0.5], [np.nan, 0.0], [0.25, 0.75]])
    found = measure(scores, (np.repeat(np.arange(5), 2), np.tile([0, 1], 5)), torch.float32)
    assert list(wrong_sums({"f": found}, np.arange(5))) == [0, 1, 2, 3]
    assert list(wrong_sums({"f": found}, np.arange(5), zero_rows=True)) == [1, 2, 3]


def test_relevance_of_either_sign_counts_by_its_size() -> None:
    found = measure(np.array([[1.5, -0.25, -0.25]]), (np.array([0, 0]), np.array([0, 1])), torch.float32)
    assert found.share.tolist() == [0.125]
    assert found.total.tolist() == [1.0]


NESTED = Decoder(None, None, vocabulary_array({"a": 1, "b": 2}), False, True)
VISITS = [{"f": torch.tensor([[1, 2], [0, 0]])}, {"f": torch.tensor([[2, 0], [1, 0], [1, 2]])}]


@pytest.mark.parametrize(
    ("scores", "shares"),
    [
        # A visit's score stands once, however many codes it is copied to; a visit without codes is padding.
        (torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])[..., None].expand(-1, -1, 2), [0.5, 0.0]),
        (torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]), [0.5, 0.0]),
        # With scores of their own codes count one by one, and a place without a code is padding.
        (torch.tensor([[[0.1, 0.4], [0.3, 0.0], [0.0, 0.2]], [[0.1, 0.1], [0.2, 0.0], [0.3, 0.3]]]), [0.5, 0.1]),
    ],
)
def test_shares_of_visits(scores, shares) -> None:
    _, found = measured_rows(VISITS, [0, 1], {"f": scores}, {"f": NESTED})
    np.testing.assert_allclose(found["f"].share, shares, atol=1e-7)
    np.testing.assert_allclose(found["f"].total, [1.0, 1.0], atol=1e-7)


def test_a_feature_of_one_step_has_no_padding() -> None:
    hot = Decoder(None, None, vocabulary_array({"r": 0, "g": 1, "b": 2}), True, False)
    whole = Decoder(None, None, None, False, False, whole=True)
    samples = [{"h": torch.tensor([1.0, 0, 1]), "w": torch.zeros(3)}, {"h": torch.zeros(3), "w": torch.zeros(3)}]
    copied = torch.ones(2, 3)
    _, found = measured_rows(samples, [0, 1], {"h": copied, "w": copied}, {"h": hot, "w": whole})
    np.testing.assert_array_equal(found["h"].share, [0.0, np.nan])  # the second has no entry
    np.testing.assert_array_equal(found["w"].share, [0.0, 0.0])
    np.testing.assert_array_equal(found["h"].total, [1.0, 1.0])
    np.testing.assert_array_equal(found["w"].total, [1.0, 1.0])


def test_shares_of_parts_add_up() -> None:
    parts = [np.array([0.0, 0.5, np.nan]), np.array([np.nan]), np.array([0.1, 1e-9])]
    counted = [{"f": count_shares(part), "g": count_shares(part[:0])} for part in parts]
    found = add_up_shares(counted, ["f", "g"])
    assert found["f"] == {"samples": 4, "mean": pytest.approx(0.15), "max": 0.5, "above": 2}
    assert found["g"] == {"samples": 0, "mean": None, "max": None, "above": 0}
    assert "feature 'f' in 2 of 4 samples, on average 0.15 and at most 0.5 of a row" in padding_note(found, padded=True)
    assert "equal_lengths=True" in padding_note(found, padded=True)
    assert "No batch was padded" in padding_note(found, padded=False)
    assert padding_note(add_up_shares(counted, ["g"]), padded=True) is None


class Unmasked(Attention):
    """Attends to padding."""

    def layers(self, x, lengths):
        return super().layers(x, torch.full_like(lengths, x.shape[1]))


def unmasked(model, batch):
    """The rollout of a model that attends to padding, over all positions."""
    full = {key: torch.full_like(lengths, batch[key].shape[1]) for key, lengths in batch["lengths"].items()}
    return dataclasses.replace(explain(model, {**batch, "lengths": full}), row_sums=True)


def by_position(out, feature) -> dict[int, np.ndarray]:
    found = rows(out).filter(pl.col("feature") == feature)
    return {number: part["attribution"].to_numpy() for (number,), part in found.group_by("sample")}


def test_relevance_on_padding_is_said(tmp_path) -> None:
    out = tmp_path / "out"
    attribute(out, model=Unmasked(), explain=unmasked)
    predictions, manifest = rows(out, "predictions"), json.loads((out / "manifest.json").read_text())
    assert manifest["columns"]["predictions"] == predictions.columns
    shares = np.stack(predictions["padding_share"].to_numpy())
    for place, feature in enumerate(manifest["identity"]["dataset"]["features"]):
        kept = by_position(out, feature)
        np.testing.assert_allclose(shares[:, place], [1 - kept[n].sum() for n in range(90)], atol=1e-6)
        found = manifest["padding_share"][feature]
        assert found["samples"] == 90
        assert found["mean"] == pytest.approx(shares[:, place].mean(), abs=1e-6)
        assert found["max"] == pytest.approx(shares[:, place].max(), abs=1e-6)
        assert found["above"] == (shares[:, place] > 1e-6).sum() > 20
    (note,) = manifest["notes"]
    assert note.startswith("Relevance on padding: feature 'codes' in ")


def test_the_note_is_there_once_after_a_resumed_run(tmp_path) -> None:
    out, calls = tmp_path / "out", []

    def stopped(model, batch):
        calls.append(batch)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return unmasked(model, batch)

    with pytest.raises(KeyboardInterrupt):
        attribute(out, model=Unmasked(), explain=stopped)
    before = json.loads((out / "manifest.json").read_text())
    attribute(out, model=Unmasked(), explain=stopped)
    manifest = json.loads((out / "manifest.json").read_text())
    assert len(before["notes"]) == len(manifest["notes"]) == 1
    assert manifest["padding_share"]["codes"]["samples"] == 90


def test_a_model_that_masks_padding_has_none(tmp_path) -> None:
    attribute(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {name: (one["above"], one["max"]) for name, one in manifest["padding_share"].items()} == {
        "codes": (0, 0.0), "labs": (0, 0.0),
    }  # fmt: skip
    assert manifest["notes"] == []


def test_equal_lengths_give_each_sample_its_own_numbers(tmp_path) -> None:
    outs = {name: tmp_path / name for name in ("padded", "equal", "single")}
    for name, settings in {"padded": {}, "equal": {"equal_lengths": True}, "single": {"batch_samples": 1}}.items():
        attribute(outs[name], count=200, model=Unmasked(), explain=unmasked, part_samples=100, **settings)
    found = {name: rows(out)["attribution"].to_numpy() for name, out in outs.items()}
    prob = {name: rows(out, "predictions")["y_prob"].list.get(0).to_numpy() for name, out in outs.items()}
    assert np.abs(found["padded"] - found["single"]).max() > 0.1
    assert np.abs(prob["padded"] - prob["single"]).max() > 1e-3
    np.testing.assert_allclose(found["equal"], found["single"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(prob["equal"], prob["single"], rtol=0, atol=1e-6)
    for name in ("equal", "single"):
        manifest = json.loads((outs[name] / "manifest.json").read_text())
        assert manifest["padding_share"]["codes"]["max"] == 0.0
        assert manifest["notes"] == []
    sizes = [size for part in manifest["parts"] for size in part["batches"]]
    together = json.loads((outs["equal"] / "manifest.json").read_text())["parts"]
    assert sum(len(part["batches"]) for part in together) < len(sizes) == 200


@pytest.mark.parametrize(("dtype", "off", "failed"), [
    (torch.float32, 2e-3, 90), (torch.float32, 2e-5, 0), (torch.bfloat16, 2e-3, 0), (torch.bfloat16, 0.1, 90),
])  # fmt: skip
def test_rows_that_do_not_sum_to_1_are_failures(tmp_path, dtype, off, failed) -> None:
    def scaled(model, batch):
        found = explain(model, batch)
        relevance = {key: (scores * (1 + off)).to(dtype) for key, scores in found.relevance.items()}
        return dataclasses.replace(found, relevance=relevance, row_sums=True)

    run = attribute(tmp_path / "out", explain=scaled)
    assert run.failed == failed


def test_a_row_that_does_not_sum_to_1_fails_its_sample_only(tmp_path) -> None:
    def lossy(model, batch):
        """Loses the first position of the records of 9 codes, as a wrong read-out would."""
        found = explain(model, batch)
        codes = found.relevance["codes"].clone()
        codes[batch["lengths"]["codes"] == 9, 0] = 0
        return dataclasses.replace(found, relevance={**found.relevance, "codes": codes}, row_sums=True)

    attribute(tmp_path / "out", explain=lossy)
    wrong = [number for number in range(90) if 1 + number * 7 % 23 == 9]
    failures = rows(tmp_path / "out", "failures")
    assert failures["sample"].to_list() == wrong
    assert all(reason.startswith("the relevance of feature 'codes' sums to 0.") for reason in failures["error"])
    assert set(rows(tmp_path / "out")["sample"]) == set(range(90)) - set(wrong)

    promised_nothing = dataclasses.replace(lossy(Attention(), collate([Records(9)[0]])), row_sums=False)
    assert not promised_nothing.row_sums


def test_explain_of_another_promises_nothing(tmp_path) -> None:
    def doubled(model, batch):
        found = explain(model, batch)
        return dataclasses.replace(found, relevance={key: 2 * scores for key, scores in found.relevance.items()})

    assert attribute(tmp_path / "out", explain=doubled).failed == 0


def test_the_first_wrong_feature_is_named() -> None:
    one = measure(np.array([[0.5, 0.5], [0.5, 0.345]]), (np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])), torch.float32)
    assert wrong_sums({"a": one, "b": one}, np.array([7, 8])) == {
        8: "the relevance of feature 'a' sums to 0.845, must be 1 by the method"
    }
