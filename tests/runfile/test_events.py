"""Run files of a Hugging Face classifier over MEDS: rows as its own maps give them, evaluations, what is refused."""

import json
import pickle
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import rollout
from rollout.results.verify import verify_folder
from rollout.runfile.events import EventsRun
from rollout.runfile.file import read_run_file
from rollout.runfile.hugging_face import check_outputs
from rollout.runfile.start import attribute_run_file
from tests.support.meds_folder import change

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'attention-rollout[hf]'"
)
from tests.support.classifiers import READS, VOCABULARY, classifier, home  # noqa: E402


def own_row(model: Any, tokens: torch.Tensor, read: str, method: str = "rollout") -> tuple[torch.Tensor, torch.Tensor]:
    """The row of a record's tokens by the maps that the model itself returns, and its logits; run alone."""
    with torch.inference_mode():
        output = model(input_ids=tokens[None], attention_mask=torch.ones_like(tokens)[None], output_attentions=True)
    matrix = rollout.attention_rollout(output.attentions, method=method)[0]
    row = {"first": matrix[0], "last": matrix[-1], "mean": matrix.mean(0)}[read]
    return row, output.logits[0]


@pytest.mark.parametrize("method", ["rollout", "discard"])
@pytest.mark.parametrize("kind", READS)
def test_rows_are_those_of_its_own_maps(tmp_path: Path, kind: str, method: str) -> None:
    run = attribute_run_file(home(tmp_path, kind), settings={"method": method}, progress=False)
    assert run.failed == 0
    loaded = read_run_file(tmp_path / "run.toml")
    model, dataset = loaded.load()
    assert loaded.reading(model, dataset)["read"] == READS[kind]
    twin = classifier(kind)
    twin.set_attn_implementation("eager")
    cohort = rollout.CohortAttributions(run.out)
    for number in (0, 7, 47):
        sample, rows = dataset[number], cohort.sample(number)
        codes = [event if event in VOCABULARY else "[UNK]" for event in dataset.events(number)["code"]]
        assert rows["code"].to_list() == codes
        tokens = torch.tensor([2, *sample["codes"][1].tolist(), 3])
        wanted, logits = own_row(twin, tokens, READS[kind], method)
        assert torch.allclose(torch.tensor(rows["attribution"].to_list()), wanted[1:-1].float(), atol=1e-6)
        assert rows["y_prob"][0].to_list() == pytest.approx([float(logits.softmax(-1)[1])], abs=1e-5)
        assert rows["y_true"][0].to_list() == sample["label"].tolist()
        hours = [None if hour != hour else hour for hour in sample["codes"][0].tolist()]
        assert rows["time"].to_list() == pytest.approx(hours)
    assert verify_folder(run.out) == []
    assert cohort.time_units == {"codes": "hours before the prediction time"}
    assert cohort.names["codes"]["LAB//HR"] == "The name of LAB//HR"


def test_the_command_line_needs_no_code(tmp_path: Path, command: Any) -> None:
    file = home(tmp_path, tables={"dataset": {"arguments": {"split": "train"}}})
    status, out, err = command("attribute", file)
    assert (status, out.split(":")[0]) == (0, "32 of 32 samples attributed"), err
    assert command("attribute", file)[1].startswith("32 samples, all done before")
    assert command("verify", tmp_path / "attributed", file)[0] == 0
    status, _, err = command("report", tmp_path / "attributed")
    assert status == 0, err
    assert "The name of LAB//HR" in (tmp_path / "attributed" / "report.html").read_text()
    change(tmp_path / "meds/data/train/0.parquet", code=pl.lit("LAB//HR"))
    status, out, _ = command("verify", tmp_path / "attributed", file)
    assert status == 2
    assert "samples hold other values than when they were attributed" in out


def test_what_goes_to_other_processes_explains_the_same(tmp_path: Path) -> None:
    loaded = read_run_file(home(tmp_path, "modernbert-mean"))
    model, dataset = loaded.load()
    arguments = loaded.arguments(model, dataset, loaded.settings)
    there = pickle.loads(pickle.dumps((model, dataset, arguments)))
    found = []
    for one, samples, given in ((model, dataset, arguments), there):
        found.append(given["explain"](one, given["collate"]([samples[0], samples[30]])))
    assert torch.equal(found[0].relevance["codes"], found[1].relevance["codes"])
    assert torch.equal(found[0].y_prob, found[1].y_prob)


def test_other_tokens_are_another_run(tmp_path: Path) -> None:
    attribute_run_file(home(tmp_path), progress=False)
    file = home(tmp_path, tables={"model": {"arguments": {"first": "", "last": "[SEP]"}}})
    with pytest.raises(ValueError, match=r"explain\.first"):
        attribute_run_file(file, progress=False)


def test_records_without_special_tokens_sum_to_one(tmp_path: Path) -> None:
    file = home(tmp_path, tables={"model": {"arguments": {"first": "", "last": ""}}})
    run = attribute_run_file(file, progress=False)
    sums = (
        rollout.CohortAttributions(run.out).attributions.group_by("sample").agg(pl.col("attribution").sum()).collect()
    )
    assert len(sums) == 48
    assert sums["attribution"].to_list() == pytest.approx([1.0] * 48, abs=1e-5)


def test_evaluate_scores_methods_by_the_same_explain(tmp_path: Path, command: Any) -> None:
    file = home(tmp_path)
    assert command("attribute", file)[0] == 0
    (tmp_path / "who.txt").write_text("101\n103\n")
    options = ("--methods", f"explain,discard,stored={tmp_path / 'attributed'}", "--leave-one-out", 30)
    status, out, err = command("evaluate", file, *options)
    assert status == 0, err
    assert out.startswith("48 of 48 samples evaluated")
    rows = pl.read_parquet(tmp_path / "evaluated" / "faithfulness" / "*.parquet")
    assert rows["method"].unique(maintain_order=True).to_list() == ["explain", "discard", "stored", "random"]
    drops = {
        name: part["drop"].to_list() for (name,), part in rows.sort("sample", "direction", "share").group_by("method")
    }
    assert drops["explain"] == drops["stored"]
    assert drops["explain"] != drops["discard"]
    # The drop of one sample by hand: the codes ranked first are gone, [CLS] and [SEP] stay.
    model, dataset = read_run_file(file).load()
    codes = dataset[5]["codes"][1]
    score, full = own_scores(tmp_path, 5), probability(model, codes)
    top = torch.tensor(score).argsort(descending=True, stable=True)[: -(-len(codes) // 2)]
    kept = codes[[place for place in range(len(codes)) if place not in top.tolist()]]
    wanted = full - probability(model, kept)
    sign = 1 if full >= 0.5 else -1
    found = rows.filter(sample=5, method="explain", direction="without").filter((pl.col("share") - 50).abs() < 1e-3)
    assert found["drop"].to_list() == pytest.approx([sign * wanted], abs=1e-5)
    status, out, err = command("evaluate", file, "--output", tmp_path / "few", "--patients", tmp_path / "who.txt")
    assert (status, out.split(":")[0]) == (0, "4 of 4 samples evaluated"), err


def own_scores(folder: Path, number: int) -> list[float]:
    return rollout.CohortAttributions(folder / "attributed").sample(number)["attribution"].to_list()


def probability(model: Any, codes: torch.Tensor) -> float:
    with torch.inference_mode():
        return float(model(input_ids=torch.tensor([[2, *codes.tolist(), 3]])).logits.softmax(-1)[0, 1])


def test_classes_by_name(tmp_path: Path) -> None:
    labels = {"died": 0, "home": 1, "moved": 2}
    file = home(tmp_path, num_labels=3, label2id=labels, id2label={number: name for name, number in labels.items()})
    names = pl.Series("categorical_value", ["home", "moved"] * 24)
    change(tmp_path / "meds/labels/dies.parquet", boolean_value=None, categorical_value=names)
    run = attribute_run_file(file, progress=False)
    predictions = rollout.CohortAttributions(run.out).predictions.collect()
    assert set(predictions["y_true"].list.first()) == {1.0, 2.0}
    assert predictions["y_prob"].list.len().unique().to_list() == [3]
    assert predictions["y_prob"].list.sum().to_list() == pytest.approx([1.0] * 48, abs=1e-5)


def test_one_logit_is_the_log_odds_of_class_1(tmp_path: Path) -> None:
    run = attribute_run_file(home(tmp_path, num_labels=1, problem_type="multi_label_classification"), progress=False)
    model, dataset = read_run_file(tmp_path / "run.toml").load()
    with torch.inference_mode():
        logit = model(input_ids=torch.tensor([[2, *dataset[0]["codes"][1].tolist(), 3]])).logits
    found = rollout.CohortAttributions(run.out).sample(0)["y_prob"][0].to_list()
    assert found == pytest.approx(logit.sigmoid()[0].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("config", "kind", "largest", "message"),
    [
        ({"num_labels": 1}, "boolean_value", None, "problem_type None"),
        ({"num_labels": 2}, "float_value", None, "the labels are float_value"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "boolean_value", None, "3 labels at once"),
        ({"num_labels": 3}, "boolean_value", None, "predicts 3 classes, and the labels are boolean"),
        ({"num_labels": 3}, "integer_value", 3, "predicts 3 classes, and the labels have the class 3"),
    ],
)
def test_outputs_that_are_no_prediction_of_the_labels(config: Any, kind: Any, largest: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_outputs(transformers.BertConfig(**config), kind, largest, "model")


def test_a_record_too_long_for_the_model_fails_alone(tmp_path: Path) -> None:
    run = attribute_run_file(home(tmp_path, max_position_embeddings=17), progress=False)
    assert 0 < run.failed < 48
    reasons = rollout.CohortAttributions(run.out).failures.collect()["error"].to_list()
    assert all("more than the 17 that the model takes: keep the last ones with [dataset]" in one for one in reasons)
    short = home(tmp_path, tables={"dataset": {"arguments": {"max_events": 15}}}, max_position_embeddings=17)
    assert attribute_run_file(short, tmp_path / "short", progress=False).failed == 0


class Attending(torch.nn.Module):
    """A head that weighs positions by what stands there."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = torch.nn.Linear(16, 1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return (self.weigh(states).softmax(1) * states).sum(1)


def test_a_head_that_reads_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = home(tmp_path)
    loaded = read_run_file(file)
    model, dataset = loaded.load()
    monkeypatch.setattr(model.bert, "pooler", Attending())
    with pytest.raises(
        ValueError, match=r"BertForSequenceClassification cannot be explained: the model reads positions \[0, 1, 2"
    ):
        loaded.reading(model, dataset)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def spoil_config(folder: Path, **changes: Any) -> None:
    path = folder / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model" / "model.safetensors"
    state = {name: tensor for name, tensor in load_file(path).items() if "classifier" not in name}
    save_file(state, path, metadata={"format": "pt"})


TABLES: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "another class": ({"model": {"class": "Transformer"}}, r'\[model\] class must be "transformers:AutoModelFor'),
    "another dataset": ({"dataset": {"class": "MEDSDataset"}}, "labels"),
    "no weights": ({"model": {"weights": "nowhere"}}, r"\[model\] weights must be a folder with config.json"),
    "no vocabulary": ({"model": {"vocabulary": "nowhere"}}, r"\[model\] vocabulary must be a file"),
    "no root": ({"dataset": {"root": "nowhere"}}, r"\[dataset\] root must be a MEDS folder"),
    "no labels": ({"task": {"labels": "nowhere"}}, "labels must be a Parquet file or a folder"),
    "no such value": ({"task": {"value": "integer_value"}}, "have no integer_value, but boolean_value"),
    "misspelt": ({"dataset": {"arguments": {"max_event": 3}}}, r'has no .max_event.; did you mean "max_events"\?'),
    "too few": ({"dataset": {"arguments": {"max_events": 0}}}, r"max_events must be a whole number, got 0"),
    "not said": ({"model": {"arguments": {"first": "[CLS]"}}}, r"vocabulary has '\[SEP\]': say with .*arguments.last"),
    "no such token": ({"model": {"arguments": {"first": "<s>", "last": ""}}}, "'<s>' is not in the vocabulary"),
    "readout": ({"run": {"readout": "forward"}}, "readout, target_class and query are of PyHealth's"),
    "gradients": ({"run": {"method": "chefer"}}, "must need nothing but attention for a model of transformers"),
    "frozen gradient": ({"run": {"method": "frozen_gradient"}}, "must need nothing but attention"),
}  # fmt: skip


@pytest.mark.parametrize("what", TABLES)
def test_what_a_run_file_is_refused_for(tmp_path: Path, what: str) -> None:
    tables, message = TABLES[what]
    file = home(tmp_path, tables=tables)
    with pytest.raises(ValueError, match=message) as raised:
        attribute_run_file(file, progress=False)
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "attributed" / "manifest.json").exists()


SPOILT: dict[str, tuple[Any, str]] = {
    "code of its own": (lambda f: spoil_config(f, auto_map={"AutoConfig": "x.y"}), "its own, which is never run"),
    "quantised": (lambda f: spoil_config(f, quantization_config={}), "a quantised model cannot be captured"),
    "an adapter": (lambda f: (f / "model/adapter_config.json").write_text("{}"), "merge the adapter into the model"),
    "no safetensors": (lambda f: (f / "model/model.safetensors").unlink(), "save the model as safetensors"),
    "unknown type": (lambda f: spoil_config(f, model_type="x"), "holds no sequence classifier that can be read"),
    "regression": (lambda f: spoil_config(f, problem_type="regression"), "must predict classes: its config says"),
    "no head": (drop_weights, r"with all its weights: classifier.bias, classifier.weight are missing"),
    "padding": (lambda f: spoil_config(f, pad_token_id=1), "padding has the id 0, .* config.json it is 1"),
    "ids": (lambda f: (f / "vocabulary.json").write_text(json.dumps({**VOCABULARY, "x": 99})), "'x' has the id 99"),
    "two codes of one id": (
        lambda f: (f / "vocabulary.json").write_text(json.dumps({**VOCABULARY, "x": 5})), "and 'x' have 5",
    ),
    "pieces": (
        lambda f: (f / "vocabulary.json").write_text('{"model": {"type": "BPE", "vocab": {}}}'), "splits codes into",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_a_model_that_is_refused(tmp_path: Path, what: str) -> None:
    spoil, message = SPOILT[what]
    file = home(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        attribute_run_file(file, progress=False)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["run.toml", "model/config.json", "vocabulary.json"])
def test_a_spoilt_file_is_read_or_refused_in_one_line(tmp_path: Path, name: str) -> None:
    file = home(tmp_path, num_labels=2)
    draw, content = random.Random(3), (tmp_path / name).read_text()
    refused = read = 0
    for _ in range(30):
        at, length = draw.randrange(len(content)), draw.choice((1, 1, 4, 30))
        noise = draw.choice(["", '"', "9" * 30, "-1", "null", "[]", "{}", "\n", "\x00", "true"])
        (tmp_path / name).write_text(content[:at] + noise + content[at + length :])
        try:
            loaded = read_run_file(file)
            assert isinstance(loaded, EventsRun)
            model, dataset = loaded.load()
            loaded.arguments(model, dataset, loaded.settings)
        except ValueError as error:
            refused += len(str(error).splitlines()) == 1
        else:
            read += 1
    assert refused + read == 30
    assert refused > 5


def test_a_tokenizer_of_whole_words_is_a_vocabulary(tmp_path: Path) -> None:
    file = home(tmp_path)
    words = {"model": {"type": "WordLevel", "vocab": VOCABULARY}, "added_tokens": [{"content": "[CLS]", "id": 2}]}
    (tmp_path / "vocabulary.json").write_text(json.dumps(words))
    assert read_run_file(file).samples().vocabulary == VOCABULARY
