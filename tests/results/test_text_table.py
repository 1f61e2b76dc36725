"""Tables for a terminal and a spreadsheet: nothing of the data acts in them."""

import csv
import io
import re
from pathlib import Path

import polars as pl
import pytest

from rollout.results.attributions import CohortAttributions
from rollout.results.comparison import compare_cohorts
from rollout.results.text_table import aligned, cell, csv_target, interval, write_csv
from rollout.results.told_comparison import told_comparison, told_groups
from tests.support.hostile_runs import PAYLOADS
from tests.support.written_run import Record, Run, write_run


def test_columns_are_aligned_and_numbers_told() -> None:
    assert aligned([["", "a"], ["long", "b"]]) == ["      a", "long  b"]
    assert interval(0.12345, 0.1, 0.2) == "0.123 [0.100, 0.200]"
    assert (interval(0.5, None, None, "+.1f"), interval(None, None, None)) == ("+0.5", "–")
    assert (cell(None), cell("")) == ("", "")
    assert cell("a\n\x1b[31m\u202eb" + "x" * 90) == "a \\x1b[31m\\u202eb" + "x" * 42 + "…"


def test_a_csv_comes_back_but_for_what_a_spreadsheet_would_run(tmp_path: Path) -> None:
    codes = ["=cmd()", "+1", "-1", "@x", "\t=1", "\r=1", 'a,"b"\nc', "病", "", None]
    table = pl.DataFrame({"code": codes, "value": [-1.5, *range(9)]}, strict=False)
    path = write_csv(table, tmp_path / "t.csv")
    rows = list(csv.reader(io.StringIO(path.read_bytes().decode(), newline="")))
    assert rows[0] == ["code", "value"]
    assert [one[0] for one in rows[1:]] == [*(f"'{code}" for code in codes[:6]), *codes[6:9], ""]
    assert rows[1][1] == "-1.5"  # a number is no formula
    before = path.read_bytes()
    for target, message in (
        (path, "csv must be a new file, got"),
        (tmp_path / "no" / "t.csv", "in a folder that exists"),
    ):
        with pytest.raises(ValueError, match=message):
            write_csv(table, target)
        with pytest.raises(ValueError, match=message):
            csv_target(target)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["t.csv"]


def test_hostile_codes_are_told_in_plain_lines(tmp_path: Path) -> None:
    runs = []
    for name, shares in (("a", (0.5, 0.25)), ("b", (0.75, 0.125))):
        (tmp_path / name).mkdir()
        entries = [(code, shares[place % 2]) for place, code in enumerate(PAYLOADS[:50])]
        records = [Record(f"p{n}{PAYLOADS[n]}", {"f" + PAYLOADS[3]: entries}) for n in range(6)]
        names = {"f" + PAYLOADS[3]: {code: PAYLOADS[0] + code for code in PAYLOADS}}
        runs.append(write_run(tmp_path / name, records, Run(model="m." + PAYLOADS[24], names=names)))
    found = compare_cohorts(*runs)
    cohort, feature = CohortAttributions(runs[0]), "f" + PAYLOADS[3]
    groups = cohort.top_groups(feature, dict.fromkeys(PAYLOADS, PAYLOADS[24:27]))
    for text in (told_comparison(found, 50), told_groups(groups, cohort, feature)):
        assert all(line.isprintable() and len(line) < 400 for line in text.split("\n"))
    assert len(told_comparison(found, 5).split("\n")) == 4 + 1 + 3 + 5 + 2
    assert re.search(r"(\d+) more codes", told_comparison(found, 5))
