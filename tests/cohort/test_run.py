"""A cohort attributed into a folder: the right numbers, whole after any stop, and failures set apart."""

import dataclasses
import json
import threading

import numpy as np
import polars as pl
import pyarrow.dataset
import pytest
import torch

import rollout
from rollout.cohort import CohortError
from rollout.cohort.explain import Explained
from rollout.cohort.plan import Plan
from tests.support.capture_state import assert_nothing_left, state
from tests.support.toy_cohort import (
    VOCABULARIES,
    Attention,
    Records,
    assert_same,
    attribute,
    collate,
    contents,
    explain,
    rows,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run of 90 samples."""
    out = tmp_path_factory.mktemp("cohort") / "whole"
    return out, attribute(out)


def test_every_entry_has_the_row_of_its_sample_alone(whole) -> None:
    """Against each sample on its own, unpadded, by the float64 oracle."""
    out, run = whole
    model, records = Attention().double(), Records(90)
    found = rows(out)
    named = {number: name for name, number in VOCABULARIES["codes"].items()}
    expected = []
    for number in range(90):
        sample = records[number]
        batch = collate([sample | {"labs": sample["labs"].double()}])
        visit = None if sample["visit_id"] is None else str(sample["visit_id"])
        for key, x in (("codes", model.embed(batch["codes"])), ("labs", model.lift(batch["labs"][..., None]))):
            _, maps = model.layers(x.detach(), batch["lengths"][key])
            scores = rollout.attention_rollout(maps, query=0, backend="reference")[0].tolist()
            codes = [named[int(code)] for code in sample["codes"]] if key == "codes" else [None] * len(scores)
            expected += [
                (number, sample["patient_id"], visit, key, None, place, codes[place], None, score)
                for place, score in enumerate(scores)
            ]
    wanted = pl.DataFrame(expected, schema=found.schema, orient="row")
    assert found.drop("attribution").equals(wanted.drop("attribution"), null_equal=True)
    np.testing.assert_allclose(found["attribution"], wanted["attribution"], rtol=0, atol=1e-6)
    assert (run.samples, run.attributed, run.failed, run.rows) == (90, 90, 0, len(expected))


def test_predictions_are_those_of_the_same_forward_pass(whole) -> None:
    out, _ = whole
    found = rows(out, "predictions")
    assert found["sample"].to_list() == list(range(90))
    alone = [explain(Attention(), collate([Records(90)[number]])).y_prob for number in range(90)]
    np.testing.assert_allclose(found["y_prob"].list.get(0), torch.cat(alone)[:, 0], atol=1e-6)
    assert found["y_true"].list.get(0).to_list() == [float(number % 3 == 0) for number in range(90)]


def test_manifest_says_what_was_run(whole) -> None:
    out, run = whole
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["counts"] == {
        "samples": 90, "attributed": 90, "failed": 0, "rows": run.rows, "tokens": run.rows, "parts": 5,
    }  # fmt: skip
    assert manifest["identity"]["method"]["residual"] == 0.5
    assert manifest["identity"]["dataset"]["samples"] == 90
    assert manifest["granularity"] == {"codes": "code", "labs": "step"}
    assert manifest["columns"]["attributions"] == rows(out).columns
    assert [(part["start"], part["stop"]) for part in manifest["parts"]] == [
        (0, 20), (20, 40), (40, 60), (60, 80), (80, 90),
    ]  # fmt: skip
    assert [sum(part["batches"]) for part in manifest["parts"]] == [20, 20, 20, 20, 10]
    (session,) = manifest["sessions"]
    assert session["samples"] == 90
    assert set(session["seconds"]) == {"collate", "forward", "chain", "write"}
    assert session["versions"]["torch"] == torch.__version__.split("+")[0]


def test_readers_see_one_dataset(whole) -> None:
    out, run = whole
    duckdb, pandas = pytest.importorskip("duckdb"), pytest.importorskip("pandas")
    folder = out / "attributions"
    expected = rows(out)["attribution"].sum()
    arrow = pyarrow.dataset.dataset(folder).to_table()
    (counted, total), *_ = duckdb.sql(f"select count(*), sum(attribution) from '{folder}/*.parquet'").fetchall()
    frame = pandas.read_parquet(folder)
    assert arrow.num_rows == counted == len(frame) == run.rows
    assert total == pytest.approx(expected)
    assert frame["attribution"].sum() == pytest.approx(expected, rel=1e-5)
    assert (
        arrow["code"].to_pylist()
        == rows(out)["code"].to_list()
        == [None if code is None or code != code else code for code in frame["code"]]
    )


def test_a_finished_run_is_left_alone(whole) -> None:
    out, _ = whole

    def times() -> dict:
        return {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.name != ".rollout.lock"}

    before = times()
    run = attribute(out)
    assert (run.done, run.kept, run.parts) == (0, 5, 5)
    assert "all done before" in str(run)
    assert len(before) == 16
    assert times() == before


def test_the_plan_changes_no_value(whole, tmp_path) -> None:
    out, _ = whole
    attribute(tmp_path / "other", batch_tokens=2000, batch_samples=7, part_samples=33)
    one, other = rows(out), rows(tmp_path / "other")
    assert one.drop("attribution").equals(other.drop("attribution"), null_equal=True)
    np.testing.assert_allclose(one["attribution"], other["attribution"], atol=1e-6)


def test_a_run_stopped_by_an_exception_goes_on(whole, tmp_path) -> None:
    out = tmp_path / "stopped"
    calls = []

    def interrupted(model, batch):
        calls.append(batch)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return explain(model, batch)

    with pytest.raises(KeyboardInterrupt):
        attribute(out, explain=interrupted)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "running"
    assert 0 < manifest["counts"]["parts"] < 5
    run = attribute(out, explain=interrupted)
    assert run.kept == manifest["counts"]["parts"]
    assert run.kept + run.done // 20 >= 4
    assert_same(out, whole[0])
    assert json.loads((out / "manifest.json").read_text())["status"] == "complete"


# All but 21 are among the samples whose content is not looked at when a run is known again.
SPOILED = {5: "nan", 21: "unreadable", 22: "bad tensor", 46: "unknown code", 50: "nan"}
REASONS = {
    5: "the attribution of feature 'labs' is not finite",
    21: "cannot be read: OSError: block 7 cannot be read",
    22: ("RuntimeError", "ValueError", "TypeError"),
    46: "IndexError: index out of range in self",
    50: "the attribution of feature 'labs' is not finite",
}


def test_failures_are_set_apart_and_can_be_retried(whole, tmp_path) -> None:
    out = tmp_path / "failing"
    records = Records(90, SPOILED)
    run = attribute(out, dataset=records)
    assert (run.attributed, run.failed, run.done) == (85, 5, 90)
    assert "5 FAILED" in str(run)
    failures = rows(out, "failures")
    assert failures["sample"].to_list() == list(SPOILED)
    for number, error in failures.iter_rows():
        assert error.startswith(REASONS[number])
        assert len(error) > 10
    healthy = [number for number in range(90) if number not in SPOILED]
    assert rows(out, "predictions")["sample"].to_list() == healthy
    one, other = rows(out), rows(whole[0]).filter(~pl.col("sample").is_in(list(SPOILED)))
    assert one.drop("attribution").equals(other.drop("attribution"), null_equal=True)
    np.testing.assert_allclose(one["attribution"], other["attribution"], atol=1e-6)
    assert json.loads((out / "manifest.json").read_text())["status"] == "complete with failures"

    records.spoiled = {50: "unknown code"}
    kept = attribute(out, dataset=records)
    assert (kept.done, kept.failed) == (0, 5)
    again = attribute(out, dataset=records, retry_failures=True)
    assert (again.kept, again.done, again.failed) == (2, 60, 1)
    records.spoiled = {}
    assert attribute(out, dataset=records, retry_failures=True).failed == 0
    assert_same(out, whole[0])


def test_a_cohort_of_failures_only_stops_at_once(tmp_path) -> None:
    def broken(model, batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(CohortError, match=r"none of the first 40 samples.*RuntimeError: mat1 and mat2"):
        attribute(tmp_path / "out", explain=broken, part_samples=40)
    assert attribute(tmp_path / "one", dataset=Records(1, {0: "unreadable"})).failed == 1


def test_out_of_memory_halves_the_batch(whole, tmp_path) -> None:
    sizes = []

    def small_gpu(model, batch):
        if len(batch["codes"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        sizes.append(len(batch["codes"]))
        return explain(model, batch)

    out = tmp_path / "halved"
    run = attribute(out, explain=small_gpu)
    assert run.failed == 0
    assert run.halved > 0
    assert max(sizes) == 3
    one, other = rows(out), rows(whole[0])
    assert one.drop("attribution").equals(other.drop("attribution"), null_equal=True)
    np.testing.assert_allclose(one["attribution"], other["attribution"], atol=1e-6)
    manifest = json.loads((out / "manifest.json").read_text())
    assert len(manifest["notes"]) == run.halved
    assert "samples ran out of memory and were done in halves" in manifest["notes"][0]
    assert f"{run.halved} batches ran out of memory" in str(run)


def test_a_sample_too_large_for_memory_is_a_failure(tmp_path) -> None:
    def tiny_gpu(model, batch):
        if batch["codes"].shape[1] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return explain(model, batch)

    run = attribute(tmp_path / "out", explain=tiny_gpu)
    long = [number for number in range(90) if 1 + number * 7 % 23 > 20]
    assert rows(tmp_path / "out", "failures")["sample"].to_list() == long
    assert run.attributed == 90 - len(long)


def test_the_model_is_left_as_it_was(tmp_path) -> None:
    model = Attention()
    model.train()
    model.head.eval()
    before = state(model)
    attribute(tmp_path / "out", model=model)
    assert model.training
    assert not model.head.training
    assert_nothing_left(model, before)


def test_code_names_are_kept(tmp_path) -> None:
    names = {"codes": {"c9": "Heart <b>failure</b>\n“病”"}}
    attribute(tmp_path / "out", code_names=names)
    assert json.loads((tmp_path / "out" / "code_names.json").read_text()) == names


def test_quiet_when_told(tmp_path, capfd) -> None:
    attribute(tmp_path / "one", progress=None)  # stderr is no terminal here
    assert capfd.readouterr() == ("", "")
    attribute(tmp_path / "two", progress=True)
    assert "90/90" in capfd.readouterr().err


def test_wrong_arguments_are_refused_before_any_work(tmp_path) -> None:
    out = tmp_path / "out"
    for settings, error, message in [
        ({"dataset": Records(0)}, ValueError, "at least one sample"),
        ({"dataset": iter([])}, TypeError, "len\\(\\)"),
        ({"model": torch.relu}, TypeError, "model must be a torch.nn.Module"),
        ({"workers": 0}, ValueError, "workers must be a whole number from 1 to 512, got 0"),
        ({"workers": 2, "client": object()}, ValueError, "not both"),
        ({"client": object()}, TypeError, "client must be a dask"),
        ({"method": "rolout"}, ValueError, "method must be one of"),
        ({"device": "gpu"}, ValueError, "device must be a torch device"),
        ({"readout": "last"}, ValueError, "readout must be one of model, forward, got 'last'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"collate": None}, TypeError, "needs collate="),
        ({"vocabularies": None}, TypeError, "needs vocabularies="),
        ({"batch_tokens": -1}, ValueError, "batch_tokens must be a whole number from 1 to"),
        ({"method": "chefer", "target_class": -1}, ValueError, "target_class must be a whole number from 0 to"),
        ({"method": "chefer", "target_class": np.int64(1)}, TypeError, "target_class must be a whole number from 0 to"),
        ({"backend": "triton"}, ValueError, "needs a CUDA device"),
    ]:
        with pytest.raises(error, match=message):
            attribute(out, **settings)
        assert not out.exists()


def test_contents_hold_no_padding_and_no_null_sample(whole) -> None:
    found = contents(whole[0])
    assert found["attributions"]["sample"].null_count() == 0
    assert "<pad>" not in found["attributions"]["code"].to_list()


def test_another_run_is_refused_by_what_differs(whole) -> None:
    out, _ = whole
    before = contents(out)
    spoiled = Records(90, {88: "nan"})
    other_heads = Attention(heads=4)
    for settings, message in [
        ({"model": Attention(seed=1)}, r"model\.fingerprint: .* there, .* now"),
        ({"model": other_heads}, r"model\.heads: 2 there, 4 now"),
        ({"method": "pyhealth"}, r'method\.name: "rollout" there, "pyhealth" now'),
        ({"count": 91}, r"dataset\.samples: 90 there, 91 now"),
        ({"dataset": spoiled}, r"dataset\.samples 88 hold other values"),
        ({"vocabularies": {**VOCABULARIES, "codes": {"c9": 1}}}, r"dataset\.fingerprint"),
        ({"batch_tokens": 121}, r"plan\.batch_tokens: 120 there, 121 now"),
        ({"resume": False}, "holds a run already"),
    ]:
        with pytest.raises(ValueError, match=message):
            attribute(out, **settings)
    assert {kind: frame.equals(before[kind], null_equal=True) for kind, frame in contents(out).items()} == {
        "attributions": True,
        "predictions": True,
    }


def test_a_sample_unreadable_at_first_is_the_same_dataset(tmp_path) -> None:
    attribute(tmp_path / "out", dataset=Records(90, {88: "unreadable"}))
    assert attribute(tmp_path / "out", retry_failures=True).failed == 0


def test_a_prediction_that_is_not_finite_is_a_failure(whole, tmp_path) -> None:
    def wrong(model, batch):
        explained = explain(model, batch)
        probability = explained.y_prob.clone()
        probability[batch["lengths"]["codes"] == 9] = float("inf")
        return dataclasses.replace(explained, y_prob=probability)

    attribute(tmp_path / "out", explain=wrong)
    failed = [number for number in range(90) if 1 + number * 7 % 23 == 9]
    assert rows(tmp_path / "out", "failures").rows() == [(number, "the prediction is not finite") for number in failed]
    healthy = pl.col("sample").is_in(failed).not_()
    assert rows(tmp_path / "out").equals(rows(whole[0]).filter(healthy), null_equal=True)


def test_a_nan_in_the_padding_is_no_failure(whole, tmp_path) -> None:
    def padded(model, batch):
        explained = explain(model, batch)
        relevance = {key: scores.clone() for key, scores in explained.relevance.items()}
        for key, scores in relevance.items():
            scores[torch.arange(scores.shape[1]) >= batch["lengths"][key][:, None]] = float("nan")
        return dataclasses.replace(explained, relevance=relevance)

    assert attribute(tmp_path / "out", explain=padded).failed == 0
    assert rows(tmp_path / "out").equals(rows(whole[0]), null_equal=True)
    shares = rows(tmp_path / "out", "predictions")["padding_share"].list.get(0)
    assert set(shares) == {None, 0.0}  # not known beside a NaN


def test_an_explain_without_relevance_stops_at_once(tmp_path) -> None:
    def nothing(model, batch):
        return Explained({})

    with pytest.raises(CohortError, match=r"explain must give relevance of \['codes', 'labs'\], got \[\]"):
        attribute(tmp_path / "out", explain=nothing, part_samples=40)


def test_a_lost_gpu_stops_the_run(whole, tmp_path) -> None:
    calls = []

    def lost(model, batch):
        calls.append(batch)
        if len(calls) == 11:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return explain(model, batch)

    with pytest.raises(CohortError, match=r"the GPU can no longer be used, after samples \d+ … of part \d"):
        attribute(tmp_path / "out", explain=lost)
    assert attribute(tmp_path / "out", explain=lost).failed == 0
    assert_same(tmp_path / "out", whole[0])


def test_what_the_collating_thread_raises_is_raised(tmp_path, monkeypatch) -> None:
    def broken(plan, lengths, groups):
        raise ZeroDivisionError("in the thread")

    monkeypatch.setattr(Plan, "batches", broken)
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        attribute(tmp_path / "out")
    assert not [thread for thread in threading.enumerate() if thread.name == "rollout-collate"]


def test_a_resumed_run_says_so_and_keeps_its_sessions(tmp_path) -> None:
    out, seen = tmp_path / "out", []

    def watching(model, batch):
        seen.append(json.loads((out / "manifest.json").read_text())["status"])
        return explain(model, batch)

    attribute(out, explain=watching, dataset=Records(90, {21: "unreadable"}))
    attribute(out, explain=watching, retry_failures=True)
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(seen) == {"running"}
    assert [session["samples"] for session in manifest["sessions"]] == [90, 20]
    assert manifest["status"] == "complete"


def test_an_error_with_any_text_is_written(tmp_path) -> None:
    def rude(model, batch):
        if int((batch["lengths"]["codes"] == 9).sum()):
            raise ValueError("no such patient \udc80 <b>'病'\n")
        return explain(model, batch)

    attribute(tmp_path / "out", explain=rude)
    assert set(rows(tmp_path / "out", "failures")["error"]) == {"ValueError: no such patient \\udc80 <b>'病'\n"}
