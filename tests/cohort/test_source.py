"""What a cohort run knows of PyHealth's datasets beside their samples: units of time, names of labels."""

import json
from datetime import datetime, timedelta

import numpy as np
import pyhealth.tasks
import pytest
import torch
from pyhealth.datasets import create_sample_dataset
from pyhealth.models import Transformer
from pyhealth.processors import get_processor

import rollout
from rollout.cohort.source import _TASK_TIMES, open_source
from rollout.results.attributions import CohortAttributions
from tests.support.pyhealth_models import dataset


@pytest.mark.parametrize("name", sorted(_TASK_TIMES))
def test_tasks_whose_unit_is_known_are_pyhealths(name: str) -> None:
    """Their features take their times from the task, which counts hours."""
    task = getattr(pyhealth.tasks, name)()
    assert task.task_name == name
    timed = {feature for feature, kind in task.input_schema.items() if "time" in get_processor(kind[0])().schema()}
    assert timed == set(_TASK_TIMES[name])
    assert all(unit.startswith("hours since ") for unit in _TASK_TIMES[name].values())


def test_times_of_a_task_are_said_in_its_unit() -> None:
    samples = create_sample_dataset(
        [{"patient_id": "p", "label": i, "icd_codes": ([0.0, 30.5], [["a"], ["b"]]), "labs": ([1.0], [[2.0]])}
         for i in range(2)],
        {"icd_codes": "stagenet", "labs": "stagenet_tensor"}, {"label": "binary"},
        task_name="MortalityPredictionStageNetMIMIC4",
    )  # fmt: skip
    assert open_source(samples).time == {
        "icd_codes": "hours since the admission before (0 for the first)", "labs": "hours since admission"
    }  # fmt: skip
    assert open_source(dataset("stagenet_tensor")).time == {"visits": None, "labs": None}
    assert open_source(dataset("timeseries")).time == {}
    assert open_source(dataset("flat")).time == {}


def test_a_temporal_time_series_counts_hours_itself() -> None:
    start = datetime(2020, 1, 1)
    values = ([start, start + timedelta(hours=3)], np.ones((2, 1)))
    found = get_processor("temporal_timeseries")(sampling_rate=timedelta(minutes=90)).process(values)
    assert found["time"].tolist() == [0.0, 1.5, 3.0]

    class Samples:
        def __init__(self):
            self.input_processors = {"vitals": get_processor("temporal_timeseries")()}

        def __len__(self):
            return 1

        def __getitem__(self, number):
            return {}

    assert open_source(Samples(), collate=list).time == {"vitals": "hours since the first observation"}


def test_labels_are_named_in_the_manifest(tmp_path) -> None:
    raw = [{"patient_id": f"p{i}", "label": ["long", "short", "none"][i % 3], "codes": ["a", "b"]} for i in range(7)]
    samples = create_sample_dataset(raw, {"codes": "sequence"}, {"label": "multiclass"})
    torch.manual_seed(0)
    rollout.attribute_cohort(Transformer(samples, embedding_dim=16), samples, tmp_path / "out", progress=False)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest["labels"] == {"label": ["long", "none", "short"]}
    assert CohortAttributions(tmp_path / "out").labels().rows() == [(0, 3, "long"), (1, 2, "none"), (2, 2, "short")]
