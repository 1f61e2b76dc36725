"""PyHealth models and datasets as cohorts: each sample's rows are those of PyHealth's interpreter on it alone."""

import copy
import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from pyhealth.datasets import create_sample_dataset
from pyhealth.interpret.methods import CheferRelevance as StockChefer
from pyhealth.models import Transformer

import rollout
from rollout.cohort.explain import describe_method
from rollout.cohort.rows import feature_decoders, measured_rows
from rollout.cohort.settings import check_settings
from rollout.data.collate import pyhealth_collate
from rollout.method import METHODS
from rollout.pyhealth import AttentionRollout, FrozenGradient
from rollout.report import write_report
from tests.support.capture_state import assert_nothing_left, state
from tests.support.pyhealth_models import Stock, dataset, stage_net, transformer
from tests.support.toy_cohort import rows

SETTINGS = {"part_samples": 4, "batch_tokens": 12, "progress": False}


def stock_rows(interpreter, samples, **options) -> pl.DataFrame:
    """The rows PyHealth's interpreter gives, one sample at a time: no padding."""
    decoders = feature_decoders(samples)
    tables = []
    for number in range(len(samples)):
        sample = samples[number]
        relevance = interpreter.attribute(**pyhealth_collate([sample]), **options)
        tables.append(pl.from_arrow(measured_rows([sample], [number], relevance, decoders)[0]))
    return pl.concat(tables)


def assert_rows(found: pl.DataFrame, wanted: pl.DataFrame) -> None:
    assert found.drop("attribution").equals(wanted.drop("attribution"), null_equal=True)
    np.testing.assert_allclose(found["attribution"], wanted["attribution"], atol=1e-5)


@pytest.mark.parametrize("kind", ["flat", "nested", "mixed", "timeseries"])
def test_transformer_by_pyhealths_method(kind: str, tmp_path) -> None:
    model, samples = transformer(kind), dataset(kind)
    before = state(model)
    settings = SETTINGS | ({"batch_tokens": 1} if kind == "timeseries" else {})  # there the model depends on padding
    run = rollout.attribute_cohort(model, samples, tmp_path / "out", method="pyhealth", **settings)
    assert_nothing_left(model, before)
    assert (run.attributed, run.failed) == (6, 0)
    assert_rows(rows(tmp_path / "out"), stock_rows(Stock(model), samples))
    found = rows(tmp_path / "out", "predictions")
    with torch.inference_mode():
        alone = [model(**pyhealth_collate([samples[number]]))["y_prob"].item() for number in range(6)]
    np.testing.assert_allclose(found["y_prob"].list.get(0), alone, atol=1e-6)
    assert found["y_true"].list.get(0).to_list() == [0.0, 1.0] * 3
    assert found["visit_id"].to_list() == [f"v{i}" for i in range(6)]


def test_stage_attention_net(tmp_path) -> None:
    model, samples = stage_net("nested"), dataset("nested")
    rollout.attribute_cohort(model, samples, tmp_path / "out", method="pyhealth", **SETTINGS)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["granularity"] == {"visits": "visit"}
    assert_rows(rows(tmp_path / "out"), stock_rows(Stock(model), samples))


@pytest.mark.parametrize("kind", ["flat", "nested"])
def test_the_frozen_gradient_has_signs_and_a_score_for_every_code(kind: str, tmp_path) -> None:
    model, samples = transformer(kind), dataset(kind)
    before = state(model)
    run = rollout.attribute_cohort(model, samples, tmp_path / "out", method="frozen_gradient", **SETTINGS)
    assert_nothing_left(model, before)
    assert (run.attributed, run.failed) == (6, 0)
    found = rows(tmp_path / "out")
    assert_rows(found, stock_rows(FrozenGradient(model), samples))
    assert found["attribution"].min() < 0 < found["attribution"].max()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert set(manifest["granularity"].values()) == {"code"}
    assert manifest["identity"]["method"]["name"] == "frozen_gradient"
    assert set(rows(tmp_path / "out", "predictions")["target_class"]) == {0}
    page = write_report(tmp_path / "out").read_text(encoding="utf-8")
    assert "attention weights, norm statistics and gates held" in page
    assert "adds to the score (logit) of the class" in page
    assert "where attention goes" not in page


@pytest.mark.parametrize("kind", ["flat", "nested"])
@pytest.mark.parametrize("name", ["value_norm", "kobayashi"])
def test_value_aware_rows_and_their_report(kind: str, name: str, tmp_path) -> None:
    model, samples = transformer(kind), dataset(kind)
    before = state(model)
    run = rollout.attribute_cohort(model, samples, tmp_path / "out", method=name, **SETTINGS)
    assert_nothing_left(model, before)
    assert (run.attributed, run.failed) == (6, 0)
    assert_rows(rows(tmp_path / "out"), stock_rows(AttentionRollout(model, method=name), samples))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["identity"]["method"]["values"] == METHODS[name].values
    page = write_report(tmp_path / "out").read_text(encoding="utf-8")
    assert "x(l): what the residual adds" in page


def test_a_stage_attention_net_by_its_values(tmp_path) -> None:
    model, samples = stage_net("nested"), dataset("nested")
    rollout.attribute_cohort(model, samples, tmp_path / "out", method="value_norm", **SETTINGS)
    assert_rows(rows(tmp_path / "out"), stock_rows(AttentionRollout(model, method="value_norm"), samples))


def test_rows_without_their_own_path(tmp_path) -> None:
    model, samples = transformer("flat"), dataset("flat")
    method = replace(METHODS["rollout"], own_path=False)
    run = rollout.attribute_cohort(model, samples, tmp_path / "out", method=method, **SETTINGS)
    assert (run.attributed, run.failed) == (6, 0)
    found = rows(tmp_path / "out")
    assert_rows(found, stock_rows(AttentionRollout(model, method=method), samples))
    sums = found.group_by("sample", "feature").agg(pl.col("attribution").sum())["attribution"]
    np.testing.assert_allclose(sums, 1.0, atol=1e-6)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["identity"]["method"]["own_path"] is False
    assert "the one path that never attends" in write_report(tmp_path / "out").read_text(encoding="utf-8")


def test_a_row_of_which_nothing_is_left_is_no_failure(tmp_path) -> None:
    """Attention that counts nothing: all there is is the own path."""
    method = rollout.Method(residual=1.0, own_path=False)
    run = rollout.attribute_cohort(transformer("flat"), dataset("flat"), tmp_path / "out", method=method, **SETTINGS)
    assert (run.attributed, run.failed) == (6, 0)
    assert set(rows(tmp_path / "out")["attribution"]) == {0.0}


def test_run_files_and_the_command_line_take_every_name_but_that_of_supplied_matrices() -> None:
    for name, method in METHODS.items():
        if not method.matrices:
            check_settings({"method": name}, str)
    with pytest.raises(ValueError, match=r"method must be one of .*value_norm.*kobayashi.*got 'product'"):
        check_settings({"method": "product"}, str)


def test_a_method_that_says_nothing_new_is_written_as_before() -> None:
    """A run begun before there were such fields is the same run; where they say something they tell runs apart."""
    later = {"normalize_attention", "values", "own_path"}
    for name, method in METHODS.items():
        said = {field for field in later if getattr(method, field) != getattr(rollout.Method(), field)}
        assert later & describe_method(name).keys() == said


@pytest.fixture(scope="module")
def three_classes():
    """Samples of three classes, and a model of them."""
    drawn = np.random.default_rng(3)
    raw = [
        {
            "patient_id": f"p{i}", "admission_id": 100 + i, "label": i % 3,
            "codes": [f"c{k}" for k in drawn.integers(0, 9, 1 + i % 5)],
        }
        for i in range(12)
    ]  # fmt: skip
    samples = create_sample_dataset(raw, {"codes": "sequence"}, {"label": "multiclass"}, dataset_name="three")
    torch.manual_seed(5)
    return Transformer(samples, embedding_dim=16, heads=2, num_layers=2), samples


@pytest.mark.parametrize("target", [None, 2])
def test_class_specific_rows_and_their_class(three_classes, tmp_path, target) -> None:
    model, samples = three_classes
    rollout.attribute_cohort(model, samples, tmp_path / "out", method="chefer", target_class=target, **SETTINGS)
    found = rows(tmp_path / "out", "predictions")
    predicted = np.stack(found["y_prob"].to_numpy()).argmax(1)
    assert found["target_class"].to_list() == (predicted.tolist() if target is None else [2] * 12)
    assert found["y_true"].list.get(0).to_list() == [float(i % 3) for i in range(12)]
    assert found["visit_id"].to_list() == [str(100 + i) for i in range(12)]
    assert all(parameter.grad is None for parameter in model.parameters())
    copied = copy.deepcopy(model)  # PyHealth's leaves gradients on its model
    assert_rows(rows(tmp_path / "out"), stock_rows(StockChefer(copied), samples, target_class_idx=target))


def test_gradient_rollout_against_the_oracle(three_classes, tmp_path) -> None:
    model, samples = copy.deepcopy(three_classes[0]).eval(), three_classes[1]
    rollout.attribute_cohort(model, samples, tmp_path / "out", method="grad_rollout", target_class=1, **SETTINGS)
    found = rows(tmp_path / "out")
    for number in range(12):
        model.set_attention_hooks(True)
        model(**pyhealth_collate([samples[number]]))["logit"][0, 1].backward()
        maps, gradients = zip(*model.get_attention_layers()["codes"], strict=True)
        model.set_attention_hooks(False)
        row = rollout.attention_rollout(
            [a.double() for a in maps], query=0, gradients=[g.double() for g in gradients], method="grad_rollout",
            backend="reference",
        )  # fmt: skip
        mine = found.filter(pl.col("sample") == number)["attribution"].to_numpy()
        np.testing.assert_allclose(mine, row[0].numpy(), atol=1e-6)


def test_wrong_settings_are_refused(three_classes, tmp_path) -> None:
    model, samples = three_classes
    out = tmp_path / "out"
    for settings, error, message in [
        ({"target_class": 1}, ValueError, "target_class is for class-specific methods"),
        ({"method": "chefer", "readout": "forward"}, ValueError, "readout must be model for a class-specific method"),
        ({"method": "product"}, ValueError, "product|matrices"),
        ({"method": rollout.Method(matrices=True)}, ValueError, "supplied matrices"),
        ({"method": "value_norm", "target_class": 1}, ValueError, "target_class is for class-specific methods"),
    ]:
        with pytest.raises(error, match=message):
            rollout.attribute_cohort(model, samples, out, **settings)
    watched = copy.deepcopy(model)
    watched.transformer["codes"].transformer[0].attention.attention.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="method must not measure values for this Transformer"):
        rollout.attribute_cohort(watched, samples, out, method="kobayashi")
    with pytest.raises(TypeError, match="attention readout methods"):
        rollout.attribute_cohort(torch.nn.Linear(2, 2), samples, out)
    assert not out.exists()


def test_a_dataset_on_disk_and_workers(tmp_path) -> None:
    """PyHealth's streamed samples in two worker processes: the same rows as in one."""
    drawn = np.random.default_rng(4)
    raw = [
        {"patient_id": f"p{i // 2}", "label": i % 2, "codes": [f"c{k}" for k in drawn.integers(0, 30, 1 + i)]}
        for i in range(24)
    ]
    with create_sample_dataset(raw, {"codes": "sequence"}, {"label": "binary"}, in_memory=False) as samples:
        torch.manual_seed(1)
        model = Transformer(samples, embedding_dim=16, heads=2, num_layers=2)
        one = rollout.attribute_cohort(model, samples, tmp_path / "one", part_samples=6, progress=False)
        two = rollout.attribute_cohort(model, samples, tmp_path / "two", part_samples=6, progress=False, workers=2)
    assert (one.rows, one.attributed) == (two.rows, two.attributed) == (24 * 25 // 2, 24)
    assert_rows(rows(tmp_path / "one"), rows(tmp_path / "two"))


def test_a_name_may_leave_the_own_path_out(tmp_path) -> None:
    model, samples = transformer("flat"), dataset("flat")
    rollout.attribute_cohort(model, samples, tmp_path / "named", method="rollout:own_path=false", **SETTINGS)
    rollout.attribute_cohort(
        model, samples, tmp_path / "given", method=replace(METHODS["rollout"], own_path=False), **SETTINGS
    )
    assert rows(tmp_path / "named").equals(rows(tmp_path / "given"), null_equal=True)
    told = json.loads((tmp_path / "named" / "manifest.json").read_text())["identity"]["method"]
    assert (told["name"], told["own_path"]) == ("rollout:own_path=false", False)
    check_settings({"method": "chefer:own_path=false"}, str)
    for wrong in ("frozen_gradient:own_path=false", "rolout:own_path=false", "rollout:own_path=true"):
        with pytest.raises(ValueError, match="method must be one of"):
            check_settings({"method": wrong}, str)
