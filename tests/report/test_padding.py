"""Relevance on padding in the report: said, and entries keep the shares they were written with."""

from pathlib import Path

import pytest

from rollout.report.page import render
from rollout.report.sections.patients import patients
from rollout.report.sections.summary import summary
from rollout.results.attributions import CohortAttributions
from tests.support.written_run import Record, Run, write_run

LABS = [(None, 0.2, 1.0), (None, 0.3, 2.0), (None, 0.2, 3.0)]
"""Rows that hold 0.7 of the relevance; the other 0.3 is on padding."""


def cohort(folder: Path, padding: list[list[float | None] | None]) -> CohortAttributions:
    features = {"drugs": [("a", 0.25), ("b", 0.75)], "labs": LABS}
    records = [Record(f"p{i}", features, padding=shares) for i, shares in enumerate(padding)]
    return CohortAttributions(write_run(folder / "run", records, Run()))


def test_relevance_on_padding_is_said_and_not_spread_over_the_entries(tmp_path: Path) -> None:
    read = cohort(tmp_path, [[0.0, 0.3]] * 3 + [[0.0, None]])
    assert summary(read)["padding"] == [
        {"feature": "labs", "samples": 3, "above": 3, "mean": pytest.approx(0.3), "max": pytest.approx(0.3)}
    ]
    drugs, labs = patients(read, "p0")["samples"][0]["features"]
    assert labs["padding"] == pytest.approx(0.3)
    assert drugs["padding"] is None
    assert [place["relevance"] for place in drugs["chips"]] == [0.25, 0.75]
    page = render(read, "p0")
    assert "30.0 % of the relevance lies on padding" in page
    assert "30.0 % of a row on average, 30.0 % at most, in 3 of 3 samples" in page
    assert "<code>--equal-lengths</code>" in page
    assert "Not drawn: the place the model reads, with 20.0 %" in page  # as it was written, of 70 %


def test_nothing_is_said_where_nothing_is_on_padding(tmp_path: Path) -> None:
    read = cohort(tmp_path, [[0.0, 1e-9]] * 2 + [None])
    assert summary(read)["padding"] == []
    page = render(read, "p0")
    assert 'id="padding"' not in page
    assert "lies on padding</small>" not in page
