"""Which id of a vocabulary is padding: stated, or the vocabulary's own, never a code's."""

import json

import numpy as np
import polars as pl
import pytest
import torch

import rollout
from rollout.cohort.explain import Explained
from tests.support.toy_cohort import rows

# RoBERTa's: what is first in every record has the id 0.
TOKENS = {"<s>": 0, "<pad>": 1, "</s>": 2, "fever": 3, "pain": 4}


class Notes:
    """Five records that begin with `<s>` and end with `</s>`, as a tokenizer makes them."""

    def __init__(self, first: int = 0) -> None:
        self.first = first

    def __len__(self) -> int:
        return 5

    def __getitem__(self, number: int):
        return {"tokens": torch.tensor([self.first, *[3 + k % 2 for k in range(number)], 2])}


def tokens(samples):
    ids = [sample["tokens"] for sample in samples]
    return {"tokens": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=1)}


def even(model, batch):
    """Each token of a record an equal share, padding nothing."""
    real = (batch["tokens"] != 1).float()
    return Explained({"tokens": real / real.sum(1, keepdim=True)}, row_sums=True)


def attribute_notes(out, vocabulary=TOKENS, dataset=None, **settings):
    chosen = {"collate": tokens, "explain": even, "progress": False, **settings}
    return rollout.attribute_cohort(
        torch.nn.Linear(1, 1), dataset or Notes(), out, vocabularies={"tokens": vocabulary}, **chosen
    )


def test_a_vocabulary_names_its_padding(tmp_path) -> None:
    attribute_notes(tmp_path / "out")
    found = rows(tmp_path / "out")
    assert found.filter(pl.col("position") == 0)["code"].to_list() == ["<s>"] * 5
    sums = found.group_by("sample").agg(pl.col("attribution").sum()).sort("sample")["attribution"]
    np.testing.assert_allclose(sums, 1.0, atol=1e-6)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["identity"]["dataset"]["padding_ids"] == {"tokens": 1}
    assert manifest["padding_share"]["tokens"]["above"] == 0


def test_a_code_of_id_0_is_not_taken_for_padding(tmp_path) -> None:
    unnamed = {code: number for code, number in TOKENS.items() if code != "<pad>"}
    with pytest.raises(
        ValueError, match=r"'tokens' gives id 0 to '<s>' and names no padding.*padding_ids=\{'tokens': id\}"
    ):
        attribute_notes(tmp_path / "out", unnamed)
    assert not (tmp_path / "out").exists()
    for name, padding, first in [("stated", 1, "<s>"), ("none", None, "<s>"), ("zero", 0, "fever")]:
        dataset = Notes() if first == "<s>" else Notes(first=3)
        attribute_notes(tmp_path / name, unnamed, dataset, padding_ids={"tokens": padding})
        assert rows(tmp_path / name).filter(pl.col("position") == 0)["code"].to_list() == [first] * 5
    with pytest.raises(ValueError, match=r"dataset\.padding_ids\.tokens: 1 there, null now"):
        attribute_notes(tmp_path / "stated", unnamed, padding_ids={"tokens": None})


def test_a_padding_id_that_is_wrong_is_said_by_the_share(tmp_path) -> None:
    """<s> stated to be padding: its share of each row has no row in the tables, and that stands in the predictions."""
    unnamed = {code: number for code, number in TOKENS.items() if code != "<pad>"}
    attribute_notes(tmp_path / "out", unnamed, padding_ids={"tokens": 0})
    shares = rows(tmp_path / "out", "predictions")["padding_share"].list.get(0)
    np.testing.assert_allclose(shares, [1 / (2 + n) for n in range(5)], atol=1e-6)


@pytest.mark.parametrize(("vocabulary", "padding", "error", "message"), [
    (TOKENS, {"tokens": 0}, ValueError, r"padding_ids\['tokens'\] is 0, but the vocabulary .* says \{'<pad>': 1\}"),
    (TOKENS, {"tokens": True}, TypeError, r"padding_ids\['tokens'\] must be an int or None, got True"),
    (TOKENS, {"codes": 0}, ValueError, r"must be of features that are ids of codes, \['tokens'\], got 'codes'"),
    (None, {"tokens": 0}, ValueError, r"padding_ids must be of features that are ids of codes, \[\], got 'tokens'"),
    ({"[PAD]": 0, "<pad>": 1}, None, ValueError, r"has several paddings, .*padding_ids="),
])  # fmt: skip
def test_padding_ids_are_checked(tmp_path, vocabulary, padding, error, message) -> None:
    with pytest.raises(error, match=message):
        attribute_notes(tmp_path / "out", vocabulary, padding_ids=padding)
    assert not (tmp_path / "out").exists()


def test_a_code_that_is_spelled_like_padding_is_none(tmp_path) -> None:
    """PAD, of peripheral arterial disease."""
    with pytest.raises(ValueError, match="gives id 0 to 'PAD'"):
        attribute_notes(tmp_path / "out", {"PAD": 0, "fever": 3})
