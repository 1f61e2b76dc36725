"""Attribution rows against a slow computation from the raw samples, and the files they are written to."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyhealth.datasets import create_sample_dataset
from pyhealth.datasets.utils import collate_fn_dict_with_padding
from pyhealth.processors import SequenceProcessor

from rollout.cohort.rows import feature_decoders, measured_rows, prediction_table, write_parquet
from rollout.results.layout import ATTRIBUTION_SCHEMA, PREDICTION_SCHEMA

SCHEMA = {
    "flat": "sequence",
    "nested": "nested_sequence",
    "timed": "stagenet",
    "timed_nested": "stagenet",
    "labs": "stagenet_tensor",
    "vector": "tensor",
    "hot": "multi_hot",
    "nested_hot": "nested_multihot",
}
RAW: list[dict[str, Any]] = [
    {
        "patient_id": "p0", "visit_id": "v0", "flat": ["a", "b", "new"], "nested": [["x", "y"], [], ["z"]],
        "timed": ([0.0, 1.5], ["k", "l"]), "timed_nested": ([0.0, 2.0], [["m"], ["n", "o"]]),
        "labs": ([0.0, 1.0, 4.0], [[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]), "vector": [0.5, 0.0, 2.0],
        "hot": ["red", "blue"], "nested_hot": [["s", "t"], ["u"]], "label": 1,
    },
    {
        "patient_id": "p1", "visit_id": "v1", "flat": ["c"], "nested": [["z"]],
        "timed": (None, ["l", "k", "k"]), "timed_nested": ([3.0], [["o"]]),
        "labs": ([2.0], [[5.0, 6.0]]), "vector": [1.0, 1.0, 1.0],
        "hot": ["green"], "nested_hot": [["u"]], "label": 0,
    },
    {
        "patient_id": "p2", "visit_id": "v2", "flat": ["b", "a"], "nested": [["y"], ["x", "x", "z"]],
        "timed": ([7.0], ["m"]), "timed_nested": ([0.0, 1.0, 9.0], [["m", "n"], ["o"], ["m"]]),
        "labs": ([0.0, 5.0], [[0.0, 0.0], [1.0, 1.0]]), "vector": [0.0, 0.0, 0.0],
        "hot": ["blue"], "nested_hot": [["t"], ["s"], ["t", "u"]], "label": 1,
    },
]  # fmt: skip
VECTOR = ["blue", "green", "red"]
MULTI = ["s", "t", "u"]


@pytest.fixture(scope="module")
def dataset() -> Any:
    known = SequenceProcessor()
    known.fit([{"flat": ["a", "b", "c"]}], "flat")
    return create_sample_dataset(RAW, SCHEMA, {"label": "binary"}, input_processors={"flat": known})


@pytest.fixture(scope="module")
def samples(dataset: Any) -> list[dict[str, Any]]:
    by_id = {sample["visit_id"]: sample for sample in dataset}
    return [by_id[raw["visit_id"]] for raw in RAW]


def relevance(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Scores in the shapes an interpreter returns: of the padded values, one per visit copied to its codes."""
    batch, generator = collate_fn_dict_with_padding(samples), torch.Generator().manual_seed(0)
    scores = {}
    for key in SCHEMA:
        value = batch[key][1] if isinstance(batch[key], tuple) else batch[key]
        steps = (len(samples), 1) if key in ("vector", "hot") else value.shape[:2]
        score = torch.rand(steps, generator=generator)
        scores[key] = score.unsqueeze(-1).expand(value.shape) if value.dim() == 3 else score
    return scores


def slow_rows(feature: str, scores: torch.Tensor, index: list[int]) -> list[tuple]:
    """(sample, patient, visit_id, feature, visit, position, code, time, attribution), from the raw samples."""
    rows = []
    for b, raw in enumerate(RAW):
        value, times = raw[feature], None
        if isinstance(value, tuple):
            times, value = value
        for place, entry in enumerate(value):
            time = None if times is None else times[place]
            head = (index[b], raw["patient_id"], raw["visit_id"], feature)
            if feature in ("vector", "hot"):
                score = float(scores[b, 0])
                if feature == "hot":
                    rows.append((*head, None, VECTOR.index(entry), entry, None, score))
                elif place == 0:
                    rows.append((*head, None, 0, None, None, score))
            elif feature == "labs":
                rows.append((*head, None, place, None, time, float(scores[b, place, 0])))
            elif isinstance(entry, list):
                for position, code in enumerate(entry):
                    where = MULTI.index(code) + 2 if feature == "nested_hot" else position
                    rows.append((*head, place, where, code, time, float(scores[b, place].flatten()[0])))
            else:
                rows.append((*head, None, place, "<unk>" if entry == "new" else entry, time, float(scores[b, place])))
    return rows


def as_tuples(table: pa.Table) -> list[tuple]:
    return [tuple(row.values()) for row in table.to_pylist()]


def in_order(rows: list[tuple]) -> list[tuple]:
    return sorted(rows, key=lambda row: (row[0], -1 if row[4] is None else row[4], row[5]))


@pytest.mark.parametrize("feature", list(SCHEMA))
def test_rows_are_those_of_the_raw_samples(dataset: Any, samples: list[dict[str, Any]], feature: str) -> None:
    scores, index = relevance(samples)[feature], [40, 41, 57]
    table, _ = measured_rows(samples, index, {feature: scores}, feature_decoders(dataset))
    assert table.schema == ATTRIBUTION_SCHEMA
    assert as_tuples(table) == in_order(slow_rows(feature, scores, index))


def test_a_batch_of_all_features_round_trips_through_parquet(
    dataset: Any, samples: list[dict[str, Any]], tmp_path: Path
) -> None:
    scores = relevance(samples)
    table, _ = measured_rows(samples, np.arange(3), scores, feature_decoders(dataset))
    path = write_parquet(table, tmp_path / "attributions" / "part-00000.parquet")
    read = pq.read_table(path)
    assert read.schema == ATTRIBUTION_SCHEMA
    expected = [row for key in SCHEMA for row in in_order(slow_rows(key, scores[key], [0, 1, 2]))]
    assert as_tuples(read) == expected
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_scores_in_half_precision_or_with_a_gradient_are_taken(dataset: Any, samples: list[dict[str, Any]]) -> None:
    score = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0, 0], [0.5, 0.5, 0]], dtype=torch.bfloat16, requires_grad=True)
    table, _ = measured_rows(samples, [0, 1, 2], {"flat": score}, feature_decoders(dataset))
    assert table["attribution"].to_pylist() == [0.5, 0.25, 0.25, 1.0, 0.5, 0.5]


def test_padding_of_the_batch_leaves_no_rows(dataset: Any, samples: list[dict[str, Any]]) -> None:
    wide = torch.nn.functional.pad(torch.full((3, 3), 1 / 3), (0, 97), value=9.0)
    table, _ = measured_rows(samples, [0, 1, 2], {"flat": wide}, feature_decoders(dataset))
    assert table.num_rows == 6
    assert set(table["attribution"].to_pylist()) == {np.float32(1 / 3)}


def test_a_sample_without_ids_has_null_ids(dataset: Any, samples: list[dict[str, Any]]) -> None:
    bare = [{"flat": samples[0]["flat"]}]
    table, _ = measured_rows(bare, [0], {"flat": torch.ones(1, 3)}, feature_decoders(dataset))
    assert table["patient_id"].null_count == table["visit_id"].null_count == 3


def test_an_empty_record_has_no_rows(dataset: Any) -> None:
    empty = [{"patient_id": "p", "flat": torch.empty(0, dtype=torch.long)}]
    table, _ = measured_rows(empty, [0], {"flat": torch.zeros(1, 0)}, feature_decoders(dataset))
    assert table.num_rows == 0
    assert table.schema == ATTRIBUTION_SCHEMA


def test_scores_shorter_than_the_records_are_refused(dataset: Any, samples: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"feature 'flat' must be \[3, S, …\] with S at least 3.*got \[3, 2\]"):
        measured_rows(samples, [0, 1, 2], {"flat": torch.zeros(3, 2)}, feature_decoders(dataset))
    with pytest.raises(ValueError, match=r"index must have one number per sample \(3\), got 2"):
        measured_rows(samples, [0, 1], {"flat": torch.zeros(3, 3)}, feature_decoders(dataset))


def test_granularity_says_what_a_row_stands_for(dataset: Any) -> None:
    kinds = {key: decoder.granularity for key, decoder in feature_decoders(dataset).items()}
    assert kinds == {
        "flat": "code", "timed": "code", "hot": "feature",
        "nested": "visit", "timed_nested": "visit", "nested_hot": "visit",
        "labs": "step", "vector": "step",
    }  # fmt: skip


def test_predictions_are_lists(samples: list[dict[str, Any]]) -> None:
    table = prediction_table(samples, [4, 5, 6], torch.tensor([[0.25], [0.5], [1.0]]), np.array([[1.0], [0.0], [1.0]]))
    assert table.schema == PREDICTION_SCHEMA
    assert table["sample"].to_pylist() == [4, 5, 6]
    assert table["y_prob"].to_pylist() == [[0.25], [0.5], [1.0]]
    assert table["y_true"].to_pylist() == [[1.0], [0.0], [1.0]]
    several = prediction_table(samples, [0, 1, 2], torch.tensor([[0.25, 0.75]] * 3), None)
    assert several["y_prob"].to_pylist() == [[0.25, 0.75]] * 3
    assert several["y_true"].null_count == 3


def test_a_failed_write_leaves_neither_file_nor_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"x": [1, 2]})
    write_parquet(table, tmp_path / "a.parquet")

    def torn(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", torn)
    with pytest.raises(OSError, match="disk full"):
        write_parquet(pa.table({"x": [3]}), tmp_path / "a.parquet")
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet"]
    assert pq.read_table(tmp_path / "a.parquet")["x"].to_pylist() == [1, 2]
