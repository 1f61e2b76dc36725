"""The statistics of an evaluation: by hand, against what each sample gives, against scipy, and what is refused."""

import math
from typing import Any

import numpy as np
import polars as pl
import pytest

import rollout
from rollout.intervals import bootstrap_mean, holm, sign_flip_test
from rollout.results.faithfulness import CohortFaithfulness
from rollout.results.measures import MEASURES, area_weights
from tests.support.evaluations import SCORES, drawn, written

HAND = [
    ("a", 0.8, {"good": ([0.6, 0.2], [0.3, 0.7]), "random": ([0.7, 0.6], [0.2, 0.4])}),
    ("b", 0.6, {"good": ([0.5, 0.1], [0.6, 0.6]), "random": ([0.6, 0.6], [0.1, 0.5])}),
    ("b", 0.9, {"good": ([0.3, 0.3], [0.5, 0.8]), "random": ([0.9, 0.5], [0.3, 0.3])}),
]


def of(frames: Any, **options: Any) -> CohortFaithfulness:
    return CohortFaithfulness(*frames, **{"draws": 200, **options})


def cell(table: pl.DataFrame, **keys: Any) -> dict[str, Any]:
    part = table.filter([pl.col(key) == value for key, value in keys.items()])
    assert part.height == 1, keys
    return part.row(0, named=True)


def test_measures_by_hand() -> None:
    found = of(written(HAND[:1])).summary()
    mean = {name: cell(found, method="good", measure=name)["mean"] for name in found["measure"].unique()}
    assert mean == pytest.approx(
        {
            "comprehensiveness": (0.2 + 0.6) / 2,
            "sufficiency": (0.5 + 0.1) / 2,
            "deletion": (10 * (0.8 + 0.6) / 2 + 40 * (0.6 + 0.2) / 2) / 50,
            "insertion": (40 * (0.3 + 0.7) / 2 + 50 * (0.7 + 0.8) / 2) / 90,
            "log_odds": (math.log(0.6 / 0.8) + math.log(0.2 / 0.8)) / 2,
        },
        abs=1e-6,
    )
    row = cell(found, method="good", measure="comprehensiveness")
    assert (row["low"], row["high"], row["samples"], row["patients"]) == (None, None, 1, 1)


def test_areas_weigh_by_the_trapezoid() -> None:
    assert area_weights([0.0, 10.0, 50.0]) == pytest.approx([0.1, 0.5, 0.4])
    assert area_weights([100.0]).tolist() == [1.0]
    whole = written([("a", 0.8, {"random": ([0.6, 0.8], [0.3, 0.8])})], shares=(50.0, 100.0))
    table = of(whole).summary()
    assert cell(table, measure="insertion")["mean"] == pytest.approx((0.3 + 0.8) / 2, abs=1e-6)
    curve = of(whole).curves().filter(pl.col("direction") == "only")
    assert curve["share"].to_list() == [50.0, 100.0]  # what was evaluated at 100 stands, and no second one


def test_curves_by_hand_with_the_whole_record_at_their_ends() -> None:
    found = of(written(HAND)).curves()
    without = found.filter((pl.col("method") == "good") & (pl.col("direction") == "without"))
    assert without["share"].to_list() == [0.0, 10.0, 50.0]
    assert without["probability"].to_list() == pytest.approx([2.3 / 3, 1.4 / 3, 0.6 / 3], abs=1e-6)
    assert without["drop"].to_list() == pytest.approx([0.0, 0.9 / 3, 1.7 / 3], abs=1e-6)
    only = found.filter((pl.col("method") == "good") & (pl.col("direction") == "only"))
    assert only["share"].to_list() == [10.0, 50.0, 100.0]
    assert only["probability"].to_list() == pytest.approx([1.4 / 3, 2.1 / 3, 2.3 / 3], abs=1e-6)
    assert found["samples"].unique().to_list() == [3]
    assert found["patients"].unique().to_list() == [2]
    inside = (pl.col("probability_low") <= pl.col("probability") + 1e-12) & (
        pl.col("probability") <= pl.col("probability_high") + 1e-12
    )
    assert found.select(inside.all()).item()


def test_what_the_sums_give_is_what_each_sample_gives() -> None:
    rows, predictions, scores = drawn({"good": 0.1, "random": 0.0})
    found = of((rows, predictions, scores))
    samples = rows.join(predictions.select("sample", "patient_id", whole="probability"), on="sample").collect()
    good = samples.filter((pl.col("method") == "good") & (pl.col("direction") == "without")).sort("sample", "share")
    each = good.group_by("sample", "patient_id", maintain_order=True).agg(
        pl.col("drop").cast(pl.Float64).mean(),
        (pl.col("probability") / pl.col("whole")).cast(pl.Float64).log().mean().alias("log"),
    )
    by_number = sorted(each["patient_id"].unique())
    order = sorted(range(each.height), key=lambda i: by_number.index(each["patient_id"][i]))
    table = found.summary()
    for name, column in (("comprehensiveness", "drop"), ("log_odds", "log")):
        values = each[column].to_numpy()[order]
        expected = bootstrap_mean(values, each["patient_id"].to_numpy()[order].tolist(), draws=200)
        row = cell(table, method="good", measure=name)
        got = (row["mean"], row["low"], row["high"])
        assert got == pytest.approx((expected.estimate, expected.low, expected.high), abs=1e-6)
        assert (row["samples"], row["patients"]) == (120, 40)


def test_parts_are_read_one_after_the_other() -> None:
    rows, predictions, scores = drawn({"good": 0.1, "random": 0.0}, samples=40, patients=9)
    parts = [rows.filter(pl.col("sample").is_between(first, first + 6)) for first in range(0, 49, 7)]  # one is empty
    whole, apart = of((rows, predictions, scores)), of((parts, predictions, scores))
    for by in (None, "label"):
        assert close(apart.curves(by), whole.curves(by))
        assert close(apart.differences(by=by), whole.differences(by=by))
    with pytest.raises(ValueError, match="got 33 of 40 of method 'good'"):
        of((parts[1:], predictions))
    with pytest.raises(ValueError, match="got none of them"):
        of(([], predictions))


def test_differences_are_paired_tested_and_corrected() -> None:
    rows, predictions, scores = drawn({"good": 0.08, "bad": -0.08, "same": 0.0, "random": 0.0})
    table = of((rows, predictions, scores)).differences()
    assert table.columns == ["measure", "method", "to", "difference", "low", "high", "p", "p_holm",
                                    "comparisons", "detectable", "verdict", "samples", "patients"]  # fmt: skip
    assert table["comparisons"].unique().to_list() == [7 * 3] == [table.height]
    assert table["p_holm"].to_list() == pytest.approx(holm(table["p"]))
    summary = of((rows, predictions, scores)).summary()
    for row in table.rows(named=True):
        if row["measure"] in ("comprehensiveness", "sufficiency", "deletion", "insertion", "log_odds"):
            mine, other = (cell(summary, method=m, measure=row["measure"])["mean"] for m in (row["method"], "random"))
            assert row["difference"] == pytest.approx(mine - other, abs=1e-9)
        assert row["low"] < row["difference"] < row["high"]
        if row["method"] != "same":
            assert row["verdict"] == {"good": "better", "bad": "worse"}[row["method"]], row
            expected = MEASURES[row["measure"]] * (1 if row["method"] == "good" else -1)
            assert math.copysign(1, row["difference"]) == expected
        else:
            assert row["verdict"] in ("no difference shown", "cohort too small to tell")
    each = rows.filter(pl.col("direction") == "only").join(predictions.select("sample", "patient_id"), on="sample")
    sign = pl.when(pl.col("method") == "same").then(0.5).when(pl.col("method") == "random").then(-0.5)
    totals = each.group_by("patient_id").agg((pl.col("drop") * sign).sum()).sort("patient_id").collect()["drop"]
    row = cell(table, method="same", measure="sufficiency")
    assert row["p"] == pytest.approx(sign_flip_test(totals.to_numpy()[:, None])[0], abs=0.02)


def test_every_pair_and_another_reference() -> None:
    found = of(drawn({"good": 0.08, "bad": -0.08, "random": 0.0}))
    pairs = found.differences(between="all", measures=["sufficiency"])
    assert pairs.select("method", "to").rows() == [("bad", "good"), ("bad", "random"), ("good", "random")]
    assert pairs["verdict"].to_list() == ["worse", "worse", "better"]
    turned = found.differences("good", measures=["sufficiency"])
    assert cell(turned, method="bad")["difference"] == pytest.approx(cell(pairs, to="good")["difference"])
    assert turned["comparisons"].to_list() == [2, 2]


def test_scores_are_paired_on_the_samples_that_have_both() -> None:
    rows, predictions = written(HAND)
    table = [(0, "good", 0.9), (1, "good", 0.5), (2, "good", None), (0, "random", 0.2), (1, "random", math.nan),
             (2, "random", 0.1)]  # fmt: skip
    scores = pl.LazyFrame([(*row, None, None) for row in table], schema=SCORES, orient="row")
    found = of((rows, predictions, scores))
    assert "planted_auc" not in found.measures
    row = cell(found.summary(), method="good", measure="recall")
    assert (row["mean"], row["samples"], row["patients"]) == (pytest.approx(0.7, abs=1e-6), 2, 2)
    row = cell(found.differences(), measure="recall")
    assert (row["difference"], row["samples"], row["patients"]) == (pytest.approx(0.7, abs=1e-6), 1, 1)
    assert (row["low"], row["detectable"], row["verdict"]) == (None, None, "cohort too small to tell")


def test_a_cohort_too_small_says_so() -> None:
    effects = {"same": 0.0, "random": 0.0}
    wide = of(drawn(effects, samples=30, patients=15, spread=0.15)).differences(measures=["comprehensiveness"])
    assert wide["verdict"].to_list() == ["cohort too small to tell"]
    assert wide["detectable"][0] > 0.05
    narrow = of(drawn(effects, samples=400, patients=200)).differences(measures=["comprehensiveness"])
    assert narrow["verdict"].to_list() == ["no difference shown"]
    strict = of(drawn(effects, samples=400, patients=200)).differences(
        measures=["comprehensiveness"], matters={"comprehensiveness": 0.001}
    )
    assert strict["verdict"].to_list() == ["cohort too small to tell"]
    # Of 4 patients, whatever they show, no sign-flip test has a p below 2/16.
    few = of(drawn({"good": 0.3, "random": 0.0}, samples=12, patients=4)).differences(measures=["comprehensiveness"])
    assert few["p"].to_list() == [2 / 16]
    assert few.select("detectable", "verdict").row(0) == (None, "cohort too small to tell")


def test_the_detectable_difference_is_found_four_times_in_five() -> None:
    """z(1 − α/2) + z(0.8) standard errors, by the formula; shown in simulated cohorts of just that effect."""
    found = of(drawn({"same": 0.0, "random": 0.0}, 100, 50), draws=2000)
    row = found.differences(measures=["sufficiency"]).row(0, named=True)
    error = (row["high"] - row["low"]) / (2 * 1.959964)
    assert row["detectable"] == pytest.approx((1.959964 + 0.841621) * error, rel=1e-6)
    both = found.differences(measures=["sufficiency", "comprehensiveness"]).row(0, named=True)
    assert both["detectable"] == pytest.approx((2.241403 + 0.841621) * error, rel=1e-6)  # z(1 − 0.05/4)
    rng, shown = np.random.default_rng(0), 0
    for trial in range(200):
        totals = rng.normal(2.801585 / math.sqrt(50), 1, (50, 1))
        shown += sign_flip_test(totals, flips=999, seed=trial)[0] <= 0.05
    assert 0.72 <= shown / 200 <= 0.87


def test_groups_are_the_samples_of_each() -> None:
    rows, predictions, scores = drawn({"good": 0.08, "random": 0.0}, samples=90, patients=30)
    found = of((rows, predictions, scores))
    known = predictions.collect()
    length = known["codes"].to_numpy()
    edges = np.quantile(length, [0.25, 0.5, 0.75], method="inverted_cdf")
    parts = {
        "predicted": {str(c): known["target"] == c for c in (0, 1)},
        "label": {str(c): known["y_true"].list.first() == c for c in (0, 1)},
        "length": {
            f"{length[low & high].min()}–{length[low & high].max()} codes": pl.Series(low & high)
            for low, high in zip(
                [length > 0, *(length > e for e in edges)], [*(length <= e for e in edges), length > 0], strict=True
            )
        },
    }
    for by, groups in parts.items():
        table, curves, differences = found.summary(by), found.curves(by), found.differences(by=by)
        assert table["group"].unique(maintain_order=True).to_list() == list(groups)
        assert differences["comparisons"].unique().to_list() == [len(groups) * 7]
        for name, mask in groups.items():
            mine = known.filter(mask)
            alone = of((rows.filter(pl.col("sample").is_in(mine["sample"].implode())), mine.lazy(), scores))
            part = table.filter(pl.col("group") == name).drop("group")
            assert close(part, alone.summary())
            assert close(curves.filter(pl.col("group") == name).drop("group"), alone.curves())
            own = differences.filter(pl.col("group") == name)
            assert own["difference"].to_list() == pytest.approx(alone.differences()["difference"].to_list())


def close(one: pl.DataFrame, other: pl.DataFrame) -> bool:
    from polars.testing import assert_frame_equal

    assert_frame_equal(one, other, abs_tol=1e-9)
    return True


def test_records_of_one_length_are_one_group_and_labels_may_lack() -> None:
    found = of(written(HAND, y_true=[[1.0], None, [math.nan]]))
    assert found.summary("length")["group"].unique().to_list() == ["20 codes"]
    assert (
        found.summary("label").filter(pl.col("measure") == "deletion").select("group", "samples").rows()
        == [("1", 1)] * 2
    )
    with pytest.raises(ValueError, match="by='label' needs labels, but the samples have no labels"):
        of(written(HAND, y_true=[None] * 3)).summary("label")
    with pytest.raises(ValueError, match="measured values, not classes"):
        of(written(HAND, y_true=[[0.5]] * 3)).curves("label")
    with pytest.raises(ValueError, match="needs the class that was followed"):
        of(written(HAND, target=[1, None, 0])).curves("predicted")
    with pytest.raises(ValueError, match="by='length' needs the codes of each record"):
        of(written(HAND, codes=[1, None, 2])).curves("length")


def test_a_multilabel_sample_counts_for_each_of_its_labels() -> None:
    found = of(written(HAND, y_true=[[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]))
    counted = found.summary("label").filter((pl.col("measure") == "recall") | (pl.col("measure") == "deletion"))
    assert counted.filter(pl.col("method") == "good").select("group", "samples").rows() == [("0", 1), ("1", 2)]


def test_ignored_samples_count_nowhere_and_turned_ones_turned() -> None:
    rows, predictions = written(HAND, evaluated=[True, False, True])
    found = of((rows, predictions))
    assert (found.samples, found.patients) == (2, 2)
    expected = of(written([HAND[0], HAND[2]])).summary()
    assert close(found.summary(), expected)
    # PyHealth's negative class: what is written is the positive one's probability, and the drop's sign is turned.
    turned = rows.with_columns(pl.when(pl.col("sample") == 0).then(-pl.col("drop")).otherwise("drop").alias("drop"))
    table = of((turned, predictions.filter(pl.col("sample") == 0))).summary()
    assert cell(table, method="good", measure="comprehensiveness")["mean"] == pytest.approx(-0.4, abs=1e-6)
    deletion = (10 * (0.2 + 0.4) / 2 + 40 * (0.4 + 0.8) / 2) / 50
    assert cell(table, method="good", measure="deletion")["mean"] == pytest.approx(deletion, abs=1e-6)
    log_odds = (math.log(0.4 / 0.2) + math.log(0.8 / 0.2)) / 2
    assert cell(table, method="good", measure="log_odds")["mean"] == pytest.approx(log_odds, abs=1e-6)


def test_a_sample_without_a_patient_is_one_of_its_own() -> None:
    rows, predictions = written([(None, *sample[1:]) for sample in HAND])
    assert of((rows, predictions)).patients == 3


def test_certain_predictions_have_finite_log_odds_and_measured_values_none() -> None:
    certain = of(written([("a", 1.0, {"random": ([0.0, 1.0], [0.0, 1.0])})])).summary()
    assert cell(certain, measure="log_odds")["mean"] == pytest.approx(math.log(1e-6) / 2)
    measured = of(written([("a", 7.0, {"random": ([5.0, 4.0], [1.0, 6.5])})]))
    assert "log_odds" not in measured.measures
    assert cell(measured.summary(), measure="comprehensiveness")["mean"] == pytest.approx(2.5)


def test_methods_stand_in_the_order_of_the_manifest_random_last() -> None:
    frames = drawn({"random": 0.0, "b": 0.1, "a": 0.0, "c": 0.0}, samples=12, patients=6)
    manifest = {"identity": {"methods": {"random": "x", "c": "x", "a": "x"}}}
    assert of(frames, manifest=manifest).methods == ["c", "a", "b", "random"]
    assert of(frames).methods == ["a", "b", "c", "random"]


def test_an_empty_cohort_gives_empty_tables() -> None:
    rows, predictions = written(HAND, evaluated=[False] * 3)
    for frames in ((rows, predictions), written([])):
        found = of(frames)
        assert (found.samples, found.patients, found.methods, found.measures) == (0, 0, [], [])
        for by in (None, "predicted", "label", "length"):
            for table in (found.curves(by), found.summary(by), found.differences(by=by)):
                assert table.is_empty()
                assert ("group" in table.columns) is (by is not None)
    assert found.differences().columns == of(written(HAND)).differences().columns


def test_one_patient_has_numbers_but_no_intervals() -> None:
    found = of(written([("a", *sample[1:]) for sample in HAND]))
    for table in (found.curves(), found.summary()):
        assert table.select(pl.selectors.ends_with("low", "high").is_null().all()).row(0).count(False) == 0
        assert not table.select(pl.selectors.float().is_nan().any()).row(0).count(True)
    row = cell(found.differences(), measure="comprehensiveness")
    assert row["difference"] == pytest.approx((0.4 - 0.15 + 0.3 - 0.0 + 0.6 - 0.2) / 3, abs=1e-6)
    assert (row["p"], row["verdict"]) == (1.0, "cohort too small to tell")


def change(column: str, value: Any, where: pl.Expr) -> Any:
    return lambda rows: rows.with_columns(pl.when(where).then(pl.lit(value)).otherwise(column).alias(column))


FIRST = (
    (pl.col("sample") == 1) & (pl.col("method") == "good") & (pl.col("share") == 10) & (pl.col("direction") == "only")
)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda rows: rows.drop("drop"), r"rows must have the columns .* got none called \['drop'\]"),
        (change("drop", math.nan, FIRST), "probability and drop must be finite.* of sample 1, method 'good'"),
        (change("probability", math.inf, FIRST), "probability and drop must be finite.* of sample 1, method 'good'"),
        (change("probability", None, FIRST), "probability and drop must be finite.* of sample 1, method 'good'"),
        (change("share", 0.0, FIRST), r"share must lie in \(0, 100\]"),
        (change("share", None, FIRST), "must name method, direction and share"),
        (change("share", math.nan, FIRST), r"share must lie in \(0, 100\]"),
        (change("share", 101.0, FIRST), r"share must lie in \(0, 100\]"),
        (change("direction", "beside", FIRST), r"direction must be one of .* got \['beside'\]"),
        (change("method", None, FIRST), "must name method, direction and share"),
        (lambda rows: rows.filter(~FIRST), "got 2 of 3 of method 'good', only 10 %"),
        (lambda rows: rows.filter(pl.col("method") != "good", pl.col("sample") > 9), "got none of them"),
        (
            lambda rows: rows.filter((pl.col("method") != "good") | (pl.col("sample") != 2)),
            "got 2 of 3 of method 'good', without 10 %",
        ),
        (lambda rows: pl.concat([rows, rows.filter(FIRST)]), "got 4 of 3 of method 'good'"),
        (change("sample", 0, FIRST), "must have 8 rows per evaluated sample, got 9 of sample 0"),
    ],
)
def test_damaged_rows_are_refused(damage: Any, match: str) -> None:
    rows, predictions = written(HAND)
    with pytest.raises(ValueError, match=match):
        CohortFaithfulness(damage(rows), predictions)


def test_other_input_is_refused() -> None:
    rows, predictions = written(HAND)
    scores = pl.LazyFrame([(0, "good", 0.5, 0.5, 0.5)], schema=SCORES, orient="row")
    found = of((rows, predictions))
    for call, match in (
        (lambda: of((rows, predictions.drop("codes"))), r"predictions must have the columns .*\['codes'\]"),
        (lambda: of((rows, pl.concat([predictions] * 2))), "predictions must have one row per sample"),
        (lambda: of((rows, written(HAND, probability=[0.5, math.nan, 0.5])[1])), "finite, got another of sample 1"),
        (lambda: of((rows, predictions, scores.drop("recall"))), r"scores must have the columns .*\['recall'\]"),
        (lambda: of((rows, predictions, pl.concat([scores] * 2))), "scores must have one row per sample and method"),
        (lambda: of((rows, predictions, scores.with_columns(recall=math.inf))), "scores must be finite or null"),
        (lambda: of((rows, predictions, scores.with_columns(method=pl.lit("x")))), r"of the methods .* got \['x'\]"),
        (lambda: found.summary("age"), "by must be None or one of .* got 'age'"),
        (lambda: found.differences("none"), r"to must be one of the methods \['good', 'random'\], got 'none'"),
        (lambda: found.differences(between="some"), "between must be None or 'all', got 'some'"),
        (lambda: found.differences(measures=["recall"]), r"measures must be among .* got \['recall'\]"),
        (lambda: found.differences(matters={"lift": 1.0}), r"matters must be among .* got \['lift'\]"),
        (lambda: of((rows, predictions), flips=50).differences(), "flips must be at least (99|100) for 5 comparisons"),
        (lambda: of((rows, predictions), level=95).summary(), "level must lie between 0 and 1, got 95"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_the_names_of_the_package() -> None:
    assert rollout.CohortFaithfulness is CohortFaithfulness
    assert rollout.open_faithfulness.__module__ == "rollout.results.faithfulness"
