"""The README's way from tables to attributions in Python: trained, saved, run by the command line."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from rollout.cli import main
from rollout.data.synthetic import write_synthetic_cohort

SNIPPET = """
from pyhealth.datasets import get_dataloader
from pyhealth.models import Transformer
from pyhealth.trainer import Trainer
from rollout.data.mimic import mimic_source
from rollout.runfile import prepare_samples, save_model

if __name__ == "__main__":  # PyHealth reads tables in processes that import this script
    source = mimic_source("cohort")  # a folder with MIMIC-IV's hosp/ and icu/
    samples = prepare_samples(source, "model/samples")
    sizes = {"embedding_dim": 32, "heads": 2, "num_layers": 2}
    model = Transformer(samples, **sizes)
    Trainer(model, enable_logging=False).train(get_dataloader(samples, batch_size=32, shuffle=True), epochs=3)
    save_model(model, samples, "model", arguments=sizes, source=source, cache="model/samples")
"""


def test_train_save_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_synthetic_cohort(tmp_path / "cohort", 60, 0)
    (tmp_path / "train.py").write_text(SNIPPET)
    assert len(SNIPPET.strip().splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(tmp_path / "train.py"), run_name="__main__")
    monkeypatch.setattr(sys, "argv", ["rollout", "attribute", "model/run.toml"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    counts = json.loads((tmp_path / "model" / "attributed" / "manifest.json").read_text())["counts"]
    assert counts["attributed"] == counts["samples"] > 20
    assert counts["failed"] == 0
    assert counts["rows"] > 500
    assert {path.name for path in tmp_path.iterdir()} == {"cohort", "model", "train.py"}
