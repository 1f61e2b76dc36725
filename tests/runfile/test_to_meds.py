"""`rollout meds`: a run's attributions as MEDS, each on the event it is of; predictions; what is refused."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

import rollout
from rollout.data.meds import MedsDataset
from rollout.runfile import to_meds
from rollout.runfile.file import read_run_file
from rollout.runfile.start import attribute_run_file
from tests.support.meds_folder import change

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'attention-rollout[hf]'")
from tests.support.classifiers import VOCABULARY, home


@pytest.fixture
def attributed(tmp_path: Path) -> Path:
    file = home(tmp_path)
    attribute_run_file(file, progress=False)
    return file


def test_each_event_has_its_attribution(attributed: Path, tmp_path: Path, command: Any) -> None:
    out = tmp_path / "out"
    status, said, err = command("meds", "attributions", attributed, out)
    assert status == 0, err
    files = sorted(path.relative_to(out / "data").as_posix() for path in (out / "data").rglob("*.parquet"))
    assert files == ["held_out/0.parquet", "train/0.parquet", "train/1.parquet"]
    rows = pl.concat([pl.read_parquet(path) for path in sorted((out / "data").rglob("*.parquet"))])
    assert said == f"{len(rows):,} events of 48 records, 48 predictions: {out}\n"
    cohort, dataset = rollout.CohortAttributions(tmp_path / "attributed"), read_run_file(attributed).samples()
    for number in (0, 13, 47):
        mine, events = rows.filter(sample=number).sort("position"), dataset.events(number)
        assert mine["subject_id"].unique().to_list() == [dataset.labels["subject_id"][number]]
        assert mine["prediction_time"].unique().to_list() == [dataset.labels["prediction_time"][number]]
        for column in ("time", "code", "numeric_value"):
            assert mine[column].to_list() == events[column].to_list()
        assert mine["attribution"].to_list() == cohort.sample(number)["attribution"].to_list()
        assert mine["token"].to_list() == [one if one in VOCABULARY else "[UNK]" for one in mine["code"]]
    assert "GENDER//F" in set(rows.filter(token="[UNK]")["code"])
    assert len(rows) == cohort.attributions.select(pl.len()).collect().item()
    assert json.loads((out / "metadata/manifest.json").read_text()) == cohort.manifest
    codes = pl.read_parquet(out / "metadata/codes.parquet")
    assert set(codes["code"]) == set(rows["code"])
    assert codes.filter(code="LAB//HR").row(0) == ("LAB//HR", "The name of LAB//HR", ["LAB"])


def test_predictions_are_those_of_meds_evaluation(attributed: Path, tmp_path: Path) -> None:
    to_meds.write_run_file(attributed, tmp_path / "out")
    found = pl.read_parquet(tmp_path / "out/predictions.parquet")
    assert found.schema == {
        "subject_id": pl.Int64, "prediction_time": pl.Datetime("us"), "boolean_value": pl.Boolean,
        "predicted_boolean_value": pl.Boolean, "predicted_boolean_probability": pl.Float64,
    }  # fmt: skip
    labels = pl.read_parquet(tmp_path / "meds/labels/dies.parquet")
    keys = ["subject_id", "prediction_time"]
    assert found.select(*keys, "boolean_value").sort(keys).equals(labels.sort(keys))
    mine = rollout.CohortAttributions(tmp_path / "attributed").predictions.collect()
    assert found["predicted_boolean_probability"].to_list() == mine["y_prob"].list.first().to_list()
    assert (found["predicted_boolean_value"] == (found["predicted_boolean_probability"] >= 0.5)).all()


def test_the_folder_is_of_the_packages_schema(attributed: Path, tmp_path: Path) -> None:
    meds = pytest.importorskip("meds", reason="meds is not installed: pip install 'attention-rollout[dev]'")
    to_meds.write_run_file(attributed, out := tmp_path / "out")
    subjects: list[int] = []
    for file in sorted((out / "data").rglob("*.parquet")):
        table = pq.ParquetFile(file).read()
        meds.DataSchema.validate(table)
        frame: Any = pl.from_arrow(table)
        assert frame.equals(frame.sort("subject_id", "time", nulls_last=False, maintain_order=True))
        subjects.extend(frame["subject_id"].unique())
    assert len(subjects) == len(set(subjects)) == 24
    meds.CodeMetadataSchema.validate(pq.ParquetFile(out / "metadata/codes.parquet").read())
    meds.DatasetMetadataSchema.validate(json.loads((out / "metadata/dataset.json").read_text()))


def test_failed_records_are_left_out(tmp_path: Path) -> None:
    file = home(tmp_path, max_position_embeddings=17)
    run = attribute_run_file(file, progress=False)
    written = to_meds.write_run_file(file, tmp_path / "out")
    assert written.samples == written.predictions == 48 - run.failed < 48


def test_a_task_of_several_classes_has_no_predictions(tmp_path: Path) -> None:
    file = home(tmp_path, num_labels=3)
    change(tmp_path / "meds/labels/dies.parquet", boolean_value=None, integer_value=pl.lit(2, pl.Int64))
    attribute_run_file(file, progress=False)
    written = to_meds.write_run_file(file, tmp_path / "out")
    assert str(written).startswith(
        f"{written.rows:,} events of 48 records, no predictions.parquet: the task is not binary"
    )
    assert not (tmp_path / "out/predictions.parquet").exists()


def test_what_is_refused(attributed: Path, tmp_path: Path, command: Any) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").touch()
    out = tmp_path / "out"
    for arguments, message in (
        ((attributed, full), "out must be a new or empty folder"),
        ((attributed, out, "--attributed", tmp_path / "nowhere"), "no such folder"),
        ((tmp_path / "nowhere.toml", out), "nowhere.toml"),
    ):
        status, said, err = command("meds", "attributions", *arguments)
        assert (status, said) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1
    change(tmp_path / "meds/data/train/0.parquet", code=pl.lit("LAB//HR"))
    status, _, err = command("meds", "attributions", attributed, out)
    assert status == 2
    assert "16 records are not those that were attributed in" in err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


def test_a_run_that_is_not_complete_is_refused(
    attributed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_meds.RunFolder, "complete", property(lambda _: False))
    with pytest.raises(ValueError, match="folder must be of a complete run"):
        to_meds.write_run_file(attributed, tmp_path / "out")


def test_the_vocabulary_command(tmp_path: Path, attributed: Path, command: Any) -> None:
    status, said, _ = command("meds", "vocabulary", tmp_path / "meds", tmp_path / "new.json")
    assert (status, said) == (0, f"15 ids: {tmp_path / 'new.json'}\n")
    assert json.loads((tmp_path / "new.json").read_text())["LAB//HR"] == 13
    assert command("meds", "vocabulary", tmp_path / "meds", tmp_path / "new.json")[0] == 2


def test_parents_are_groups_of_codes(tmp_path: Path, attributed: Path, command: Any) -> None:
    status, said, err = command("meds", "parents", tmp_path / "meds", tmp_path / "parents.json")
    assert (status, said) == (0, f"12 codes with parents: {tmp_path / 'parents.json'}\n"), err
    status, said, err = command(
        "groups", tmp_path / "attributed", "--feature", "codes", "--by", tmp_path / "parents.json"
    )
    assert status == 0, err
    groups = rollout.CohortAttributions(tmp_path / "attributed").top_groups("codes", tmp_path / "parents.json")
    assert "DIAGNOSIS//ICD//10" in groups["group"].to_list()
    status, _, err = command("meds", "parents", tmp_path / "meds", tmp_path / "no" / "parents.json")
    assert status == 2
    assert "out must be a file in a folder that is there" in err


def test_a_run_of_pyhealths_samples_is_refused_by_name(trained: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the samples of MIMIC4Dataset have no subject_id and prediction_time"):
        to_meds.write_run_file(trained["path"], tmp_path / "out")


def test_labels_are_those_of_pyhealths_task(trained: dict[str, Any], tmp_path: Path, command: Any) -> None:
    status, said, err = command("meds", "convert", trained["folder"] / "cohort", tmp_path / "meds")
    assert status == 0, err
    assert said.startswith("60 subjects, ")
    run = rollout.CohortAttributions(trained["run"].out).predictions.collect()
    wanted = {(row["patient_id"], row["visit_id"]): row["y_true"][0] for row in run.iter_rows(named=True)}
    data = MedsDataset(tmp_path / "meds", tmp_path / "meds/labels/mortality.parquet")
    found = {
        (one["patient_id"], one["visit_id"]): float(one["label"][0]) for one in (data[i] for i in range(len(data)))
    }
    assert found == wanted
