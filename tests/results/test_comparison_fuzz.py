"""Mutated folders compared, grouped and shown: each gives what it says, or one line."""

import math
import random
import warnings
from pathlib import Path

import polars as pl
import pytest

from rollout.results.attributions import CohortAttributions
from rollout.results.comparison import compare_cohorts
from rollout.results.notebook import show_record
from rollout.results.told_comparison import told_comparison, told_groups
from tests.support.bounds import bounded, refused
from tests.support.mutated_runs import mutated
from tests.support.written_run import Record, Run, write_run

PARTS, SEEDS = 5, 60
GROUPS = {"a": "one", "b": ["one", "two"], "x": "one"}


def base_run(folder: Path, seed: int) -> Path:
    codes, draw = random.Random(0), random.Random(seed)
    records = []
    for i in range(9):
        features = {
            "drugs": [(codes.choice("abcd"), draw.random()) for _ in range(2 + i % 4)],
            "visits": [([codes.choice("xyz") for _ in range(1 + i % 3)], draw.random()) for _ in range(1 + i % 2)],
            "stays": [(codes.choice("st"), draw.random(), float(step)) for step in range(2)],
        }
        records.append(Record(f"p{i // 2}", features, (draw.random(),), (float(i % 2),)))
    folder.mkdir(parents=True)
    return write_run(folder, records, Run("complete", model="m.Other", names={"drugs": {"a": "Aspirin"}}))


def end(folder: Path, other: Path, seed: int) -> str:
    what = mutated(random.Random(seed), folder)
    try:
        with bounded(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is not complete.*")
            try:
                found = compare_cohorts(folder, other, minimum_records=0, draws=40, flips=999)
                cohort = CohortAttributions(folder)
                groups = [
                    (feature, cohort.top_groups(feature, GROUPS, minimum_records=0, draws=40))
                    for feature in cohort.features
                ]
            except ValueError as error:
                refused(error)
                return "refused"
            texts = [told_comparison(found), *(told_groups(table, cohort, name) for name, table in groups)]
            for text in texts:
                assert all(line.isprintable() for line in text.split("\n"))
            numbers = cohort.predictions.select("sample").collect()["sample"].to_list()
            shown = [cohort, found, *(show_record(cohort.sample(number), cohort.names) for number in numbers[:2])]
            assert all("<table>" in one._repr_html_() for one in shown if len(one._repr_html_()))
        check(found.table)
        for _, table in groups:
            check(table)
        return "read"
    except BaseException as error:
        error.add_note(f"seed {seed}: {what} in {folder}")
        raise


def check(table: pl.DataFrame) -> None:
    """Numbers are numbers or null, and an interval's ends are in order."""
    for name, kind in table.schema.items():
        if kind == pl.Float64:
            assert all(math.isfinite(value) for value in table[name].drop_nulls()), name
    for low, high in [(name, f"{name[:-3]}high") for name in table.columns if name.endswith("low")]:
        assert (table[low] <= table[high]).all()


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, PARTS))])
def test_a_mutated_folder_is_compared_or_refused_in_one_line(
    tmp_path: Path, part: int, capfd: pytest.CaptureFixture
) -> None:
    other, ends = base_run(tmp_path / "other", 2), []
    for seed in range(part * SEEDS, (part + 1) * SEEDS):
        ends.append(end(base_run(tmp_path / str(seed), 1), other, seed))
    assert ends.count("read") >= SEEDS // 8
    assert ends.count("refused") >= SEEDS // 3
    assert capfd.readouterr().err == ""
