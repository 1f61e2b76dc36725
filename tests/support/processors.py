"""PyHealth's processors, fitted, one of each kind a vocabulary can hold."""

from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from pyhealth import processors

ODD = ["é", "数", 'a"b', "<b>", "two\nlines", "tab\t", "\ud800", " ", "x" * 500]
HOURS = [datetime(2020, 1, 1, k) for k in (0, 2, 5)]
SERIES = (HOURS, np.array([[1.0, 2.0], [3.0, np.nan], [5.0, 6.0]]))
CASES: dict[str, tuple[Any, list[Any], Any]] = {
    "sequence": (processors.SequenceProcessor(), [["a", "b"], ODD], ["b", "new", *ODD]),
    "nested": (processors.NestedSequenceProcessor(padding=2), [[["a"], ["b", "c", "a"]]], [["c"], [], ["new", "a"]]),
    "nested_multihot": (processors.NestedMultiHotProcessor(), [[["a"], ["b", "c"]]], [["c", "a"], ["new"]]),
    "nested_floats": (processors.NestedFloatsProcessor(False, 1), [[[1.0], [2.0, 3.0]]], [[4.0, 5.0], [None]]),
    "deep": (processors.DeepNestedSequenceProcessor(), [[[["a", "b"], ["c"]], [["d"]]]], [[["d"]], [["a"], ["new"]]]),
    "deep_floats": (processors.DeepNestedFloatsProcessor(), [[[[1.0, 2.0], [3.0]]]], [[[4.0]], [[5.0, 6.0], []]]),
    "stagenet": (processors.StageNetProcessor(3), [([0.0, 1.5], [["a"], ["b", "c"]])], ([2.0], [["b", "new"]])),
    "stagenet_flat": (processors.StageNetProcessor(), [([0.0], ["a"])], (None, ["a", "new"])),
    "stagenet_tensor": (processors.StageNetTensorProcessor(), [([0.0], [[1.0, 2.0]])], ([0.5], [[None, 7.0]])),
    "timeseries": (processors.TimeseriesProcessor(timedelta(minutes=90), "zero"), [SERIES], SERIES),
    "temporal": (processors.TemporalTimeseriesProcessor(timedelta(hours=2)), [SERIES], SERIES),
    "tensor": (processors.TensorProcessor(torch.float64, (True, False)), [[[1.0, 2.0]]], [[3.0, 4.0]]),
    "multi_hot": (processors.MultiHotProcessor(), [["red", "blue"], ["green"]], ["green", "red"]),
    "raw": (processors.RawProcessor(), ["text"], "other text"),
    "binary": (processors.BinaryLabelProcessor(), [False, True], True),
    "multiclass": (processors.MultiClassLabelProcessor(), ["b", "c", "a"], "c"),
    "multiclass_numbers": (processors.MultiClassLabelProcessor(), [7, np.int64(3), 5], 7),
    "multilabel": (processors.MultiLabelProcessor(), [["u", "v"], ["w"]], ["w", "u"]),
    "regression": (processors.RegressionLabelProcessor(), [1.0], 2.5),
}


def dataset(**features: Any) -> Any:
    return SimpleNamespace(input_processors=features, output_processors={"label": fitted("binary")})


def fitted(case: str) -> Any:
    processor, values, _ = CASES[case]
    processor = type(processor).__new__(type(processor))
    vars(processor).update({k: dict(v) if isinstance(v, dict) else v for k, v in vars(CASES[case][0]).items()})
    processor.fit([{"x": value} for value in values], "x")
    return processor
