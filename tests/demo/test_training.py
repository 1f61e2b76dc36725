"""Splits, batches and scores of the demo's training, without a model."""

import numpy as np
import pytest
import torch

from rollout.demo.training import _lengths, _shuffled_batches, _subset, auroc, log_loss, predict, split_patients


def test_no_patient_is_in_two_parts_and_each_part_has_both_classes() -> None:
    rng = np.random.default_rng(0)
    patients = [f"p{k}" for k in rng.integers(0, 200, 500)]
    labels = (rng.random(500) < 0.1).astype(float)
    split = split_patients(patients, labels, seed=1)
    parts = [split.train, split.validation, split.test]
    assert sorted(np.concatenate(parts).tolist()) == list(range(500))
    owners = [{patients[i] for i in part} for part in parts]
    assert sum(map(len, owners)) == len(set().union(*owners)) == len(set(patients))
    assert all(0 < labels[part].sum() < len(part) for part in parts)
    count = len(set(patients))
    assert [len(owner) / count for owner in owners] == pytest.approx([0.7, 0.1, 0.2], abs=0.02)


def test_the_split_depends_on_the_seed_alone() -> None:
    patients, labels = [f"p{k % 50}" for k in range(100)], np.arange(100) % 7 == 0
    again = [split_patients(patients, labels, seed).test.tolist() for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


@pytest.mark.parametrize(
    ("labels", "scores", "area"),
    [
        ([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], 1.0),
        ([0, 0, 1, 1], [0.4, 0.3, 0.2, 0.1], 0.0),
        ([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5], 0.5),
        ([0, 1, 0, 1], [0.1, 0.4, 0.35, 0.8], 1.0),
        ([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], 0.75),
    ],
)
def test_auroc_by_hand(labels: list[int], scores: list[float], area: float) -> None:
    assert auroc(np.array(labels, dtype=float), np.array(scores)) == pytest.approx(area)


def test_auroc_against_counting_pairs() -> None:
    rng = np.random.default_rng(2)
    labels, scores = (rng.random(80) < 0.3).astype(float), np.round(rng.random(80), 1)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
    assert auroc(labels, scores) == pytest.approx(np.mean(pairs))


def test_auroc_of_one_class_is_nan_and_log_loss_is_finite() -> None:
    assert np.isnan(auroc(np.zeros(3), np.arange(3.0)))
    assert log_loss(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == pytest.approx(np.log(2))
    assert np.isfinite(log_loss(np.array([1.0]), np.array([0.0])))


def test_log_loss_of_several_classes() -> None:
    probability = np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    assert log_loss(np.array([0.0, 2.0]), probability) == pytest.approx(-(np.log(0.5) + np.log(0.8)) / 2)
    assert np.isfinite(log_loss(np.array([1.0]), np.array([[1.0, 0.0]])))


class Counting(torch.nn.Module):
    """Gives each sample's sum over `classes`."""

    feature_keys = ("codes",)

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, codes: torch.Tensor, **_: object) -> dict[str, torch.Tensor]:
        return {"y_prob": codes.sum(1, keepdim=True).float() + torch.arange(self.classes)}


@pytest.mark.parametrize("classes", [1, 3])
def test_predictions_come_in_the_order_asked_for(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def pad(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {"codes": torch.nn.utils.rnn.pad_sequence([s["codes"] for s in samples], batch_first=True)}

    monkeypatch.setattr("rollout.demo.training.pyhealth_collate", pad)
    samples = [{"codes": torch.full((size,), size)} for size in (3, 1, 4, 2)]
    found = predict(Counting(classes), samples, np.array([2, 0, 1]), batch_size=2, progress=False)
    expected = np.array([16, 9, 1])[:, None] + np.arange(classes)
    assert found.tolist() == (expected[:, 0] if classes == 1 else expected).tolist()


def test_lengths_are_those_of_the_longest_stream_of_any_kind() -> None:
    samples = [
        {
            "codes": torch.arange(3),
            "labs": torch.zeros(5, 2),
            "timed": (None, torch.arange(2)),
            "age": torch.tensor(4.0),
        },
        {
            "codes": torch.arange(1),
            "labs": torch.zeros(1, 2),
            "timed": (None, torch.zeros(7, 3)),
            "age": torch.tensor(0),
        },
    ]
    assert _lengths(samples, ["codes", "labs", "timed"]).tolist() == [5, 7]
    assert _lengths([{"age": torch.tensor(4.0)}], ["age"]).tolist() == [1]


def test_batches_hold_every_sample_once_and_like_lengths_together() -> None:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(4, 1, 300)).astype(int) + 1
    batches = _shuffled_batches(np.arange(300), lengths, 16, rng)
    assert sorted(np.concatenate(batches).tolist()) == list(range(300))
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    mixed = np.array_split(rng.permutation(300), len(batches))
    assert padded < 0.6 * sum(len(batch) * lengths[batch].max() for batch in mixed)


def test_a_step_sees_a_part_of_a_long_record_and_all_of_a_short_one() -> None:
    sample = {"long": torch.arange(100), "short": torch.arange(3), "label": torch.ones(1), "patient_id": "p"}
    rng = np.random.default_rng(0)
    first, second = (_subset(sample, ["long", "short"], 0.5, rng) for _ in range(2))
    assert len(first["long"]) == 50
    assert len(set(first["long"].tolist())) == 50
    assert first["long"].tolist() != second["long"].tolist()
    assert sorted(first["short"].tolist()) == [0, 1, 2]
    assert first["label"] is sample["label"]
    assert sample["long"].tolist() == list(range(100))


def test_a_series_is_never_drawn_from() -> None:
    sample = {"labs": torch.rand(50, 4), "timed": (torch.rand(9), torch.arange(9)), "values": torch.rand(30)}
    drawn = _subset(sample, list(sample), 0.5, np.random.default_rng(0))
    assert all(drawn[key] is sample[key] for key in sample)
