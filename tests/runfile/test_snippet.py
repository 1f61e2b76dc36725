"""The way from tables to attributions that docs/run-files.md shows: trained, saved, run by the command line."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from rollout.cli import main
from rollout.data.synthetic import write_synthetic_cohort

PAGE = Path(__file__).parents[2] / "docs" / "run-files.md"


def snippet() -> str:
    (code,) = re.findall(r"``python\n(.*?)``", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return code


def test_train_save_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_synthetic_cohort(tmp_path / "cohort", 60, 0)
    (tmp_path / "train.py").write_text(snippet())
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
