"""Run files: what they say is checked before any work, and model and samples come back as they were trained."""

import errno
import json
import os
import pickle
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from filelock import FileLock
from pyhealth.models import Transformer

import rollout
from rollout.cohort.content import pack, unpack
from rollout.data.cache import SampleCache
from rollout.data.collate import pyhealth_collate
from rollout.data.mimic import mimic_source
from rollout.data.synthetic import write_synthetic_cohort
from rollout.data.vocabulary import read_vocabulary
from rollout.errors import CohortError
from rollout.results.manifest import PartRecord
from rollout.runfile import CACHE, RunFile, prepare_samples, read_run_file, save_model
from rollout.runfile.start import attribute_run_file
from rollout.runfile.verify import verify_run
from rollout.runfile.weights import build_model, load_model
from tests.support import pyhealth_models
from tests.support.written_run import edit

FEATURES = ("conditions", "procedures", "drugs")


def decoded(dataset: Any, sample: dict[str, Any], feature: str) -> list[str]:
    names = {number: code for code, number in dataset.input_processors[feature].code_vocab.items()}
    return [names[number] for number in sample[feature].tolist()]


def rows_of(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "attributions" / "*.parquet")


def test_save_model_writes_what_read_run_file_reads(trained: dict[str, Any]) -> None:
    run, folder = read_run_file(trained["path"]), trained["folder"]
    assert run == RunFile(
        path=folder / "run.toml", model="Transformer", weights=folder / "weights.pt",
        vocabulary=read_vocabulary(folder / "vocabulary.json"), source=mimic_source(folder / "cohort"),
        arguments=trained["arguments"], cache=folder / "samples", output=folder / "attributed",
        settings={"batch_tokens": 512, "method": "rollout"},
    )  # fmt: skip
    assert tomllib.loads(trained["path"].read_text())["dataset"]["root"] == "cohort"
    assert not list(folder.glob(".*partial"))


def test_json_says_the_same(trained: dict[str, Any], tables: dict[str, Any], copy: Path) -> None:
    (copy / "run.json").write_text(json.dumps(tables))
    from_json, from_toml = read_run_file(copy / "run.json"), read_run_file(copy / "run.toml")
    assert {**vars(from_json), "path": None} == {**vars(from_toml), "path": None}


def test_the_rows_are_those_of_the_model_and_the_samples_in_python(trained: dict[str, Any], tmp_path: Path) -> None:
    rollout.attribute_cohort(trained["model"], trained["dataset"], tmp_path / "out", batch_tokens=512, progress=False)
    written = rows_of(trained["folder"] / "attributed")
    assert written.equals(rows_of(tmp_path / "out"))
    assert trained["run"].rows == len(written) > 500
    names = json.loads((trained["folder"] / "attributed" / "code_names.json").read_text())
    assert set(names) == set(FEATURES)
    codes = written.filter(pl.col("feature") == "conditions")["code"].unique().to_list()
    assert set(codes) <= set(names["conditions"])


def test_nothing_is_written_but_in_the_folder(trained: dict[str, Any], home: Path) -> None:
    assert [path for path in home.rglob("*") if path.is_file()] == []
    assert {path.name for path in trained["folder"].iterdir()} == {
        "cohort", "samples", "attributed", "run.toml", "weights.pt", "vocabulary.json",
    }  # fmt: skip


def test_the_same_command_finds_it_complete_and_another_output_gets_equal_rows(
    trained: dict[str, Any], copy: Path
) -> None:
    again = attribute_run_file(copy / "run.toml", progress=False)
    assert (again.done, again.kept, again.attributed) == (0, again.parts, len(trained["dataset"]))
    other = attribute_run_file(copy / "run.toml", copy / "other", {"batch_tokens": 4096}, progress=False)
    assert other.done == len(trained["dataset"])
    left, right = (rows_of(copy / name) for name in ("attributed", "other"))
    assert left.drop("attribution").equals(right.drop("attribution"))
    assert (left["attribution"] - right["attribution"]).abs().max() < 1e-6
    with pytest.raises(ValueError, match="method"):
        attribute_run_file(copy / "run.toml", None, {"method": "discard"}, progress=False)


def test_verify_compares_every_sample_with_the_run_file(trained: dict[str, Any], copy: Path) -> None:
    assert verify_run(copy / "attributed", copy / "run.toml") == []
    record = PartRecord.read(copy / "attributed" / "parts" / "part-00000.json")
    content = unpack(record).copy()
    content[[3, 7]] ^= 1
    edit(copy / "attributed" / "parts" / "part-00000.json", content=pack(content))
    assert verify_run(copy / "attributed", copy / "run.toml") == [
        "part-00000: 2 samples hold other values than when they were attributed: 3, 7"
    ]


def test_without_a_cache_the_samples_are_prepared_in_the_output(
    trained: dict[str, Any], tables: dict[str, Any], copy: Path
) -> None:
    del tables["dataset"]["cache"]
    (copy / "run.json").write_text(json.dumps(tables))
    run = attribute_run_file(copy / "run.json", copy / "other", progress=False)
    assert (run.attributed, run.failed, run.rows) == (trained["run"].attributed, 0, trained["run"].rows)
    assert (copy / "other" / CACHE / "prepared.json").is_file()
    key = ["sample", "feature", "code"]
    left, right = (rows_of(copy / name).select(key).sort(key) for name in ("attributed", "other"))
    assert left.equals(right)


def test_another_cohort_is_read_with_the_codes_of_the_training(trained: dict[str, Any], tmp_path: Path) -> None:
    source = mimic_source(write_other(tmp_path / "cohort"))
    vocabulary = read_vocabulary(trained["folder"] / "vocabulary.json")
    fitted, given = (prepare_samples(source, tmp_path / "cache", used) for used in (None, vocabulary))
    known = {f: set(trained["dataset"].input_processors[f].code_vocab) for f in FEATURES}
    unknown = 0
    for mine, other in zip(given, fitted, strict=True):
        for feature in FEATURES:
            expected = [code if code in known[feature] else "<unk>" for code in decoded(fitted, other, feature)]
            assert decoded(trained["dataset"], mine, feature) == expected
            unknown += expected.count("<unk>")
    assert unknown > 0
    refit = RunFile(
        tmp_path / "run.toml",
        "Transformer",
        trained["folder"] / "weights.pt",
        None,
        source,
        trained["arguments"],
        tmp_path / "cache",
    )
    with pytest.raises(ValueError, match=r"embedding_layers\.conditions\.weight must be \[\d+, 16\], got \[\d+, 16\]"):
        refit.load(tmp_path / "out")


def write_other(root: Path) -> Path:
    write_synthetic_cohort(root, 40, 1)
    return root


def test_a_cache_remembers_its_tables(copy: Path) -> None:
    run = read_run_file(copy / "run.toml")
    before = [sample["drugs"].tolist() for sample in prepare_samples(run.source, copy / "samples", run.vocabulary)]
    path = copy / "cohort" / "hosp" / "admissions.csv.gz"
    os.utime(path, (1, 1))
    after = [sample["drugs"].tolist() for sample in prepare_samples(run.source, copy / "samples", run.vocabulary)]
    assert before == after
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"hosp/admissions\.csv\.gz in .* changed since the samples in .* prepared"):
        run.load(copy / "out")
    path.unlink()
    with pytest.raises(ValueError, match=r"hosp/admissions\.csv\.gz in .* changed since"):
        run.load(copy / "out")


def test_an_unfinished_cache_is_made_anew(copy: Path) -> None:
    run = read_run_file(copy / "run.toml")
    cache = SampleCache(copy / "new", run.source.identity, trusted=False)
    with cache.lock():
        cache.begin()
        (cache.made / "half").touch()
    dataset = prepare_samples(run.source, copy / "new", run.vocabulary)
    assert not cache.made.exists()
    assert len(dataset) > 20
    assert sorted(path.name[:9] for path in (copy / "new").iterdir()) == [".lock", "prepared.", "pyhealth-"]


def test_a_cache_of_another_task_or_of_another_process_is_refused(copy: Path) -> None:
    run = read_run_file(copy / "run.toml")
    other = mimic_source(copy / "cohort", "LengthOfStayPredictionMIMIC4")
    with pytest.raises(ValueError, match="holds samples of another run: task is 'MortalityPredictionMIMIC4' there"):
        prepare_samples(other, copy / "samples")
    with pytest.raises(ValueError, match="the vocabulary must be that of LengthOfStayPredictionMIMIC4, whose outputs"):
        prepare_samples(other, copy / "elsewhere", run.vocabulary)
    (copy / "new").mkdir()
    with FileLock(copy / "new" / ".lock"), pytest.raises(ValueError, match="another process is preparing samples"):
        prepare_samples(run.source, copy / "new")
    with FileLock(copy / "samples" / ".lock"):
        assert len(prepare_samples(run.source, copy / "samples")) > 20  # what is there can be read by many at once


def test_a_full_disk_stops_with_its_reason(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyhealth.datasets import MIMIC4Dataset

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = read_run_file(copy / "run.toml")
    with monkeypatch.context() as patch:
        patch.setattr(MIMIC4Dataset, "set_task", full)
        with pytest.raises(CohortError, match=r"cannot prepare samples in .*new: .*No space left on device\. When"):
            prepare_samples(run.source, copy / "new", run.vocabulary)
    assert json.loads((copy / "new" / "prepared.json").read_text())["samples"] == {}
    (copy / "file").touch()
    with pytest.raises(CohortError, match=r"cannot prepare samples in .*file: .*File exists"):
        prepare_samples(run.source, copy / "file", run.vocabulary)


def test_missing_tables_are_named(copy: Path) -> None:
    (copy / "cohort" / "hosp" / "prescriptions.csv.gz").unlink()
    run = read_run_file(copy / "run.toml")
    with pytest.raises(ValueError, match=r"has no hosp/prescriptions\.csv\.gz, which the table 'prescriptions' needs"):
        prepare_samples(run.source, copy / "new")
    wrong = mimic_source(copy / "cohort", tables=("diagnoses_icd",))
    wrong.dataset_arguments["ehr_tables"].append("diagnosis_icd")
    with pytest.raises(ValueError, match=r"has no table 'diagnosis_icd'; did you mean \"diagnoses_icd\"\?"):
        prepare_samples(wrong, copy / "newer")


def changed(tables: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    table, _, key = place.partition(".")
    if not key:
        tables[table] = value
    elif value is None:
        del tables[table][key]
    else:
        tables[table][key] = value
    return tables


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("models", {}, r"must hold \[model\], \[dataset\], \[task\], \[run\] only, got 'models'; did you mean"),
        ("run", 3, "run must be a table of keys and values, got 3"),
        ("model.wieghts", "w.pt", r"\[model\] has no key 'wieghts'; did you mean \"weights\"\?"),
        ("run.batch_token", 1, r"\[run\] has no key 'batch_token'; did you mean \"batch_tokens\"\?"),
        ("model.class", None, r"\[model\] needs class"),
        ("model.vocabulary", None, r'\[model\] needs vocabulary, the file save_model wrote, or "refit"'),
        ("model.class", 3, r"\[model\] class must be text, got 3"),
        ("model.arguments", "heads", r"\[model\] arguments must be a table, got 'heads'"),
        ("dataset.workers", 0, r"\[dataset\] workers must be a whole number from 1 to 512, got 0"),
        ("dataset.workers", True, r"\[dataset\] workers must be a whole number, got True"),
        ("model.weights", "nowhere.pt", r"\[model\] weights must be a file, got .*nowhere\.pt: no such file"),
        ("model.vocabulary", "cohort", r"\[model\] vocabulary must be a file"),
        ("dataset.root", "nowhere", r"\[dataset\] root must be a folder with tables, got .*nowhere: no such folder"),
        ("model.class", "Transfomer", r"\[model\] class must be the name of a model in pyhealth\.models, got "
         r"'Transfomer'; did you mean \"Transformer\"\? .*--entry"),
        ("model.class", "pyhealth.models.Transformer", r"\[model\] class must be the name of a model"),
        ("model.class", "BaseModel", r"\[model\] class must be the name of a model"),
        ("model.class", "MIMIC4Dataset", r"\[model\] class must be the name of a model"),
        ("model.class", "RNN", "PyHealth's RNN has no attention readout .* rollout.capture"),
        ("dataset.class", "system", r"\[dataset\] class must be the name of a dataset in pyhealth\.datasets"),
        ("task.class", "Mortality", r"\[task\] class must be the name of a task in pyhealth\.tasks"),
        ("model.arguments", {"head": 2}, r"Transformer has no argument 'head'; did you mean \"heads\"\?"),
        ("model.arguments", {"dataset": 2}, r"\[model\] arguments must not have 'dataset'"),
        ("dataset.arguments", {"cache_dir": "/"}, r"\[dataset\] arguments must not have 'cache_dir'"),
        ("dataset.arguments", {"cxr_root": "x"}, r"must not have 'cxr_root'"),
        ("dataset.class", "COVID19CXRDataset", "does not read a folder of tables with a cache of its own choosing"),
        ("run.batch_tokens", 0, r"\[run\] batch_tokens must be a whole number from 1 to 16,777,216, got 0"),
        ("run.workers", 1.5, r"\[run\] workers must be a whole number from 1 to 512, got 1.5"),
        ("run.equal_lengths", 1, r"\[run\] equal_lengths must be true or false, got 1"),
        ("run.method", "rolout", r"\[run\] method must be one of rollout, .*got 'rolout'; did you mean \"rollout\""),
        ("run.method", "product", r"\[run\] method must be one of rollout, "),
        ("run.readout", "row", r"\[run\] readout must be one of model, forward, got 'row'"),
        ("run.device", "abacus", r"\[run\] device must be a torch device such as cpu or cuda, got 'abacus'"),
        ("run.target_class", 1, r"\[run\] target_class is for class-specific methods, grad_rollout, chefer, .*; got"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_before_any_work(
    trained: dict[str, Any], tables: dict[str, Any], place: str, value: Any, message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = trained["folder"] / "cohort" / "wrong.json"
    for name in ("weights", "vocabulary"):
        tables["model"][name] = f"../{tables['model'][name]}"
    tables["dataset"]["root"] = "."
    path.write_text(json.dumps(changed(tables, place, value)))
    try:
        with pytest.raises(ValueError, match=message) as caught:
            attribute_run_file(path, trained["folder"] / "never")
    finally:
        path.unlink()
    assert str(path) in str(caught.value)
    assert not (trained["folder"] / "never").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.toml", b"[model\n", "a run file must be TOML, or JSON if its name ends so; .* is not"),
        ("run.json", b"{", "a run file must be TOML, or JSON"),
        ("run.toml", b"\xff", "a run file must be TOML, or JSON"),
        ("run.json", b"[]", r"must be an object with model, dataset, task, run, got list"),
        ("run.toml", None, "a run file must be a TOML or JSON file, got .*: No such file"),
    ],
)
def test_what_is_no_run_file(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_run_file(tmp_path / name)


class Planted:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_weights_are_a_state_dict_that_fits(copy: Path) -> None:
    run, path = read_run_file(copy / "run.toml"), copy / "weights.pt"
    state = torch.load(path, weights_only=True)
    run = replace(run, vocabulary=replace(run.vocabulary, weights=None))  # as one from elsewhere, tied to no weights

    def refused(content: Any, message: str) -> None:
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            run.load(copy / "out")

    name = next(key for key in state if key.endswith("fc.weight"))
    refused({key: value for key, value in state.items() if key != name}, rf"{name} is missing")
    refused({**state, "more": torch.ones(1)}, "does not fit the model: more is unknown to the model")
    refused({**state, name: torch.ones(1, 5)}, rf"{name} must be \[1, 48\], got \[1, 5\]")
    refused({}, r"is missing; .* and \d+ more\. Embeddings of other sizes come from another vocabulary")
    refused([1, 2], "weights must be a state_dict, parameter name → tensor, got list")
    refused({"model": state}, "weights must be a state_dict, parameter name → tensor, got dict")
    refused(Planted(copy / "planted"), "cannot be loaded with weights_only=True")
    path.write_bytes(pickle.dumps(Planted(copy / "planted")))
    with pytest.raises(ValueError, match="cannot be loaded with weights_only=True"):
        run.load(copy / "out")
    assert not (copy / "planted").exists()
    path.write_bytes(b"half")
    with pytest.raises(ValueError, match="weights must be a state_dict"):
        run.load(copy / "out")


def test_loading_gives_the_model_back_and_leaves_the_random_numbers(trained: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    model, dataset = read_run_file(trained["path"]).load(trained["folder"])
    assert torch.equal(before, torch.get_rng_state())
    batch = pyhealth_collate([dataset[i] for i in range(4)])
    with torch.inference_mode():
        assert torch.equal(model.eval()(**batch)["logit"], trained["model"](**batch)["logit"])


@pytest.mark.parametrize("kind", list(pyhealth_models.SCHEMAS))
@pytest.mark.parametrize("name", ["Transformer", "StageAttentionNet"])
def test_a_model_of_any_features_loads_its_weights(name: str, kind: str) -> None:
    dataset = pyhealth_models.dataset(kind)
    arguments = {"embedding_dim": 16} | ({"heads": 2} if name == "Transformer" else {"chunk_size": 8, "levels": 2})
    before = build_model(name, arguments, dataset).state_dict()
    shapes = build_model(name, arguments, dataset, "meta").state_dict()
    assert {key: tensor.shape for key, tensor in shapes.items()} == {key: t.shape for key, t in before.items()}
    assert {tensor.device.type for tensor in shapes.values()} == {"meta"}
    after = load_model(name, arguments, dataset, before, "weights").state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    with pytest.raises(ValueError, match=r"weights does not fit the model: "):
        load_model(name, {**arguments, "embedding_dim": 32}, dataset, before, "weights")


def test_a_part_that_cannot_be_made_without_memory_is_built_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, arguments = pyhealth_models.dataset("flat"), {"embedding_dim": 16}
    state = build_model("Transformer", arguments, dataset).state_dict()
    plain = Transformer.__init__

    def pretrained(self: Any, *args: Any, **named: Any) -> None:
        if torch.get_default_device().type == "meta":
            raise RuntimeError("from_pretrained does not go with a meta device")
        plain(self, *args, **named)

    monkeypatch.setattr(Transformer, "__init__", pretrained)
    after = load_model("Transformer", arguments, dataset, state, "weights").state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in state.items())


def test_save_model_refuses_what_would_not_load(trained: dict[str, Any], tmp_path: Path) -> None:
    source = mimic_source(trained["folder"] / "cohort")
    model, dataset, arguments = (trained[key] for key in ("model", "dataset", "arguments"))
    with pytest.raises(ValueError, match=r"arguments must be those Transformer was built with: .*must be \[\d+, 8\]"):
        save_model(model, dataset, tmp_path / "m", arguments={**arguments, "embedding_dim": 8}, source=source)
    with pytest.raises(ValueError, match=r"run\['method'\] must be one of"):
        save_model(model, dataset, tmp_path / "m", arguments=arguments, source=source, run={"method": "x"})
    assert not (tmp_path / "m").exists()
    assert save_model(model, dataset, tmp_path / "m") == tmp_path / "m"
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"weights.pt", "vocabulary.json"}
