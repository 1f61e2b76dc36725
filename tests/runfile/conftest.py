"""One trained model with its cohort, run file and prepared samples, for every test of run files."""

import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from pyhealth.models import Transformer

from rollout.cli import main
from rollout.data.mimic import mimic_source
from rollout.data.synthetic import write_synthetic_cohort
from rollout.runfile import prepare_samples, save_model
from rollout.runfile.start import attribute_run_file

ARGUMENTS = {"embedding_dim": 16, "heads": 2, "num_layers": 2}


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, home: Path) -> dict[str, Any]:
    """A folder with a cohort, a model and its run file; the samples are prepared in `samples`."""
    folder = tmp_path_factory.mktemp("trained")
    write_synthetic_cohort(folder / "cohort", 60, 0)
    source = mimic_source(folder / "cohort")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.chdir(home)
        dataset = prepare_samples(source, folder / "samples")
        torch.manual_seed(0)
        model = Transformer(dataset, **ARGUMENTS).eval()
        path = save_model(
            model, dataset, folder, arguments=ARGUMENTS, source=source, cache=folder / "samples",
            run={"batch_tokens": 512, "method": "rollout"},
        )  # fmt: skip
        run = attribute_run_file(path, progress=False)
    return {
        "folder": folder, "path": path, "model": model, "dataset": dataset, "run": run, "arguments": ARGUMENTS,
    }  # fmt: skip


@pytest.fixture
def tables(trained: dict[str, Any]) -> dict[str, Any]:
    return tomllib.loads(trained["path"].read_text())


@pytest.fixture
def copy(trained: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the folder, elsewhere."""
    return shutil.copytree(trained["folder"], tmp_path / "copy")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """`rollout` as the command line calls it: arguments → its status, what it prints, and its errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rollout", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call
