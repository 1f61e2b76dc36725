"""Run files out of any sense: each is read right, or refused in one line with exit status 2."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.cli import main
from rollout.runfile import read_run_file
from rollout.runfile.toml import write_toml

INF, NAN = float("inf"), float("nan")
LONG = "x" * 5000
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]

VALUES: list[tuple[str, Any]] = [
    # a table, or what is none
    *(("", value) for value in (None, [], "run", 3, True, [{"model": 1}])),
    *((table, value) for table in ("model", "dataset", "task", "run") for value in (None, [], "x", 0, [{}])),
    ("", {}), ("extra", {}), ("MODEL", {}), ("model ", {}), ("__class__", {}), (LONG, {}), ("a\nb", {}),
    # classes
    *(("model.class", value) for value in (
        "", " Transformer", "transformer", "Transformer()", "pyhealth.models.Transformer", "os.system", "nn.Module",
        "__import__('os')", "Transformer\0", LONG, ["Transformer"], "Tränsformer", "\ud800", "MIMIC4Dataset", "RNN",
    )),
    *(("dataset.class", value) for value in ("SampleDataset", "MIMIC4", "COVID19CXRDataset", "ChestXray14Dataset",
                                             "BaseDataset", "")),
    *(("task.class", value) for value in ("BaseTask", "Transformer", "mortality", 7, "NoSuch\n")),
    # files and folders
    *(("model.weights", value) for value in (
        "", "nowhere.pt", ".", "/dev/null", "/dev/zero", LONG, "a/" * 3000, "~nouser-of-that-name/w.pt", "nul\0.pt",
        "\ud800.pt", "vocabulary.json", "run.toml", "loop", "fifo", ["weights.pt"], "http://example.org/w.pt",
    )),
    *(("model.vocabulary", value) for value in (
        "", "Refit", "nowhere.json", ".", "weights.pt", "run.toml", LONG, "~nouser-of-that-name/v", "fifo", None,
        "deep.json", "twice.json", "nan.json", "/dev/zero",
    )),
    *(("dataset.root", value) for value in ("", "nowhere", "weights.pt", "/dev/null", LONG, "~nouser-of-that-name",
                                            "nul\0", "loop", 3, "model")),
    *(("dataset.cache", value) for value in ("", ".", "cohort", "weights.pt", LONG, "~nouser-of-that-name/c", "nul\0",
                                             "loop", "/dev/null", "/proc/self", 1, None)),
    # numbers
    *(("dataset.workers", value) for value in (0, -1, 10**6, 10**30, 1.0, True, "2", None, [1])),
    *((f"run.{key}", value) for key in ("batch_tokens", "batch_samples", "part_samples", "workers")
      for value in (0, -1, 10**9, 10**30, 2.5, True, "8", None, [8])),
    ("run.batch_tokens", INF), ("run.batch_tokens", NAN),
    *((f"model.arguments.{key}", value) for key, value in (
        ("embedding_dim", 0), ("embedding_dim", -16), ("embedding_dim", 10**9), ("embedding_dim", 60_000),
        ("embedding_dim", 16.5), ("embedding_dim", "16"), ("embedding_dim", None), ("embedding_dim", [16]),
        ("embedding_dim", True), ("heads", 0), ("heads", 3), ("heads", -2), ("heads", 10**30), ("heads", DEEP),
        ("num_layers", 0), ("num_layers", -1), ("num_layers", 10**6), ("num_layers", 3), ("dropout", 2.0),
        ("dropout", -1.0), ("dropout", NAN), ("dropout", INF), ("dropout", "0.5"), ("max_seq_len", -5),
        ("dataset", "x"), ("self", 1), ("nope", 1), ("", 1),
    )),
    ("model.arguments", []), ("model.arguments", "heads=2"), ("model.arguments", {}),
    *((f"dataset.arguments.{key}", value) for key, value in (
        ("ehr_tables", "diagnoses_icd"), ("ehr_tables", [1]), ("ehr_tables", ["nope"]), ("ehr_tables", None),
        ("ehr_tables", [["diagnoses_icd"]]), ("ehr_tables", DEEP), ("cache_dir", "/"), ("num_workers", 9),
        ("cxr_root", "."), ("ehr_root", "."), ("dev", "yes"), ("dev", 2), ("nope", 1),
        ("ehr_config_path", "~nouser-of-that-name/c.yaml"), ("ehr_config_path", "nowhere.yaml"),
        ("ehr_config_path", "run.toml"), ("ehr_config_path", LONG),
    )),
    ("dataset.arguments", []), ("task.arguments", {"nope": 1}), ("task.arguments", {"code_mapping": 3}),
    ("task.arguments", {"code_mapping": {"conditions": ["ICD9CM", "NOPE"]}}),
    # words
    *(("run.method", value) for value in ("", "Rollout", "product", 3, None, ["rollout"], LONG, {})),
    *(("run.readout", value) for value in ("", "row", 1, None)),
    *(("run.backend", value) for value in ("", "cuda", "triton", 1, None)),
    *(("run.device", value) for value in (
        "", "gpu", "cpu:3", "cpu:-1", "cuda:99", "meta", "mps", "xla", 0, True, None, ["cpu"], LONG, "cpu\n",
    )),
    *(("run.target_class", value) for value in (0, -1, 10**9, "1", None)),
    *(("run.output", value) for value in ("", 3, None, "weights.pt", "cohort", ".", LONG, "~nouser-of-that-name/o",
                                          "nul\0", "loop", "/dev/null", "/proc/self/nope", "weights.pt/below")),
    *((f"run.{key}", value) for key, value in (
        ("trust_cache", True), ("resume", False), ("client", "tcp://x:1"), ("explain", "os.system"), ("out", "x"),
        ("collate", "m:f"), ("progress", True), ("code_names", {}), ("method ", "rollout"),
    )),
]  # fmt: skip

RIGHT: list[tuple[str, Any]] = [
    ("run.method", "discard"), ("run.batch_tokens", 1), ("run.batch_tokens", 2**24), ("run.batch_samples", 65_536),
    ("run.part_samples", 1_048_576), ("run.device", "cpu"), ("run.device", "cpu:0"), ("run.readout", "forward"),
    ("run.backend", "reference"), ("model.arguments.dropout", 0), ("model.arguments.max_seq_len", 65_536),
    ("dataset.workers", 512), ("dataset.root", "./cohort/../cohort/"), ("model.weights", "linked.pt"),
]  # fmt: skip

TEXTS = {
    "empty.json": b"", "empty.toml": b"", "null.json": b"null", "nothing.toml": b"# nothing\n", "nan.json": b"NaN",
    "deep.json": b"[" * 200_000, "deep objects.json": b'{"model":' * 100_000, "deep.toml": b"a = " + b"[" * 100_000,
    "deep tables.toml": b"a = " + b"{a=" * 50_000, "twice.json": b'{"model": {}, "model": {}}',
    "twice below.json": b'{"model": {"class": "A", "class": "B"}}', "twice.toml": b"[model]\n[model]\n",
    "twice below.toml": b"[model]\nclass = 'A'\nclass = 'B'\n", "binary.toml": bytes(range(256)),
    "utf-16.json": '{"model": {}}'.encode("utf-16"), "cut.json": b'{"model": {"class": "Tra', "cut.toml": b"[model",
    "huge.json": b" " * (2**20 + 1), "huge.toml": b"#" * (2**21),
    "many digits.json": b'{"model": ' + b"9" * 5000 + b"}",
    "many digits.toml": b"model = " + b"9" * 5000, "trailing.json": b"{} {}", "comment.json": b"// x\n{}",
    "escapes.json": b'{"\\u001b[31m\\u202emodel": {}}', "surrogate.json": b'{"\\ud800": {}}',
    "toml named.json": b"[model]\nclass = 'Transformer'\n", "json named.toml": b'{"model": {}}',
    "dates.toml": b"[model]\nclass = 2026-01-01\n", "dotted.toml": b"model.class.class = 1\n",
    "infinity.json": b'{"model": Infinity}', "lone cr.toml": b"[model]\rclass = 'A'", "nul.toml": b"[model]\0",
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(trained: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(trained["folder"], tmp_path_factory.mktemp("hostile") / "bundle")
    (folder / "loop").symlink_to("loop")
    (folder / "linked.pt").symlink_to("weights.pt")
    os.mkfifo(folder / "fifo")
    (folder / "deep.json").write_text("[" * 200_000)
    (folder / "twice.json").write_text('{"schema_version": 1, "schema_version": 1}')
    (folder / "nan.json").write_text('{"schema_version": NaN}')
    return folder


def changed(tables: Any, place: str, value: Any) -> Any:
    *above, last = place.split(".")
    if not place:
        return value
    part = tables
    for key in above:
        part = part[key]
    part[last] = value
    return tables


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def attribute(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:  # status and stderr; what is refused leaves everything as it was
    before = contents(bundle)

    def command(path: Path, *more: object) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["rollout", "attribute", str(path), *map(str, more)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    yield command
    for path in bundle.glob("hostile.*"):
        path.unlink()
    assert contents(bundle) == before


def refuse(status: int, err: str) -> None:
    assert status == 2, err
    assert err.startswith("rollout: "), err
    assert err.count("\n") == 1, err
    assert err[:-1].isprintable()
    assert len(err) < 2100
    assert "Traceback" not in err


def ids(cases: list[tuple[str, Any]]) -> list[str]:
    return [f"{number}-{place[:40]!r}" for number, (place, _) in enumerate(cases)]


@pytest.mark.parametrize(("place", "value"), VALUES, ids=ids(VALUES))
def test_a_value_out_of_sense_is_refused_in_one_line(
    attribute: Any, tables: dict[str, Any], bundle: Path, tmp_path: Path, place: str, value: Any
) -> None:
    path = bundle / "hostile.json"
    path.write_text(json.dumps(changed(tables, place, value)))
    more = () if place == "run.output" else ("--output", tmp_path / "out")
    refuse(*attribute(path, *more))
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_no_run_file_is_refused_in_one_line(attribute: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(TEXTS[name])
    refuse(*attribute(tmp_path / name, "--output", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("table", ["model", "dataset", "task", "run"])
def test_a_key_that_is_there_twice_is_refused(
    attribute: Any, tables: dict[str, Any], bundle: Path, tmp_path: Path, table: str
) -> None:
    text = json.dumps(tables)
    twice = f'{text[:-1]}, "{table}": {json.dumps(tables[table])}}}'
    (bundle / "hostile.json").write_text(twice)
    status, err = attribute(bundle / "hostile.json", "--output", tmp_path / "out")
    refuse(status, err)
    assert f"the key '{table}' is there twice" in err


@pytest.mark.parametrize("path", [".", "fifo", "loop", "/dev/null", "/dev/zero", "~nouser-of-that-name/r.toml", LONG])
def test_a_path_that_is_no_file_is_refused_in_one_line(attribute: Any, bundle: Path, path: str) -> None:
    refuse(*attribute(path if path.startswith("~") else bundle / path, "--output", "out"))


def windows(tables: dict[str, Any], path: Path) -> Path:
    """The file as an editor on Windows leaves it."""
    write_toml(tables, path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    return path


def test_a_path_of_two_lines_is_refused_in_one(tables: dict[str, Any], bundle: Path) -> None:
    path = bundle / "hostile.toml"
    write_toml(changed(tables, "model.weights", "a\nb\x1b[31m"), path)
    with pytest.raises(
        ValueError, match=r"^[^\n\x1b]*\[model\] weights must be a file, got [^\n\x1b]*a b\\x1b\[31m: no su"
    ):
        read_run_file(path)
    path.unlink()


@pytest.mark.parametrize(("place", "value"), RIGHT, ids=ids(RIGHT))
def test_what_makes_sense_is_read(
    trained: dict[str, Any], tables: dict[str, Any], bundle: Path, tmp_path: Path, place: str, value: Any
) -> None:
    path = windows(changed(tables, place, value), bundle / "right.toml")
    run = read_run_file(path)
    model, dataset = run.load(tmp_path)
    path.unlink()
    assert run.settings == {key: setting for key, setting in tables["run"].items() if key != "output"}
    assert run.arguments == tables["model"]["arguments"]
    assert len(dataset) == len(trained["dataset"])
    assert all(torch.equal(tensor, trained["model"].state_dict()[name]) for name, tensor in model.state_dict().items())


def test_and_attributed(trained: dict[str, Any], tables: dict[str, Any], attribute: Any, bundle: Path) -> None:
    assert attribute(windows(tables, bundle / "hostile.toml"), "--output", "out")[0] == 0
    assert json.loads(Path("out/manifest.json").read_text())["counts"]["rows"] == trained["run"].rows


def test_there_are_more_than_a_hundred() -> None:
    assert len(VALUES) + len(TEXTS) > 250
