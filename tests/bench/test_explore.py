"""The cohort that `rollout explore` is measured on, small: the same every time, and every question answered."""

from pathlib import Path

import pytest

pytest.importorskip("pyhealth")

from bench.explore import attribute, draw_samples, measure, questions
from rollout.results.attributions import CohortAttributions
from rollout.results.layout import MANIFEST


def test_a_small_one_is_there_once_and_answers(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    attribute(folder, 2100)
    cohort = CohortAttributions(folder)
    assert (cohort.samples, len(list(cohort.parts())), cohort.manifest["status"]) == (2100, 2, "complete")
    rows, drawn = cohort.attributions.collect(), list(draw_samples(2100))
    assert drawn == list(draw_samples(2100))
    for feature, entries in (
        ("drugs", [code for sample in drawn for code in sample["drugs"][1]]),
        ("conditions", [code for sample in drawn for visit in sample["conditions"] for code in visit]),
    ):
        assert rows.filter(feature=feature).sort("sample", "visit", "position")["code"].to_list() == entries
    written = (folder / MANIFEST).read_bytes()
    attribute(folder, 2100)
    assert (folder / MANIFEST).read_bytes() == written
    found = measure(folder)
    assert found.keys() > questions(2100).keys()
    assert all(found[kind]["median"] > 0 for kind in questions(2100))
    assert 0 < found["MiB after start"] <= found["MiB at most"]
