"""Groups of codes over a cohort: by hand, against the codes' own table, and by patient."""

import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from rollout.intervals import bootstrap_means
from rollout.results.attributions import CohortAttributions
from tests.support.written_run import Record, Run, write_run

RECORDS = [
    Record("p0", {"drugs": [("a", 0.6), ("b", 0.3), ("a", 0.1)], "visits": [(["x", "y", "x"], 0.8), (["x"], 0.2)]}),
    Record("p1", {"drugs": [("b", 0.5), ("a", 0.3), ("c", 0.2)]}),
    Record("p0", {"drugs": [("c", 1.0)], "visits": [(["y"], 1.0)]}),
    Record("p2", {"drugs": [("d", 0.75), ("b", 0.25)]}),
]
GROUPS = {"a": "one", "b": ["one", "two"], "c": "two", "x": "v", "y": "v"}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> CohortAttributions:
    return CohortAttributions(write_run(tmp_path_factory.mktemp("run"), RECORDS, part_samples=2))


def test_groups_by_hand(cohort: CohortAttributions) -> None:
    table = cohort.top_groups("drugs", GROUPS, minimum_records=0, read_position=None)
    found = {row[0]: row[1:] for row in table.select(
        "group", "relevance", "lift", "prevalence", "records", "entries", "patients", "codes").rows()}  # fmt: skip
    # one: a and b, over 3, 3, 2 places; two: b and c; d has no group
    assert found == {
        "one": pytest.approx((2.05 / 3, (3 * 1.0 + 3 * (0.5 + 0.3) + 2 * 0.25) / 6, 3 / 4, 3, 6, 3, 2)),
        "two": pytest.approx(((0.3 + 0.7 + 1.0 + 0.25) / 4, (0.9 + 1.5 + 0.6 + 1 + 0.5) / 5, 1.0, 4, 5, 3, 2)),
        None: pytest.approx((0.75, 1.5, 0.25, 1, 1, 1, 1)),
    }
    assert table["group"].to_list() == ["one", "two", None]


def test_a_group_counts_once_in_a_visit(cohort: CohortAttributions) -> None:
    table = cohort.top_groups("visits", GROUPS, minimum_records=0, read_position=None)
    assert table.select("group", "relevance", "records", "entries", "patients").rows() == [
        ("v", pytest.approx(1.0), 2, 3, 1)]  # fmt: skip


def test_groups_of_one_code_are_the_codes(cohort: CohortAttributions) -> None:
    columns = ("relevance", "lift", "prevalence", "records", "entries")
    for feature in ("drugs", "visits"):
        codes = cohort.top_codes(feature, minimum_records=0)
        groups = cohort.top_groups(feature, dict(zip("abcdxy", "abcdxy", strict=True)), minimum_records=0)
        both = codes.join(groups, left_on="code", right_on="group")
        assert both.height == codes.height == groups.height
        for name in columns:
            assert both[name].to_list() == pytest.approx(both[f"{name}_right"].to_list())


def test_intervals_are_of_the_patients_sums(cohort: CohortAttributions, monkeypatch: pytest.MonkeyPatch) -> None:
    table = cohort.top_groups("drugs", GROUPS, minimum_records=0, read_position=None, draws=500, seed=3)
    two = table.filter(pl.col("group") == "two").row(0, named=True)
    # of p0, p1, p2: relevance 1.3, 0.7, 0.25 over 2, 1, 1 records; present in as many of their samples
    totals = np.array([[1.3, 1.9, 2.0], [0.7, 2.1, 1.0], [0.25, 0.5, 1.0]])
    sizes = np.array([[2.0, 2, 2], [1, 2, 1], [1, 1, 1]])
    wanted = bootstrap_means(totals, sizes, draws=500, seed=3)
    for at, name in enumerate(("relevance", "lift", "prevalence")):
        found = [two[name], two[f"{name}_low"], two[f"{name}_high"]]
        assert found == pytest.approx([part[at] for part in wanted], abs=1e-6)
    monkeypatch.setattr("rollout.results.by_patient.CELLS", 3)
    again = cohort.top_groups("drugs", GROUPS, minimum_records=0, read_position=None, draws=500, seed=3)
    assert again.equals(table)


def test_a_cohort_of_one_patient_has_no_intervals_and_one_without_codes_no_groups(tmp_path: Path) -> None:
    labs = {"labs": [(None, 1.0, 1.5)]}
    one = CohortAttributions(write_run(tmp_path / "one", [Record("p", {"drugs": [("a", 1.0)], **labs})] * 3))
    row = one.top_groups("drugs", GROUPS, minimum_records=0, read_position=None).row(0, named=True)
    assert (row["group"], row["relevance"], row["relevance_low"], row["patients"]) == ("one", 1.0, None, 1)
    assert one.top_groups("labs", GROUPS).columns == one.top_groups("drugs", GROUPS).columns
    assert one.top_groups("labs", GROUPS).is_empty()


def test_order_k_and_minimum(cohort: CohortAttributions) -> None:
    def groups(**options: object) -> list[str | None]:
        return cohort.top_groups("drugs", GROUPS, read_position=None, **{"minimum_records": 0, **options})[
            "group"
        ].to_list()  # type: ignore[arg-type]

    assert groups(order="prevalence") == ["two", "one", None]
    assert groups(order="prevalence", k=1) == ["two", None]
    assert groups(minimum_records=4) == ["two"]
    for options, message in (({"order": "size"}, "order must be one of relevance, lift, prevalence, got 'size'"),
                             ({"k": 0}, "k must be an int of at least 1, got 0")):  # fmt: skip
        with pytest.raises(ValueError, match=f"top_groups: {re.escape(message)}"):
            groups(**options)
    with pytest.raises(ValueError, match="feature must be one of"):
        cohort.top_groups("labs", GROUPS)


def test_chapters_of_a_cohort(tmp_path: Path) -> None:
    features = {"conditions": [("I509", 0.5), ("I10", 0.25), ("<unk>", 0.25)]}
    folder = write_run(tmp_path, [Record(f"p{i}", features) for i in range(6)], Run())
    table = CohortAttributions(folder).top_groups("conditions", "icd-chapter", read_position=None)
    assert table.select("group", "relevance", "lift", "codes").rows() == [
        ("ICD-10 I00–I99: Diseases of the circulatory system", 0.75, 1.125, 2), (None, 0.25, 0.75, 1)]  # fmt: skip
