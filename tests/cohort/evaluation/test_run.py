"""An evaluated cohort: the numbers of each record alone, PyHealth's where they are asked for, whole after any stop."""

import contextlib
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from pyhealth.metrics.interpretability import evaluate_attribution
from pyhealth.metrics.interpretability.utils import threshold_sample_filter

import rollout
from rollout.cohort import CohortError
from rollout.data.collate import pyhealth_collate
from rollout.evaluate import faithfulness
from rollout.evaluate.stack import class_probabilities
from rollout.pyhealth import AttentionRollout, CheferRelevance, FrozenGradient
from tests.support.capture_state import assert_nothing_left, state
from tests.support.evaluated import assert_same_evaluation, evaluate_toy, mean_drop, table, toy_scores
from tests.support.pyhealth_models import dataset, stage_net, transformer
from tests.support.toy_cohort import Attention, Records, attribute

SMALL: dict[str, Any] = {"part_samples": 4, "batch_tokens": 60, "progress": False}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken evaluation of 90 samples."""
    out = tmp_path_factory.mktemp("cohort") / "whole"
    run = evaluate_toy(out, leave_one_out=12)
    assert (run.samples, run.attributed, run.failed, run.rows) == (90, 90, 0, 90 * 2 * 2 * 5)
    return out


# The numbers.


def alone(model: Any, sample: Any, scores: Any, **options: Any) -> Any:
    batch = pyhealth_collate([sample])
    return faithfulness(model, batch, {key: each.detach() for key, each in scores(**batch).items()}, **options)


@pytest.mark.parametrize(("kind", "make"), [("flat", transformer), ("nested", transformer), ("stagenet", stage_net)])
def test_each_record_as_it_is_alone(kind: str, make: Any, tmp_path: Path) -> None:
    """Against `rollout.evaluate.faithfulness`, one sample at a time."""
    model, samples = make(kind).eval(), dataset(kind)
    before = state(model)
    removal = "delete" if kind == "flat" else "pad"
    settings = SMALL | ({} if kind == "flat" else {"batch_samples": 1})  # there the model's numbers depend on padding
    rollout.evaluate_cohort(model, samples, tmp_path / "out", methods=["rollout"], shares=(10, 40), **settings)
    assert_nothing_left(model, before)
    found = table(tmp_path / "out").filter(pl.col("method") == "rollout")
    predictions = table(tmp_path / "out", "predictions")
    for number in range(len(samples)):
        rollout_scores = AttentionRollout(model, method="rollout").attribute
        wanted = alone(model, samples[number], rollout_scores, percentages=(10, 40), removal=removal)
        mine = found.filter(pl.col("sample") == number)
        assert mine.select("direction", "share").rows() == [
            ("without", 10.0), ("without", 40.0), ("only", 10.0), ("only", 40.0)
        ]  # fmt: skip
        drops = torch.cat([wanted.drop_without[0], wanted.drop_with_only[0]])
        np.testing.assert_allclose(mine["drop"], drops, atol=2e-6)
        np.testing.assert_allclose(mine["probability"], wanted.probability[0] - drops, atol=2e-6)
        row = predictions.row(number, named=True)
        assert row["target"] == int(wanted.target[0])
        assert row["probability"] == pytest.approx(float(wanted.probability[0]), abs=1e-6)
        assert (row["patient_id"], row["y_true"], row["evaluated"]) == (f"p{number}", [float(number % 2)], True)


def test_signed_scores_speak_for_the_class_followed(tmp_path: Path) -> None:
    model, samples = transformer("flat").eval(), dataset("flat")
    rollout.evaluate_cohort(model, samples, tmp_path / "out", methods=["frozen_gradient"], shares=(20,), **SMALL)
    found = table(tmp_path / "out").filter(pl.col("method") == "frozen_gradient")
    targets = table(tmp_path / "out", "predictions")["target"]
    assert targets.n_unique() == 1  # this model's: turn it for the other class
    sign = 1.0 if targets[0] == 1 else -1.0

    def turned(**batch: Any) -> dict[str, torch.Tensor]:
        return {key: sign * each for key, each in FrozenGradient(model).attribute(**batch).items()}

    for number in range(len(samples)):
        wanted = alone(model, samples[number], turned, percentages=(20,))
        mine = found.filter(pl.col("sample") == number)["drop"]
        np.testing.assert_allclose(mine, [wanted.drop_without[0, 0], wanted.drop_with_only[0, 0]], atol=2e-6)


@pytest.mark.parametrize(("kind", "make"), [("flat", transformer), ("stagenet_tensor", stage_net)])
def test_pyhealths_metric_is_pyhealths(kind: str, make: Any, tmp_path: Path) -> None:
    """Batch by batch as the run made them: padding is counted, so they belong to the number."""
    model, samples = make(kind).eval(), dataset(kind)
    out = tmp_path / "out"
    given = {"rollout": AttentionRollout(model), "chefer": CheferRelevance(model)}
    options = {"batch_samples": 2, "batch_tokens": 4096, "progress": False, "threshold": 0.05}
    rollout.evaluate_cohort(model, samples, out, methods=given, metric="pyhealth", **options)
    predictions = table(out, "predictions")
    batches = [group["sample"].to_list() for _, group in predictions.group_by("batch", maintain_order=True)]
    assert sorted(map(len, batches)) == [2, 2, 2]
    longest = json.loads((out / "manifest.json").read_text())
    assert longest["identity"]["evaluation"]["metric"] == "pyhealth"
    order = table(out, "predictions").sort("batch", maintain_order=True)["sample"].to_list()
    loader = [pyhealth_collate([samples[number] for number in order[start : start + 2]]) for start in range(0, 6, 2)]
    for name, interpreter in given.items():
        with contextlib.redirect_stdout(io.StringIO()):
            wanted = evaluate_attribution(model, loader, interpreter, sample_filter=threshold_sample_filter(0.05))
        assert mean_drop(out, name, "without") == pytest.approx(wanted["comprehensiveness"], abs=1e-6)
        assert mean_drop(out, name, "only") == pytest.approx(wanted["sufficiency"], abs=1e-6)


class Padded:
    """The toy cohort's codes as ids whose padding is 3: code k is k + 4."""

    def __init__(self, count: int) -> None:
        self.records = Records(count)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> dict[str, Any]:
        sample = self.records[number]
        return {key: sample[key] for key in ("patient_id", "label")} | {"codes": sample["codes"] + 3}


def padded_collate(samples: Any) -> dict[str, Any]:
    ids = torch.nn.utils.rnn.pad_sequence([sample["codes"] for sample in samples], batch_first=True, padding_value=3)
    return {"codes": ids, "label": torch.stack([sample["label"] for sample in samples])}


def counts_codes(model: Any, batch: Any) -> torch.Tensor:
    """The share of codes above 20; padding 3 is none, and no other padding is known."""
    real = batch["codes"] != 3
    assert bool((batch["codes"] >= 3).all())
    return ((batch["codes"] > 20) & real).sum(1) / real.sum(1).clamp(min=1)


@pytest.mark.parametrize("replacement", ["delete", "pad"])
def test_padding_is_the_datasets_own(replacement: str, tmp_path: Path) -> None:
    vocabulary = {"codes": {"<pad>": 3} | {f"c{k}": k + 4 for k in range(40)} | {f"s{k}": k for k in range(3)}}

    def highest(model: Any, batch: Any) -> Any:
        return {"codes": batch["codes"].float()}

    settings: dict[str, Any] = {
        "methods": {"highest": highest}, "predict": counts_codes, "collate": padded_collate,
        "vocabularies": vocabulary, "replacement": replacement, "shares": (50,), "batch_tokens": 120, "progress": False,
    }  # fmt: skip
    rollout.evaluate_cohort(Attention(), Padded(30), tmp_path / "out", **settings)
    found = table(tmp_path / "out").filter((pl.col("method") == "highest") & (pl.col("direction") == "only"))
    for number, drop in found.select("sample", "drop").rows():
        ids = Padded(30)[number]["codes"]
        top = ids.sort(descending=True).values[: -(-len(ids) // 2)]
        shares = [float((each > 20).sum()) / len(each) for each in (ids, top)]
        sign = 1.0 if shares[0] >= 0.5 else -1.0
        assert drop == pytest.approx(sign * (shares[0] - shares[1]), abs=1e-6)
    with pytest.raises(ValueError, match="every id of 'codes' is a code"):
        rollout.evaluate_cohort(Attention(), Padded(30), tmp_path / "none", **settings, padding_ids={"codes": None})


def test_samples_below_the_threshold_have_no_rows(tmp_path: Path) -> None:
    model, samples = transformer("flat").eval(), dataset("flat")
    probability = torch.cat([model(**pyhealth_collate([samples[n]]))["y_prob"][:, 0] for n in range(6)]).detach()
    middle = float(probability.median())
    out = tmp_path / "out"
    rollout.evaluate_cohort(model, samples, out, methods="rollout", metric="pyhealth", threshold=middle + 1e-4, **SMALL)
    evaluated = table(out, "predictions").filter("evaluated")["sample"].to_list()
    assert evaluated == (probability > middle + 1e-4).nonzero()[:, 0].tolist()
    assert table(out)["sample"].unique().sort().to_list() == evaluated
    assert len(table(out, "scores")) == 12


def test_the_random_ranking_is_a_samples_own(whole: Path, tmp_path: Path) -> None:
    evaluate_toy(tmp_path / "out", part_samples=90, batch_tokens=4000)
    one, other = (table(out).filter(pl.col("method") == "random") for out in (whole, tmp_path / "out"))
    np.testing.assert_allclose(one["drop"], other["drop"], atol=2e-6)
    evaluate_toy(tmp_path / "seed", seed=1)
    assert not np.allclose(
        table(tmp_path / "seed").filter(pl.col("method") == "random")["drop"], one["drop"], atol=1e-3
    )


def test_what_is_resampled_is_the_same_for_every_method(tmp_path: Path) -> None:
    """And drawn from the cohort: removing all of a record's codes by one method or another gives one number."""
    model, samples = transformer("flat").eval(), dataset("flat")
    options = {"methods": ["rollout", "chefer"], "shares": (50, 100), "replacement": "resample", **SMALL}
    rollout.evaluate_cohort(model, samples, tmp_path / "one", **options)
    rollout.evaluate_cohort(model, samples, tmp_path / "other", **options, batch_samples=1)
    found, other = table(tmp_path / "one"), table(tmp_path / "other")
    np.testing.assert_allclose(found["drop"], other["drop"], atol=2e-6)
    only = found.filter((pl.col("share") == 100) & (pl.col("direction") == "only"))
    np.testing.assert_allclose(only["drop"], 0.0, atol=1e-6)
    seen = set(found.filter(pl.col("share") == 50)["drop"].round(6))
    assert len(seen) > 6


def test_planted_codes_are_found_by_what_raises_the_risk(tmp_path: Path) -> None:
    """Whichever class is followed: a signed method's scores for class 1 are what ranks them."""
    from rollout.cohort.evaluation.truth import recovered

    model, samples = transformer("flat").eval(), dataset("flat")
    planted = {"conditions": ["c1", "c4"], "drugs": ["m2"]}
    options = {"methods": ["frozen_gradient", "rollout"], "planted": planted, **SMALL}
    rollout.evaluate_cohort(model, samples, tmp_path / "out", **options)
    found = table(tmp_path / "out", "scores")
    vocabularies = {key: processor.code_vocab for key, processor in samples.input_processors.items()}
    for name, interpreter in (
        ("frozen_gradient", FrozenGradient(model)),
        ("rollout", AttentionRollout(model, method="rollout")),
    ):
        for number in range(len(samples)):
            batch = pyhealth_collate([samples[number]])
            scores = {key: each.detach() for key, each in interpreter.attribute(**batch).items()}
            marks = {key: torch.isin(batch[key], torch.tensor([vocabularies[key][code] for code in codes]))
                     for key, codes in planted.items()}  # fmt: skip
            recall, area = recovered(scores, {key: batch[key] != 0 for key in scores}, marks)
            row = found.filter((pl.col("sample") == number) & (pl.col("method") == name)).row(0, named=True)
            assert (row["recall"] is None) == bool(np.isnan(recall[0]))
            if row["recall"] is not None:
                assert row["recall"] == pytest.approx(recall[0])
                assert row["planted_auc"] == pytest.approx(area[0])


# The folder.


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(whole: Path, tmp_path: Path) -> None:
    out, stop = tmp_path / "out", KeyboardInterrupt
    calls: list[int] = []

    class Stopping(Records):
        def __getitem__(self, number: int) -> dict[str, Any]:
            calls.append(number)
            if len(calls) > 64 + 55 and number >= 40:
                raise stop
            return super().__getitem__(number)

    Stopping.__name__ = Records.__name__
    with pytest.raises(KeyboardInterrupt):
        evaluate_toy(out, dataset=Stopping(90), leave_one_out=12)
    assert 0 < len(list((out / "parts").glob("*.json"))) < 5
    run = evaluate_toy(out, leave_one_out=12)
    assert 0 < run.done < 90
    assert_same_evaluation(out, whole)
    again = evaluate_toy(out, leave_one_out=12)
    assert again.done == 0
    assert "90 samples, all done before: 90 evaluated, 1,800 rows" in str(again)


def test_workers_give_the_same_rows(whole: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    evaluate_toy(tmp_path / "one", leave_one_out=12)
    evaluate_toy(tmp_path / "out", workers=2, leave_one_out=12)
    assert_same_evaluation(tmp_path / "out", tmp_path / "one")


def test_a_method_that_fails_on_one_sample_fails_that_sample(whole: Path, tmp_path: Path) -> None:
    def fails(model: Any, batch: Any) -> Any:
        if bool((batch["codes"][:, 0] == int(Records(90)[7]["codes"][0])).any()) and 7 in batch["numbers"]:
            raise RuntimeError("no")
        return toy_scores(model, batch)

    def numbered(samples: Any) -> Any:
        from tests.support.toy_cohort import collate

        return collate(samples) | {"numbers": [sample["number"] for sample in samples]}

    class Numbered(Records):
        def __getitem__(self, number: int) -> dict[str, Any]:
            return super().__getitem__(number) | {"number": number}

    run = evaluate_toy(
        tmp_path / "out", dataset=Numbered(90), collate=numbered, methods={"mine": fails, "rollout": toy_scores}
    )
    assert (run.attributed, run.failed) == (89, 1)
    assert table(tmp_path / "out", "failures").rows() == [(7, "RuntimeError: method 'mine': no")]
    found = table(tmp_path / "out").filter(pl.col("method") == "rollout")
    assert 7 not in found["sample"].to_list()
    wanted = table(whole).filter((pl.col("method") == "rollout") & (pl.col("sample") != 7))
    np.testing.assert_allclose(found["drop"], wanted["drop"], atol=2e-6)


def test_scores_that_are_not_finite_fail_their_sample(tmp_path: Path) -> None:
    def odd(model: Any, batch: Any) -> Any:
        scores = toy_scores(model, batch)["codes"].clone()
        scores[batch["codes"][:, 0] == 5] = torch.nan
        return {"codes": scores}

    run = evaluate_toy(tmp_path / "out", methods={"odd": odd})
    lacking = [number for number in range(90) if int(Records(90)[number]["codes"][0]) == 5]
    assert run.failed == len(lacking) > 0
    failures = table(tmp_path / "out", "failures")
    assert failures["sample"].to_list() == lacking
    assert set(failures["error"]) == {"method 'odd': a score of 'codes' is not finite"}


def test_another_evaluation_is_refused_by_name(whole: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluate_cohort: out holds another run .*evaluation\.seed: 0 there, 3 now"):
        evaluate_toy(whole, seed=3, leave_one_out=12)
    with pytest.raises(ValueError, match=r"What differs: methods\.other"):
        evaluate_toy(whole, methods={"rollout": toy_scores, "other": partial(toy_scores)}, leave_one_out=12)
    with pytest.raises(ValueError, match=r"out holds what rollout\.evaluate_cohort wrote"):
        attribute(whole)


def test_stored_attributions_are_a_method(tmp_path: Path) -> None:
    model, samples = transformer("flat").eval(), dataset("flat")
    rollout.attribute_cohort(model, samples, tmp_path / "rows", method="chefer", **SMALL)
    methods = {"stored": tmp_path / "rows", "chefer": "chefer"}
    rollout.evaluate_cohort(model, samples, tmp_path / "out", methods=methods, **SMALL)
    found = table(tmp_path / "out")
    one, other = (found.filter(pl.col("method") == name)["drop"] for name in methods)
    np.testing.assert_allclose(one, other, atol=1e-6)
    shorter = dataset("nested")
    with pytest.raises(ValueError, match="holds attributions of another dataset: its features differ"):
        rollout.evaluate_cohort(transformer("nested"), shorter, tmp_path / "other", methods=methods, **SMALL)
    with pytest.raises(ValueError, match=r"must hold attributions, got what rollout\.evaluate_cohort wrote"):
        rollout.evaluate_cohort(model, samples, tmp_path / "other", methods={"x": tmp_path / "out"}, **SMALL)


def test_a_stored_sample_that_failed_fails_here_too(tmp_path: Path) -> None:
    attribute(tmp_path / "rows", dataset=Records(90, {4: "nan"}))
    run = evaluate_toy(tmp_path / "out", dataset=Records(90, {4: "nan"}), methods={"stored": tmp_path / "rows"})
    assert run.failed == 1
    assert "sample 4 has no attributions in" in table(tmp_path / "out", "failures")["error"][0]


# What is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"shares": (0, 5)},
            r"evaluate_cohort: shares must be one or more numbers in \(0, 100\], in percent, got \[0, 5\]",
        ),
        ({"shares": (101,)}, "shares must be one or more numbers"),
        ({"shares": (20, 10)}, "shares must be in order and each once"),
        ({"shares": ()}, "shares must be one or more"),
        ({"metric": "eraze"}, r"metric must be one of eraser, pyhealth, got 'eraze'"),
        ({"replacement": "blank"}, "replacement must be one of delete, pad, resample, got 'blank'"),
        ({"metric": "pyhealth", "replacement": "delete"}, "replacement must be 'pad' or left out"),
        ({"replacement": "resample"}, "'labs' has no ids of codes; use 'pad'"),
        ({"threshold": 2}, "threshold must be a number from 0 to 1, got 2"),
        ({"seed": -1}, "evaluate_cohort: seed must be a whole number from 0"),
        ({"leave_one_out": 10**6}, "evaluate_cohort: leave_one_out must be a whole number from 0 to 4,096"),
        ({"planted": {"drug": ["c9"]}}, r"planted names the feature 'drug'; the dataset has \['codes', 'labs'\]"),
        ({"planted": {"codes": ["zz"]}}, "none of the planted codes of 'codes' is in its vocabulary"),
        ({"methods": []}, "methods must name at least one method"),
        ({"methods": ["rollout", "rollout"]}, "methods must each be named once"),
        ({"methods": {"random": toy_scores}}, "must not name one of theirs 'random'"),
        ({"methods": ["rolout"]}, r"'rolout' is neither a method, .*, nor a folder of attributions.*rollout"),
        ({"methods": ["rollout"]}, "method 'rollout' cannot explain this model"),
        ({"workers": 0}, "evaluate_cohort: workers must be a whole number from 1"),
        ({"batch_tokens": 0}, "evaluate_cohort: batch_tokens must be"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate_toy(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [[1, 2], 7, {"x": 7}])
def test_methods_that_are_none(given: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"evaluate_cohort: method"):
        evaluate_toy(tmp_path / "out", methods=given)


def test_a_model_of_numbers_is_refused(tmp_path: Path) -> None:
    from pyhealth.datasets import create_sample_dataset
    from pyhealth.models import Transformer

    samples = create_sample_dataset(
        [{"patient_id": f"p{i}", "visit_id": f"v{i}", "codes": ["a", "b"], "days": float(i)} for i in range(4)],
        {"codes": "sequence"}, {"days": "regression"}, dataset_name="days",
    )  # fmt: skip
    with pytest.raises(ValueError, match="the model predicts a number"):
        rollout.evaluate_cohort(Transformer(samples), samples, tmp_path / "out", progress=False)


def test_what_is_no_probability_fails(tmp_path: Path) -> None:
    with pytest.raises(
        CohortError, match=r"none of the first .* samples could be evaluated; .* must give probabilities"
    ):
        evaluate_toy(
            tmp_path / "out", predict=lambda model, batch: torch.full((len(batch["codes"]),), 7.0), part_samples=40
        )


def test_a_multilabel_model_follows_its_likeliest_label(tmp_path: Path) -> None:
    from pyhealth.datasets import create_sample_dataset
    from pyhealth.models import Transformer

    samples = create_sample_dataset(
        [{"patient_id": f"p{i}", "visit_id": f"v{i}", "codes": [f"c{j}" for j in range(2 + i)],
          "drugs": ["z", *["x", "y"][: 1 + i % 2]]} for i in range(5)],
        {"codes": "sequence"}, {"drugs": "multilabel"}, dataset_name="labels",
    )  # fmt: skip
    torch.manual_seed(1)
    model = Transformer(samples, embedding_dim=16, heads=2).eval()
    rollout.evaluate_cohort(model, samples, tmp_path / "out", shares=(50,), **SMALL)
    predictions = table(tmp_path / "out", "predictions")
    for number, row in enumerate(predictions.iter_rows(named=True)):
        with torch.inference_mode():
            probability = class_probabilities(model(**pyhealth_collate([samples[number]])))[0]
        assert row["target"] == int(probability.argmax())
        np.testing.assert_allclose(row["y_prob"], probability, atol=1e-6)
