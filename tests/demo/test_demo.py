"""The demo end to end on a small synthetic cohort: its folder, its rows, and the table it prints."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from pyhealth.interpret.methods import AttentionRollout as StockRollout
from typer.testing import CliRunner

import rollout.demo.run
from rollout.cli import app
from rollout.data.collate import pyhealth_collate
from rollout.data.mimic import mortality_samples
from rollout.data.synthetic import write_synthetic_cohort
from rollout.demo.training import Recipe, predict, train_transformer

PATIENTS = 500


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, home: Path) -> dict[str, Any]:
    """One run by the command line, with the samples and the model it used."""
    output, kept = tmp_path_factory.mktemp("demo") / "out", {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))

        def trained(dataset: Any, samples: Any, *arguments: Any, **named: Any) -> Any:
            result = train_transformer(dataset, samples, *arguments, **named)
            kept.update(samples=samples, model=result.model)
            return result

        patch.setattr(rollout.demo.run, "train_transformer", trained)
        arguments = ["demo", "--output", output, "--patients", PATIENTS, "--epochs", 2, "--batch-size", 24]
        result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = pl.read_parquet(output / "attributed" / "attributions" / "*.parquet")
    return {"output": output, "printed": result.output, "rows": rows, **kept}


def test_the_folder_holds_the_results_and_the_home_no_cache(run: dict[str, Any], home: Path) -> None:
    names = {path.name for path in run["output"].iterdir()}
    assert names == {"attributed", "evaluated", "cohort", ".pyhealth-cache", "run.toml", "weights.pt",
                     "vocabulary.json", "test_patients.txt", "ranking.csv", "top_codes.png", "record.png",
                     "faithfulness.png", "report.html", "demo.json"}  # fmt: skip
    assert names == set(rollout.demo.run.WRITTEN)
    assert not [path for path in home.rglob("*") if path.is_file() and path.suffix in (".bin", ".parquet")]


def attribute(*arguments: object) -> str:
    """What `rollout attribute` prints; it must end well."""
    result = CliRunner().invoke(app, ["attribute", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_its_run_file_is_complete_and_elsewhere_gives_equal_rows(run: dict[str, Any], tmp_path: Path) -> None:
    count, rows = len(run["samples"]), run["rows"]
    printed = attribute(run["output"] / "run.toml")
    assert printed.startswith(f"{count} samples, all done before: {count} attributed, {len(rows):,} rows")
    moved = shutil.copytree(run["output"], tmp_path / "moved")
    printed = attribute(moved / "run.toml", "--output", tmp_path / "again")
    assert printed.startswith(f"{count} of {count} samples attributed: {len(rows):,} rows")
    assert pl.read_parquet(tmp_path / "again" / "attributions" / "*.parquet").equals(rows)
    before, after = (
        pl.read_parquet(p / "predictions" / "*.parquet") for p in (moved / "attributed", tmp_path / "again")
    )
    assert before.equals(after)


def test_every_code_of_every_sample_has_a_row(run: dict[str, Any]) -> None:
    rows, samples = run["rows"], run["samples"]
    lengths = rows.group_by("sample", "feature").len().sort("sample", "feature")
    expected = [(i, f, len(s[f])) for i, s in enumerate(samples) for f in sorted(("conditions", "procedures", "drugs"))]
    assert lengths.rows() == expected
    owners = rows.select("sample", "patient_id", "visit_id").unique().sort("sample")
    assert owners.rows() == [(i, s["patient_id"], str(s["visit_id"])) for i, s in enumerate(samples)]


def test_rows_are_pyhealths_own_attributions(run: dict[str, Any]) -> None:
    samples, stock = run["samples"], StockRollout(run["model"])
    chosen = [0, len(samples) // 2, len(samples) - 1]
    batch = pyhealth_collate([samples[i] for i in chosen])
    scores = stock.attribute(**batch)
    for k, sample in enumerate(chosen):
        for feature in ("conditions", "procedures", "drugs"):
            part = run["rows"].filter((pl.col("sample") == sample) & (pl.col("feature") == feature)).sort("position")
            size = len(samples[sample][feature])
            expected = scores[feature][k, :size].detach().numpy()
            np.testing.assert_allclose(part["attribution"].to_numpy(), expected, atol=1e-6)
            assert part["attribution"].sum() == pytest.approx(1.0, abs=1e-5)


def test_codes_are_those_of_the_tables(run: dict[str, Any]) -> None:
    table = pl.read_csv(run["output"] / "cohort" / "hosp" / "diagnoses_icd.csv.gz", infer_schema=False)
    written = run["rows"].filter(pl.col("feature") == "conditions").select("visit_id", "code").sort("visit_id", "code")
    source = table.filter(pl.col("hadm_id").is_in(written["visit_id"].unique().to_list()))
    assert written.rows() == source.select("hadm_id", "icd_code").sort("hadm_id", "icd_code").rows()


def test_predictions_are_the_models(run: dict[str, Any]) -> None:
    table = pl.read_parquet(run["output"] / "attributed" / "predictions" / "*.parquet").sort("sample")
    samples = run["samples"]
    again = predict(run["model"], samples, np.arange(len(samples)), batch_size=7, progress=False)
    np.testing.assert_allclose(np.array(table["y_prob"].to_list())[:, 0], again, atol=1e-5)
    assert [row[0] for row in table["y_true"]] == [float(s["mortality"]) for s in samples]


def test_the_label_is_death_in_the_next_admission(run: dict[str, Any]) -> None:
    table = pl.read_csv(run["output"] / "cohort" / "hosp" / "admissions.csv.gz", infer_schema=False)
    table = table.sort("subject_id", "admittime").with_columns(
        died_next=pl.col("hospital_expire_flag").shift(-1).over("subject_id")
    )
    died = dict(zip(table["hadm_id"], table["died_next"], strict=True))
    labels = [float(sample["mortality"]) for sample in run["samples"]]
    assert labels == [float(died[str(sample["visit_id"])]) for sample in run["samples"]]
    assert 0.15 < np.mean(labels) < 0.5


def test_the_printed_table_agrees_with_the_files(run: dict[str, Any]) -> None:
    printed, rows = run["printed"], run["rows"]
    figures = json.loads((run["output"] / "demo.json").read_text())
    manifest = json.loads((run["output"] / "attributed" / "manifest.json").read_text())
    patients = len({sample["patient_id"] for sample in run["samples"]})
    assert f"{len(run['samples']):,} ({patients:,})" in printed
    assert re.search(rf"tokens +{len(rows):,}\n", printed)
    assert manifest["counts"]["rows"] == figures["tokens"] == len(rows)
    assert (manifest["status"], figures["status"]) == ("complete", "complete")
    assert re.search(rf"test AUROC +{figures['test_auroc']:.3f} ", printed)
    assert re.search(r"whole cohort, rows written +[\d,]+ samples/s\n", printed)
    rates = [float(r.replace(",", "")) for r in re.findall(r"([\d,]+) patients/s", printed)]
    assert len(rates) == 2
    assert min(rates) > 0
    difference = float(re.search(r"largest difference between the two +(\S+)", printed).group(1))
    assert difference == pytest.approx(figures["largest_difference"], rel=0.05)
    assert difference <= 1e-5


def test_planted_codes_are_marked_and_counted(run: dict[str, Any]) -> None:
    truth = json.loads((run["output"] / "cohort" / "truth.json").read_text())
    ranking = pl.read_csv(run["output"] / "ranking.csv", schema_overrides={"code": pl.String})
    total = 0
    for feature, planted in truth["planted"].items():
        codes = {row["code"] for row in planted}
        leaders = ranking.filter(pl.col("feature") == feature).sort("rank")["code"].to_list()
        total += len(codes & set(leaders[: len(codes)]))
        for code in leaders[:8]:
            line = next(line for line in run["printed"].splitlines() if re.search(rf"\b{code}\b", line))
            assert ("★" in line) == (code in codes)
    assert f"k = planted codes there): {total} of 11" in run["printed"]


def test_methods_are_scored_on_the_test_patients(run: dict[str, Any], tmp_path: Path) -> None:
    """And the same patients by the run file are scored the same; the report shows it."""
    output, printed = run["output"], run["printed"]
    patients = (output / "test_patients.txt").read_text().split()
    predictions = pl.read_parquet(output / "evaluated" / "predictions" / "*.parquet")
    assert predictions["patient_id"].unique(maintain_order=True).to_list() == patients
    assert 0 < len(patients) < 0.4 * len({sample["patient_id"] for sample in run["samples"]})
    rows = pl.read_parquet(output / "evaluated" / "faithfulness" / "*.parquet")
    assert rows["method"].unique(maintain_order=True).to_list() == [*rollout.demo.run.COMPARED, "random"]
    scores = pl.read_parquet(output / "evaluated" / "scores" / "*.parquet")
    for method in ("rollout", "random"):
        mine = pl.col("method") == method
        line = next(line for line in printed.splitlines() if line.startswith(f"{method} "))
        drop = rows.filter(mine & (pl.col("direction") == "without"))["drop"].mean()
        assert f"{drop:.3f}" in line
        assert f"{scores.filter(mine)['recall'].mean():.3f}" in line
    truth, again = output / "cohort" / "truth.json", tmp_path / "again"
    arguments = ["evaluate", output / "run.toml", "--output", again, "--methods", ",".join(rollout.demo.run.COMPARED),
                 "--patients", output / "test_patients.txt", "--planted", truth]  # fmt: skip
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for kind in ("faithfulness", "scores", "predictions"):
        one, other = (pl.read_parquet(out / kind / "*.parquet") for out in (output / "evaluated", again))
        assert one.equals(other, null_equal=True), kind
    assert "Is it true?" in (output / "report.html").read_text(encoding="utf-8")


def test_the_report_is_one_page_with_the_names_of_the_codes(run: dict[str, Any]) -> None:
    page = (run["output"] / "report.html").read_text(encoding="utf-8")
    names = json.loads((run["output"] / "attributed" / "code_names.json").read_text(encoding="utf-8"))
    top = pl.read_csv(run["output"] / "ranking.csv", schema_overrides={"code": pl.String})
    assert page.lstrip().lower().startswith("<!doctype html")
    assert set(names) == {"conditions", "procedures", "drugs"}
    assert set(top.filter(pl.col("feature") == "conditions")["code"]) <= set(names["conditions"])
    assert sum(name in page for name in names["conditions"].values()) >= 3


def test_an_unfinished_demo_can_be_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rollout.demo.run, "prepare_samples", stopped)
    for overwrite in (False, True):
        with pytest.raises(KeyboardInterrupt):
            rollout.demo.run.run_demo(tmp_path / "out", patients=20, overwrite=overwrite)
        assert json.loads((tmp_path / "out" / "demo.json").read_text())["status"] == "running"
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        rollout.demo.run.run_demo(tmp_path / "out", patients=20)


def test_pictures_are_large_enough_to_read_and_not_blank(run: dict[str, Any]) -> None:
    for name in ("top_codes.png", "record.png", "faithfulness.png"):
        with Image.open(run["output"] / name) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert pixels.shape[0] >= 700
        assert pixels.shape[1] >= 1200
        assert pixels[0, 0].tolist() == [255, 255, 255]
        assert 0.02 < (pixels.min(axis=2) < 250).mean() < 0.6


def test_training_is_deterministic_and_leaves_the_generator_alone(run: dict[str, Any], tmp_path: Path) -> None:
    write_synthetic_cohort(tmp_path / "tables", 150, 1)
    dataset = mortality_samples(tmp_path / "tables", tmp_path / "cache")
    samples = list(dataset)
    split = rollout.demo.run.split_patients(
        [s["patient_id"] for s in samples], np.array([float(s["mortality"]) for s in samples])
    )
    before = torch.get_rng_state()
    models = [train_transformer(dataset, samples, split, Recipe(epochs=1), seed=s).model for s in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    states = [torch.cat([p.flatten() for p in model.state_dict().values()]) for model in models]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_a_cohort_without_a_second_admission_is_refused(tmp_path: Path) -> None:
    write_synthetic_cohort(tmp_path / "tables", 3, 0)
    path = tmp_path / "tables" / "hosp" / "admissions.csv.gz"
    table = pl.read_csv(path, infer_schema=False).sort("subject_id", "admittime").unique("subject_id", keep="first")
    path.unlink()
    table.write_csv(path.with_suffix(""))
    with pytest.raises(ValueError, match="PyHealth made no MortalityPredictionMIMIC4 samples of the tables in"):
        mortality_samples(tmp_path / "tables", tmp_path / "cache")
