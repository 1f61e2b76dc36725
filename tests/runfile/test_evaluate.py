"""`rollout evaluate`: from an entry point or a run file, what it prints, what it refuses, and the exit status."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rollout.runfile.evaluate import methods_of, patients_of, planted_of
from tests.support import toy_cohort

ENTRY = """
from tests.support import evaluated, toy_cohort
from tests.support.pyhealth_models import dataset, transformer


def good():
    return transformer("flat"), dataset("flat")


def own():
    return toy_cohort.Attention(), toy_cohort.Records(30), {
        "collate": toy_cohort.collate, "vocabularies": toy_cohort.VOCABULARIES, "explain": toy_cohort.explain,
        "predict": evaluated.predict, "part_samples": 10, "batch_tokens": 60,
    }


def partly():
    return toy_cohort.Attention(), toy_cohort.Records(30, {3: "nan"}), {
        "collate": toy_cohort.collate, "vocabularies": toy_cohort.VOCABULARIES, "explain": toy_cohort.explain,
        "predict": evaluated.predict,
    }


def misspelt():
    return transformer("flat"), dataset("flat"), {"metrics": "eraser"}
"""


@pytest.fixture
def run(command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "entries", raising=False)
    (tmp_path / "entries.py").write_text(ENTRY)
    return partial(command, "evaluate")


def test_an_entry_point_is_evaluated_and_told(run: Any, tmp_path: Path) -> None:
    (tmp_path / "planted.json").write_text(json.dumps({"conditions": ["c1"], "drugs": ["m2"]}))
    options = ("--entry", "entries:good", "--output", "out", "--methods", "rollout,plain=rollout:own_path=false",
               "--methods", "chefer", "--shares", "10,50", "--planted", "planted.json", "--leave-one-out", 20,
    )  # fmt: skip
    status, out, _ = run(*options)
    assert status == 0
    assert out.startswith("6 of 6 samples evaluated: 96 rows, ")
    rows = pl.read_parquet(tmp_path / "out" / "faithfulness" / "*.parquet")
    assert rows["method"].unique(maintain_order=True).to_list() == ["rollout", "plain", "chefer", "random"]
    lines = out.splitlines()
    header = next(line for line in lines if "comprehensiveness" in line)
    assert [part.strip() for part in header.split("  ") if part.strip()] == [
        "comprehensiveness (high is good)", "sufficiency (low is good)", "recall (high is good)",
        "planted AUC (high is good)", "leave one out (high is good)",
    ]  # fmt: skip
    table = {line.split()[0]: line for line in lines if line.split()[:1] and line.split()[0] in ("plain", "random")}
    means = rows.group_by("method", "direction").agg(pl.col("drop").mean())
    for name, line in table.items():
        drop = means.filter((pl.col("method") == name) & (pl.col("direction") == "without"))["drop"][0]
        assert f"{drop:.3f}" in line
    assert any("6 samples of 6 patients; intervals of 95%, by patient" in line for line in lines)
    assert "cohort too small to tell" in out
    assert run(*options)[1].startswith("6 samples, all done before: 6 evaluated, 96 rows")


def test_an_entrys_own_explain_is_a_method(run: Any, tmp_path: Path) -> None:
    status, _, _ = run("--entry", "entries:own", "--output", "out")
    assert status == 0
    rows = pl.read_parquet(tmp_path / "out" / "faithfulness" / "*.parquet")
    assert rows["method"].unique(maintain_order=True).to_list() == ["explain", "random"]
    assert rows["sample"].n_unique() == 30
    assert len(list((tmp_path / "out" / "parts").glob("*.json"))) == 3


def test_an_entrys_explain_that_was_changed_is_another_evaluation(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--entry", "entries:own", "--output", "out")[0] == 0
    own = toy_cohort.explain

    def explain(model: Any, batch: Any) -> Any:
        return replace(own(model, batch), row_sums=True)

    monkeypatch.setattr(toy_cohort, "explain", explain)
    status, _, err = run("--entry", "entries:own", "--output", "out")
    assert status == 2
    assert "methods.explain.code" in err


def test_failed_samples_end_with_status_1(run: Any) -> None:
    status, out, _ = run("--entry", "entries:partly", "--output", "out")
    assert status == 1
    assert "29 of 30 samples evaluated" in out
    assert "1 FAILED" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "evaluate needs a run file or --entry, one of them"),
        (("run.toml", "--entry", "entries:good"), "one of them"),
        (("--entry", "entries:good"), "--entry needs --output"),
        (("--entry", "entries:good", "--output", "out", "--shares", "10;20"), "--shares must be numbers with commas"),
        (
            ("--entry", "entries:good", "--output", "out", "--shares", "0,5"),
            "shares must be one or more numbers in (0, 100]",
        ),
        (
            ("--entry", "entries:good", "--output", "out", "--methods", "rollout,rollout"),
            "--methods names 'rollout' twice",
        ),
        (("--entry", "entries:good", "--output", "out", "--methods", "rolout"), "'rolout' is neither a method"),
        (("--entry", "entries:good", "--output", "out", "--planted", "nowhere.json"), "--planted must be a JSON file"),
        (
            ("--entry", "entries:good", "--output", "out", "--trust-cache"),
            "--trust-cache is for the cache of a run file",
        ),
        (("--entry", "entries:misspelt", "--output", "out"), "returned the argument 'metrics'"),
        (
            ("--entry", "entries:good", "--output", "out", "--local-workers", "2", "--scheduler", "tcp://x:1"),
            "not both",
        ),
        (
            ("--entry", "entries:good", "--output", "out", "--patients", "x.txt"),
            "--patients is for the samples of a run",
        ),
        (("nowhere.toml",), "nowhere.toml"),
    ],
)
def test_what_is_refused(run: Any, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_patients_of_a_file(tmp_path: Path) -> None:
    from rollout.runfile.evaluate import _of_patients
    from tests.support.pyhealth_models import dataset

    path = tmp_path / "patients.txt"
    path.write_text("p4\n\n p1 \n")
    chosen = _of_patients(dataset("flat"), patients_of(path))
    assert [chosen[number]["patient_id"] for number in range(len(chosen))] == ["p1", "p4"]
    with pytest.raises(ValueError, match=r"1 of 2 have no samples here, the first 'p9'; .* of 6 patients"):
        _of_patients(dataset("flat"), ["p1", "p9"])
    path.write_text("\n")
    with pytest.raises(ValueError, match="must hold at least one patient id"):
        patients_of(path)
    with pytest.raises(ValueError, match="--patients must be a text file"):
        patients_of(tmp_path / "nowhere.txt")


def test_methods_by_name() -> None:
    assert methods_of(["rollout, chefer", "own=rollout:own_path=false", "rollout:own_path=false", "old=out/rows"]) == {
        "rollout": "rollout",
        "chefer": "chefer",
        "own": "rollout:own_path=false",
        "rollout:own_path=false": "rollout:own_path=false",
        "old": "out/rows",
    }


def test_planted_codes_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "truth.json"
    rows = [{"code": "a", "log_odds": 1.0}, {"code": "b", "log_odds": -1.0}, {"code": "c", "log_odds": 0.5}]
    path.write_text(json.dumps({"planted": {"drugs": rows}, "patients": 3}))
    assert planted_of(path) == {"drugs": ["a", "c"]}
    path.write_text(json.dumps({"drugs": ["a"]}))
    assert planted_of(path) == {"drugs": ["a"]}
    for wrong in ([], {}, {"drugs": [3]}, {"drugs": "a"}, {"planted": []}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"must be \{feature: \[code, …\]\} or the truth.json"):
            planted_of(path)
