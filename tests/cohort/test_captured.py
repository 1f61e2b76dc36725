"""Cohorts of PyHealth's models without readout methods: a row per token, patch or code, against the drop-in."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pyhealth", reason="PyHealth's models need the pyhealth extra")

from pyhealth.datasets.utils import collate_fn_dict_with_padding
from transformers import AutoTokenizer

import rollout
from rollout.pyhealth import AttentionRollout
from rollout.report import write_report
from rollout.results.verify import verify_folder
from tests.support.capture_pyhealth import PYHEALTH, TEXTS, VISITS, bert, data
from tests.support.toy_cohort import assert_same

TEXT, VIT, DEID = "TransformersModel (BERT)", "TorchvisionModel (ViT)", "TransformerDeID (BERT)"
QUIET: dict[str, Any] = {"progress": False}


def made(name: str, kind: str) -> tuple[Any, Any]:
    return PYHEALTH[name].make("sdpa"), data(kind)[0]


def alone(model: Any, dataset: Any, number: int, **options: Any) -> tuple[torch.Tensor, Any]:
    """Relevance and prediction of one sample by the drop-in."""
    batch = collate_fn_dict_with_padding([dataset[number]])
    interpreter = AttentionRollout(model, **options)
    (relevance,) = interpreter.attribute(**batch, interpolate=False).values()
    with torch.no_grad():
        return relevance[0], model(**batch)


@pytest.mark.parametrize("method", ["rollout", "discard"])
def test_a_row_for_every_token(tmp_path: Path, method: str) -> None:
    model, dataset = made(TEXT, "text")
    run = rollout.attribute_cohort(model, dataset, tmp_path, method=method, **QUIET)
    assert (run.failed, verify_folder(tmp_path)) == (0, [])
    cohort = rollout.CohortAttributions(tmp_path)
    assert cohort.granularity == {"text": "code"}
    assert cohort.manifest["identity"]["plan"]["equal_lengths"] == (method == "discard")
    for number, text in enumerate(TEXTS):
        rows, (relevance, output) = cohort.sample(number), alone(model, dataset, number, method=method)
        assert rows["code"].to_list() == text.split()
        assert rows["position"].to_list() == list(range(len(text.split())))
        assert rows["attribution"].to_list() == pytest.approx(relevance[1:-1].tolist(), abs=1e-6)
        assert rows["y_prob"][0].to_list() == pytest.approx(output["y_prob"][0].tolist(), abs=1e-6)
        assert rows["y_true"][0].to_list() == [number % 2]
        assert rows["patient_id"][0] == f"p{number}"
    assert model.tokenizer.padding_side == "right"


def test_special_and_unknown_tokens_and_texts_that_are_cut(tmp_path: Path) -> None:
    model, _ = made(TEXT, "text")
    texts = ["fever zebra [SEP] pain", "", "pain " * 300]
    samples = Samples(data("text")[0], texts)
    run = rollout.attribute_cohort(model, samples, tmp_path, batch_tokens=300, **QUIET)
    cohort = rollout.CohortAttributions(tmp_path)
    assert run.failed == 0
    assert cohort.sample(0)["code"].to_list() == ["fever", "[UNK]", "pain"]
    assert cohort.sample(2)["position"].to_list() == list(range(254))
    assert cohort.predictions.collect()["sample"].to_list() == [0, 1, 2]
    (relevance, _) = alone(model, samples, 0)
    assert cohort.sample(0)["attribution"].to_list() == pytest.approx(relevance[[1, 2, 4]].tolist(), abs=1e-6)


class Samples:
    """Other texts in a dataset of PyHealth's."""

    def __init__(self, like: Any, texts: list[str]) -> None:
        self.like, self.texts = like, texts
        self.input_processors, self.output_processors = like.input_processors, like.output_processors

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.like[0], "text": self.texts[number]}


def test_a_text_that_the_model_reads_otherwise_is_a_failure(tmp_path: Path) -> None:
    model, dataset = made(TEXT, "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rollout.pyhealth.zoo.MOST", 6)
        run = rollout.attribute_cohort(model, dataset, tmp_path, **QUIET)
    failures = rollout.CohortAttributions(tmp_path).failures.collect()
    assert run.failed == 1
    assert failures["sample"].to_list() == [2]
    assert "the tokens that the TransformersModel read must be the first 6 of its text" in failures["error"][0]


def test_a_row_for_every_patch(tmp_path: Path) -> None:
    model, dataset = made(VIT, "images")
    run = rollout.attribute_cohort(model, dataset, tmp_path, **QUIET)
    cohort = rollout.CohortAttributions(tmp_path)
    assert (run.failed, cohort.granularity) == (0, {"image": "code"})
    for number in range(3):
        rows, (relevance, output) = cohort.sample(number), alone(model, dataset, number)
        assert rows["position"].to_list() == list(range(16))
        assert rows["code"].to_list() == [f"patch {row},{column}" for row in range(4) for column in range(4)]
        assert rows["attribution"].to_list() == pytest.approx(relevance.flatten().tolist(), abs=1e-6)
        assert rows["y_prob"][0].to_list() == pytest.approx(output["y_prob"][0].tolist(), abs=1e-6)
    assert "patch 3,3" in write_report(tmp_path).read_text()


@pytest.mark.parametrize(("name", "kind"), [("GPT2", "stream"), ("HALO", "many hot")])
def test_the_codes_of_a_stream_for_a_position_named(tmp_path: Path, name: str, kind: str) -> None:
    model, dataset = made(name, kind)
    run = rollout.attribute_cohort(model, dataset, tmp_path, query=-2, **QUIET)
    assert run.failed == 0
    cohort = rollout.CohortAttributions(tmp_path)
    assert cohort.granularity == {"visits": "code" if name == "GPT2" else "visit"}
    assert cohort.manifest["identity"]["query"] == -2
    vocabulary = dataset.input_processors["visits"].code_vocab
    for number, visits in enumerate(VISITS):
        rows, (relevance, output) = cohort.sample(number), alone(model, dataset, number, query=-2)
        cells = dataset[number]["visits"].nonzero().tolist()
        assert rows.select("visit", "position").rows() == [tuple(cell) for cell in cells]
        assert sorted(rows["code"].to_list()) == sorted(code for visit in visits for code in visit)
        assert rows["attribution"].to_list() == pytest.approx([float(relevance[v, c]) for v, c in cells], abs=1e-6)
        assert rows["y_true"][0] is None
        if name == "HALO":
            assert rows["y_prob"][0] is None
            continue
        last = len(cells) + len(visits) - 1  # the last code, behind [BOS] and between marks
        assert rows["y_prob"][0].to_list() == pytest.approx(output["y_prob"][0, last].tolist(), abs=1e-6)
        assert len(rows["y_prob"][0]) == len(vocabulary) + 3
    assert "visits" in write_report(tmp_path).read_text()


def test_de_identification_for_a_token_named(tmp_path: Path) -> None:
    model, dataset = made(DEID, "words")
    run = rollout.attribute_cohort(model, dataset, tmp_path, query=2, **QUIET)
    assert run.failed == 0
    rows, (relevance, output) = rollout.CohortAttributions(tmp_path).sample(2), alone(model, dataset, 2, query=2)
    assert rows["code"].to_list() == TEXTS[2].split()
    assert rows["attribution"].to_list() == pytest.approx(relevance[1:-1].tolist(), abs=1e-6)
    assert rows["y_prob"][0].to_list() == pytest.approx(output["y_prob"][0, 2].tolist(), abs=1e-6)


REFUSED = {
    "MedLink": ("pairs", {"query": -1}, "cohort of a MedLink cannot be attributed: it takes pairs of records"),
    "PromptEHR (BART)": ("stream", {"query": -1}, "cohort of a PromptEHR cannot be attributed: it masks other codes"),
    "ConCare": ("labs", {}, "cohort of a ConCare cannot be attributed: its positions are the columns of a record"),
    "GPT2": ("stream", {}, "query must name a position for a GPT2, got None"),
    TEXT: ("text", {"query": 1}, "query is for models whose every position predicts"),
    VIT: ("images", {"method": "value_norm"}, "method must not measure values for a TorchvisionModel"),
    DEID: ("words", {"query": True}, "query must be a whole number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    kind, settings, why = REFUSED[name]
    model, dataset = made(name, kind)
    with pytest.raises((ValueError, TypeError), match=why):
        rollout.attribute_cohort(model, dataset, tmp_path / "out", **settings, **QUIET)
    assert not (tmp_path / "out").exists()


def test_query_is_refused_where_nothing_takes_it(tmp_path: Path) -> None:
    model, dataset = made("GPT2", "stream")
    with pytest.raises(ValueError, match="query is not handed to explain"):
        rollout.attribute_cohort(model, dataset, tmp_path / "out", query=1, explain=print, **QUIET)
    with pytest.raises(ValueError, match="entries of feature 'text' must be known, those of a TextProcessor"):
        rollout.attribute_cohort(model, data("text")[0], tmp_path / "out", explain=print, **QUIET)


def test_what_a_model_makes_itself_is_not_taken_out_of_a_record(tmp_path: Path) -> None:
    for name, kind, why in (
        (VIT, "images", "what a TorchvisionModel makes of a record has relevance by attribute_cohort"),
        (TEXT, "text", "evaluate_cohort: the entries of feature 'text' must be known"),
    ):
        model, dataset = made(name, kind)
        with pytest.raises(ValueError, match=why):
            rollout.evaluate_cohort(model, dataset, tmp_path / "out", methods=["rollout"], replacement="pad")
        with pytest.raises(ValueError, match=f"vocabularies must be left out for a {type(model).__name__}"):
            rollout.attribute_cohort(model, dataset, tmp_path / "out", vocabularies={"text": {"fever": 1}}, **QUIET)


def test_a_run_goes_on_and_another_tokenizer_is_another_run(tmp_path: Path) -> None:
    model, dataset = made(TEXT, "text")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    rollout.attribute_cohort(model, dataset, whole, part_samples=1, **QUIET)
    rollout.attribute_cohort(model, dataset, broken, part_samples=1, **QUIET)
    for part in sorted((broken / "parts").iterdir())[1:]:
        part.unlink()
    rollout.attribute_cohort(model, dataset, broken, part_samples=1, **QUIET)
    assert_same(broken, whole)
    model.tokenizer = AutoTokenizer.from_pretrained(bert(), do_lower_case=False)
    with pytest.raises(ValueError, match=r"dataset.entries.text: .* there, .* now"):
        rollout.attribute_cohort(model, dataset, broken, part_samples=1, **QUIET)


def test_workers_read_texts_as_one_process_does(tmp_path: Path) -> None:
    model, dataset = made(TEXT, "text")
    rollout.attribute_cohort(model, dataset, tmp_path / "one", part_samples=1, **QUIET)
    rollout.attribute_cohort(model, dataset, tmp_path / "two", part_samples=1, workers=2, **QUIET)
    assert_same(tmp_path / "two", tmp_path / "one")
