"""PyHealth's own MEDSDataset through a run file: its samples are attributed with the names of the folder's codes."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from pyhealth.models import Transformer

import rollout
from rollout.data.classes import pyhealth_config
from rollout.data.meds.convert import convert_mimic
from rollout.data.samples import SampleSource, prepare_samples
from rollout.data.synthetic import write_synthetic_cohort
from rollout.runfile import RunFile, read_run_file, save_model
from rollout.runfile.start import attribute_run_file
from rollout.runfile.toml import write_toml

CONFIG, TASK = "meds_with_hadm.yaml", "InHospitalMortalityMEDS"


def test_a_run_file_names_pyhealths_meds_dataset(tmp_path: Path) -> None:
    write_synthetic_cohort(tmp_path / "cohort", 30, 0)
    convert_mimic(tmp_path / "cohort", tmp_path / "meds")
    config = pyhealth_config(CONFIG)
    assert config is not None
    source = SampleSource("MEDSDataset", tmp_path / "meds", TASK, {"config_path": str(config)})
    dataset = prepare_samples(source, tmp_path / "samples")
    torch.manual_seed(0)
    sizes = {"embedding_dim": 16, "heads": 2, "num_layers": 2}
    model = Transformer(dataset, **sizes).eval()
    file = save_model(model, dataset, tmp_path, arguments=sizes, source=source, cache=tmp_path / "samples")
    file.write_text(file.read_text().replace(str(config), CONFIG))
    run = attribute_run_file(file, progress=False)
    assert run.failed == 0
    cohort = rollout.CohortAttributions(run.out)
    assert cohort.samples == len(dataset)
    rows = cohort.attributions.collect()
    named = pl.read_parquet(tmp_path / "meds/metadata/codes.parquet").drop_nulls("description")
    names = dict(named.select("code", "description").rows())
    seen = {code for code in rows["code"] if code in names}
    assert len(seen) > 20
    assert {code: cohort.names["codes"][code] for code in seen} == {code: names[code] for code in seen}
    stays = pl.read_parquet(tmp_path / "meds/data/*.parquet")["hadm_id"].drop_nulls().cast(pl.String)
    assert rows["visit_id"].null_count() == 0
    assert set(rows["visit_id"]) <= set(stays)


def test_a_configuration_is_pyhealths_only_where_there_is_no_such_file(tmp_path: Path) -> None:
    assert pyhealth_config("nowhere.yaml") is None
    assert pyhealth_config("../__init__.py") is None
    for name in ("meds", "weights.pt", "mine.yaml"):
        (tmp_path / name).mkdir() if name == "meds" else (tmp_path / name).touch()
    tables: dict[str, dict[str, Any]] = {
        "model": {"class": "Transformer", "weights": "weights.pt", "vocabulary": "refit"},
        "dataset": {"class": "MEDSDataset", "root": "meds", "arguments": {"config_path": "mine.yaml"}},
        "task": {"class": TASK},
    }
    read = read_run_file(write_toml(tables, tmp_path / "run.toml"))
    assert isinstance(read, RunFile)
    assert read.source.dataset_arguments["config_path"] == str(tmp_path / "mine.yaml")
    tables["dataset"]["arguments"] = {"config_path": "nowhere.yaml"}
    with pytest.raises(ValueError, match=r"config_path must be a file, or the name of one that PyHealth brings"):
        read_run_file(write_toml(tables, tmp_path / "run.toml"))
