"""The cohort that `rollout explore` is measured on, small: sound, the same every time, and every question answered."""

from pathlib import Path

import polars as pl

from bench.explore import measure, questions, write_large_run
from rollout.results.attributions import CohortAttributions
from rollout.results.verify import verify_folder


def test_a_small_one_is_sound_and_answers(tmp_path: Path) -> None:
    folder = write_large_run(tmp_path / "run", 2100)
    assert verify_folder(folder) == []
    cohort = CohortAttributions(folder)
    assert (cohort.samples, len(list(cohort.parts()))) == (2100, 2)
    rows = cohort.attributions.collect()
    places = rows.with_columns(place=pl.coalesce("visit", "position")).unique(["sample", "feature", "place"])
    sums = places.group_by("sample", "feature")
    assert sums.agg(pl.col("attribution").sum())["attribution"].is_between(0.999, 1.001).all()
    again = write_large_run(tmp_path / "again", 2100)
    assert CohortAttributions(again).attributions.collect().equals(rows)
    found = measure(folder, 2100)
    assert set(questions(2100)) <= set(found)
    assert 0 < found["MiB after start"] <= found["MiB at most"]
