"""A run file that names a PyHealth model around one of transformers: a local folder, texts, a row for every token."""

import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from pyhealth.models import TransformersModel

import rollout
from rollout.data.samples import SampleSource
from rollout.pyhealth import AttentionRollout
from rollout.runfile import prepare_samples, read_run_file, save_model
from rollout.runfile.weights import check_model
from tests.support.capture_pyhealth import bert
from tests.support.explored import client_of, explorer_of

NOTES = ["fever and chest pain", "no pain", "the patient has a fever", "chest pain and no fever", "a zebra"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A folder with notes, a random model and its run file."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "notes").mkdir()
    notes = pl.DataFrame(
        {"transcription": NOTES, "medical_specialty": ["Surgery", "Urology", "Surgery"] + ["Urology"] * 2}
    )
    notes.with_columns(pl.lit("-").alias(name) for name in ("description", "sample_name", "keywords")).write_csv(
        folder / "notes" / "mtsamples.csv"
    )
    shutil.copytree(bert(), folder / "bert")
    source = SampleSource("MedicalTranscriptionsDataset", folder / "notes", "MedicalTranscriptionsClassification")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        dataset = prepare_samples(source, folder / "samples")
        torch.manual_seed(0)
        model = TransformersModel(dataset, "bert").eval()
        path = save_model(
            model, dataset, folder, arguments={"model_name": "bert"}, source=source, cache=folder / "samples",
            run={"output": "attributed"},
        )  # fmt: skip
    return {"folder": folder, "path": path, "model": model, "dataset": dataset}


def test_from_the_command_line_to_the_report(trained: dict[str, Any], tmp_path: Path, command: Any) -> None:
    assert 'model_name = "bert"' in trained["path"].read_text()
    status, _, err = command("attribute", trained["path"], "--output", tmp_path / "out")
    assert status == 0, err
    cohort = rollout.CohortAttributions(tmp_path / "out")
    model, dataset = trained["model"], trained["dataset"]
    assert len(dataset) == len(NOTES)
    for number in range(len(NOTES)):
        text = dataset[number]["transcription"]
        rows, batch = cohort.sample(number), {"transcription": [text], "medical_specialty": torch.tensor([0])}
        assert rows["code"].to_list() == text.replace("zebra", "[UNK]").split()
        relevance = AttentionRollout(model).attribute(**batch)["transcription"][0, 1:-1]
        assert rows["attribution"].to_list() == pytest.approx(relevance.tolist(), abs=1e-6)
        with torch.no_grad():
            assert rows["y_prob"][0].to_list() == pytest.approx(model(**batch)["y_prob"][0].tolist(), abs=1e-6)
    again = command("attribute", trained["path"], "--output", tmp_path / "out")
    assert again[0] == 0
    assert command("verify", tmp_path / "out")[0] == 0
    status, _, err = command("report", tmp_path / "out", "--output", tmp_path / "report.html")
    assert status == 0, err
    assert "fever" in (tmp_path / "report.html").read_text()
    page = client_of(explorer_of(tmp_path / "out")).get("record?sample=0")
    assert page.status_code == 200
    assert all(word in page.text for word in dataset[0]["transcription"].split())


def test_nothing_is_downloaded(trained: dict[str, Any], tmp_path: Path) -> None:
    text = trained["path"].read_text()
    path = trained["folder"] / "other.toml"
    for given, why in (
        (
            "bert-base-uncased",
            r"model_name must be a folder with config.json, .* for nothing is downloaded, got '.*: no",
        ),
        ("notes", r"model_name must be a folder with config.json and model.safetensors"),
    ):
        path.write_text(text.replace('model_name = "bert"', f'model_name = "{given}"'))
        with pytest.raises(ValueError, match=why):
            read_run_file(path)
    path.write_text(text.replace('model_name = "bert"', "dropout = 0.1"))
    with pytest.raises(ValueError, match="TransformersModel needs the argument 'model_name'"):
        read_run_file(path)
    with pytest.raises(ValueError, match=r"model_name must be a folder .* got None"):
        check_model("TransformerDeID", {})
    for name in ("TorchvisionModel", "PromptEHR", "MedLink", "ConCare"):
        with pytest.raises(ValueError, match=f"PyHealth's {name} has no attention readout"):
            check_model(name, {})


def test_a_folder_with_code_of_its_own_is_refused(trained: dict[str, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(trained["folder"] / "bert", tmp_path / "bert")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"auto_map": {"AutoModel": "evil.Model"},', 1))
    with pytest.raises(ValueError, match=r"config.json has auto_map: the model is of code of its own"):
        check_model("TransformersModel", {"model_name": str(folder)})
