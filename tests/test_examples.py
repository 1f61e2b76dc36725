"""The examples as a user runs them, each in a process of its own, and the numbers they print."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest
import torch

from rollout.data.synthetic import write_synthetic_cohort
from rollout.runfile.start import attribute_run_file
from tests.support.meds_folder import write_meds

EXAMPLES = Path(__file__).parents[1] / "examples"
BENCHMARK = "attention_rollout_benchmark_mimic4_demo.py"


def run(name: str, *arguments: str, status: int = 0) -> tuple[str, str]:
    """What an example prints to stdout and stderr; its exit status must be `status`."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=EXAMPLES.parent, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def numbers(line: str) -> list[float]:
    return [float(text) for text in re.findall(r"-?\d+\.\d+(?:e[+-]\d+)?", line)]


def naive_rollout(maps: list[torch.Tensor]) -> torch.Tensor:
    """Abnar & Zuidema as written, float64."""
    eye = torch.eye(maps[0].shape[-1], dtype=torch.float64)
    full = eye.expand(maps[0].shape[0], -1, -1)
    for attention in maps:
        layer = 0.5 * eye + 0.5 * attention.double().mean(1)
        full = layer / layer.sum(-1, keepdim=True) @ full
    return full


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_graph_says_what_it_needs() -> None:
    assert "needs a CUDA device" in run("cuda_graph.py")[0]


def test_quickstart() -> None:
    out, _ = run("quickstart.py")
    blocks = [[numbers(line) for line in block.splitlines()[1:]] for block in out.strip().split("\n\n")]
    torch.manual_seed(0)
    queries = [torch.randn(3, 2, 6, 8) for _ in range(4)]
    keys = [torch.randn(3, 2, 6, 8) for _ in range(4)]
    scores = [(q @ k.transpose(-1, -2)).double() / 8**0.5 for q, k in zip(queries, keys, strict=True)]
    expected = naive_rollout([s.softmax(-1) for s in scores])[:, 0].numpy()

    for block in blocks[:2]:
        assert np.allclose(block[:3], expected, atol=1e-4)
        assert 0 <= block[3][0] < 1e-6
    assert "rows sum to 1" in out
    for sample, length in enumerate((6, 4, 2)):
        cut = naive_rollout([s[sample : sample + 1, :, :length, :length].softmax(-1) for s in scores])
        assert np.allclose(blocks[2][sample][:length], cut[0, -1].numpy(), atol=1e-4)
        assert blocks[2][sample][length:] == [0.0] * (6 - length)
    methods = dict(re.findall(r"^   ([a-z]\S*(?: 3:1)?)\s+((?:\d\.\d{4} ?)+)$", out, re.MULTILINE))
    assert {"rollout", "pyhealth", "chefer_rollout", "discard", "heads 3:1"} <= methods.keys()
    assert np.allclose(numbers(methods["rollout"]), expected[0], atol=1e-4)
    assert all(sum(numbers(values)) == pytest.approx(1, abs=4e-4) for values in methods.values())
    assert not np.allclose(numbers(methods["heads 3:1"]), expected[0], atol=1e-3)


def test_pyhealth_dropin() -> None:
    pytest.importorskip("pyhealth")
    out, _ = run("pyhealth_dropin.py")
    differences = [numbers(line)[-1] for line in out.splitlines() if "largest difference" in line]
    assert len(differences) == 2
    assert max(differences) <= 1e-5
    assert "ours gives the same numbers: True" in out
    assert "PyHealth's raises" in out
    record = [float(x) for x in re.findall(r"^  \S+\s+(\d\.\d{3})$", out, re.MULTILINE)]
    assert record == sorted(record, reverse=True)
    assert sum(record) == pytest.approx(1, abs=5e-3)


def test_benchmark_on_a_tiny_cohort(tmp_path: Path) -> None:
    """Two folds together: every method on the same samples, PyHealth's rollout and ours alike."""
    pytest.importorskip("pyhealth")
    picture = tmp_path / "faithfulness.png"
    out, _ = run(
        BENCHMARK, "--synthetic", "--patients", "400", "--folds", "3", "--tested", "2", "--epochs", "1",
        "--picture", str(picture),
    )  # fmt: skip
    samples, patients, positive = map(int, re.search(r"(\d+) samples of (\d+) patients, (\d+) positive", out).groups())
    assert 0 < positive < samples
    assert patients < samples
    rows = {line[:26].strip(): [float(text) for text in re.findall(r"(-?\d\.\d{3})[* ] \[", line)]
            for line in out.splitlines()}  # fmt: skip
    methods = [name for name, values in rows.items() if len(values) == 4]
    assert methods == [
        "rollout (ours)", "rollout, own path left out", "rollout (PyHealth)", "Chefer (PyHealth)", "frozen gradient",
        "random",
    ]  # fmt: skip
    assert rows["rollout (ours)"] == pytest.approx(rows["rollout (PyHealth)"], abs=0.01)  # ties go by rounding
    assert rows["rollout (ours)"] != rows["random"]
    tested, people = map(int, re.search(r"(\d+) samples of (\d+) patients; intervals of 95%", out).groups())
    assert tested == pytest.approx(2 / 3 * samples, rel=0.2)
    assert people < tested
    assert picture.read_bytes()[:4] == b"\x89PNG"


def labs_of(root: Path) -> None:
    """Three lab values in the first day of every admission, as MIMIC-IV has them."""
    admissions = pl.read_csv(root / "hosp" / "admissions.csv.gz", infer_schema=False)
    hour = pl.col("admittime").str.to_datetime() + pl.duration(hours=pl.col("hour"))
    values = pl.DataFrame({"itemid": ["50983", "50971", "50931"], "hour": [1, 5, 20], "valuenum": [140.0, 4.0, 99.5]})
    rows = admissions.select("subject_id", "hadm_id", "admittime").join(values, how="cross")
    times = {"charttime": hour, "storetime": hour + pl.duration(minutes=30)}
    rows = rows.with_columns(value=pl.col("valuenum"), valueuom=pl.lit("u"), flag=pl.lit(None), **times)
    rows.drop("hour", "admittime").write_csv(root / "hosp" / "labevents.csv", datetime_format="%Y-%m-%d %H:%M:%S")
    items = [(item, "a", "Blood", "Chemistry") for item in ("50983", "50971", "50931")]
    pl.DataFrame(items, schema=["itemid", "label", "fluid", "category"], orient="row").write_csv(
        root / "hosp" / "d_labitems.csv"
    )


@pytest.mark.parametrize(
    "tasks",
    [
        ["length_of_stay", "in_hospital_mortality"],
        pytest.param(["mortality", "length_of_stay", "in_hospital_mortality"], marks=pytest.mark.slow),
    ],
)
def test_run_files(tasks: list[str], tmp_path: Path) -> None:
    """Each task is attributed by its run file: as many rows as the samples have codes or hours."""
    from rollout.runfile.start import attribute_run_file

    write_synthetic_cohort(tmp_path / "cohort", 40, 0)
    labs_of(tmp_path / "cohort")
    out, _ = run("mimic4_run_files.py", "--ehr_root", str(tmp_path / "cohort"), "--output", str(tmp_path / "out"),
                 "--epochs", "1", "--task", *tasks)  # fmt: skip
    commands = re.findall(r"(\d+) samples of \d+ patients, features (.*)\n  rollout attribute (.*)", out)
    assert [Path(path).parent.name for *_, path in commands] == tasks
    for count, features, path in commands:
        done = attribute_run_file(path, progress=False)
        assert (done.attributed, done.failed) == (int(count), 0)
        rows = pl.read_parquet(done.out / "attributions" / "*.parquet")
        assert rows["feature"].unique().sort().to_list() == sorted(features.split(", "))
        total = rows.group_by("sample", "feature").agg(pl.col("attribution").sum())["attribution"]
        assert (total - 1).abs().max() < 1e-5
        probability = pl.read_parquet(done.out / "predictions" / "*.parquet")["y_prob"]
        classes = 1 if "mortality" in path else probability.list.len()[0]
        assert set(probability.list.len()) == {classes}
        if "in_hospital" in path:
            assert rows.group_by("sample").len()["len"].to_list() == [20] * int(count)
        elif "length_of_stay" in path:
            assert classes > 2
            assert (probability.list.sum() - 1).abs().max() < 1e-5


def test_run_files_refuse_a_folder_without_labs(tmp_path: Path) -> None:
    write_synthetic_cohort(tmp_path / "cohort", 10)
    _, err = run(
        "mimic4_run_files.py", "--ehr_root", str(tmp_path / "cohort"), "--output", str(tmp_path / "out"), status=2
    )
    assert "missing hosp/labevents.csv[.gz]" in err
    assert not (tmp_path / "out").exists()


def test_benchmark_refuses_a_folder_without_tables(tmp_path: Path) -> None:
    _, err = run(BENCHMARK, "--ehr_root", str(tmp_path), status=2)
    assert "ehr_root must be a MIMIC-IV folder" in err
    assert "hosp/admissions" in err
    root = tmp_path / "cohort"
    write_synthetic_cohort(root, 20)
    (root / "hosp" / "prescriptions.csv.gz").unlink()
    _, err = run(BENCHMARK, "--ehr_root", str(root), status=2)
    assert "hosp/prescriptions" in err
    assert "hosp/admissions" not in err
    _, err = run(BENCHMARK, "--ehr_root", str(root), "--folds", "2", status=2)
    assert "--folds must be in 3..50, got 2" in err


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_example", EXAMPLES / BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_folds_are_by_patient_and_balanced(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    patients = [f"p{i}" for i in rng.integers(0, 40, 150)]
    labels = np.array([float(int(p[1:]) % 4 == 0 and rng.random() < 0.7) for p in patients])
    tested = []
    for split in script.splits_by_patient(patients, labels, 5, seed=3):
        parts = [{patients[i] for i in part} for part in (split.train, split.validation, split.test)]
        assert not parts[0] & parts[1]
        assert not parts[0] & parts[2]
        assert not parts[1] & parts[2]
        assert sorted(np.concatenate([split.train, split.validation, split.test])) == list(range(150))
        assert labels[split.test].sum() >= 1
        tested += split.test.tolist()
    assert sorted(tested) == list(range(150))
    other = next(script.splits_by_patient(patients, labels, 5, seed=4))
    assert set(other.test) != set(next(script.splits_by_patient(patients, labels, 5, seed=3)).test)


def test_the_meds_classifier_leaves_a_run_file_that_attributes(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'attention-rollout[hf]'")
    meds = write_meds(tmp_path / "meds")
    out, _ = run("meds_classifier.py", str(tmp_path / "out"), str(meds), str(meds / "labels" / "dies.parquet"))
    assert len(numbers(out)) == 3
    assert out.endswith(f"rollout attribute {tmp_path / 'out' / 'run.toml'}\n")
    done = attribute_run_file(tmp_path / "out" / "run.toml", progress=False)
    assert (done.samples, done.failed) == (48, 0)
    sums = pl.read_parquet(done.out / "attributions" / "*.parquet").group_by("sample").agg(pl.col("attribution").sum())
    assert ((sums["attribution"] > 0) & (sums["attribution"] < 1)).all()  # the rest is that of [CLS]
    assert "meds_classifier.py OUT" in run("meds_classifier.py", status=1)[1]
