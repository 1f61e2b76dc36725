"""The ranking of codes: hand-made records, and cohorts whose attention logits are known."""

import numpy as np
import polars as pl
import pytest

from rollout.results.ranking import planted_found, rank_codes


def records(entries: list[tuple[int, int, str, float]], feature: str = "drugs") -> pl.DataFrame:
    """Rows from (sample, position, code, attribution)."""
    schema = ["sample", "position", "code", "attribution"]
    return pl.DataFrame(entries, schema=schema, orient="row").with_columns(
        feature=pl.lit(feature), visit=pl.lit(None, dtype=pl.Int32)
    )


def softmax_cohort(logits: dict[str, float], records_of: list[list[str]], feature: str = "drugs") -> pl.DataFrame:
    """Rollout rows of a one-layer model: ½ at position 0 plus ½ softmax of the codes' logits."""
    rows = []
    for sample, codes in enumerate(records_of):
        weight = np.exp([logits[code] for code in codes])
        relevance = 0.5 * weight / weight.sum()
        relevance[0] += 0.5
        rows += [(sample, place, code, float(relevance[place])) for place, code in enumerate(codes)]
    return records(rows, feature)


def test_lift_of_a_hand_made_record() -> None:
    rows = records([(s, p, c, r) for s in range(5) for p, c, r in ((0, "a", 0.7), (1, "b", 0.2), (2, "c", 0.1))])
    ranking = rank_codes(rows)
    assert ranking["code"].to_list() == ["b", "c"]
    assert ranking["lift"].to_list() == pytest.approx([4 / 3, 2 / 3])
    assert ranking["effect"].to_list() == pytest.approx([np.log(2) / 2, -np.log(2) / 2])
    assert ranking["error"].to_list() == pytest.approx([0.0, 0.0], abs=1e-9)
    assert ranking["records"].to_list() == [5, 5]


def test_a_record_without_relevance_says_nothing() -> None:
    entries = [(s, p, c, r) for s in range(5) for p, c, r in ((0, "a", 0.7), (1, "b", 0.2), (2, "c", 0.1))]
    silent = [(s, p, c, 0.0) for s in (5, 6) for p, c in ((0, "a"), (1, "b"), (2, "c"))]
    ranking = rank_codes(records(entries + silent))
    assert ranking["code"].to_list() == ["b", "c"]
    assert ranking["lift"].to_list() == pytest.approx([5 / 7 * 4 / 3, 5 / 7 * 2 / 3])
    assert ranking["effect"].to_list() == pytest.approx([5 / 7 * np.log(2) / 2, -5 / 7 * np.log(2) / 2])


def test_effects_are_the_attention_logits_whatever_the_company() -> None:
    rng = np.random.default_rng(0)
    codes = [f"c{k}" for k in range(12)]
    logits = dict(zip(codes, rng.normal(0, 2, len(codes)), strict=True))
    drawn = [list(rng.choice(codes, rng.integers(3, 9), replace=False)) for _ in range(400)]
    ranking = rank_codes(softmax_cohort(logits, drawn))
    effect = dict(zip(ranking["code"], ranking["effect"], strict=True))
    for code in codes[1:]:
        assert effect[code] - effect[codes[0]] == pytest.approx(logits[code] - logits[codes[0]], abs=1e-4)
    assert ranking["code"].to_list() == sorted(codes, key=lambda code: -logits[code])


def test_a_code_that_only_meets_dull_codes_does_not_lead() -> None:
    """`sink` takes all relevance of its records, but less than `risk` would there: mean lift ranks it first."""
    logits = {"risk": 5.0, "rival": 4.9, "sink": 4.0, "x": 0.0, "y": 0.0, "z": 0.0}
    drawn = [["x", "sink", "y", "z", "x"]] * 60 + [["x", "risk", "rival", "y", "z"]] * 40
    drawn += [["x", "risk", "sink", "y", "z"]] * 5
    ranking = rank_codes(softmax_cohort(logits, drawn))
    assert ranking["code"].to_list()[:3] == ["risk", "rival", "sink"]
    assert ranking.sort("lift", descending=True)["code"][0] == "sink"


def test_record_length_does_not_matter() -> None:
    logits = {"risk": 3.0, **{f"n{k}": 0.0 for k in range(40)}}
    short = [["n0", "risk", f"n{k}"] for k in range(1, 40)]
    long = [["n0", *(f"n{k}" for k in range(1, 40)), "risk"]] * 30
    effects = [
        rank_codes(softmax_cohort(logits, part)).filter(pl.col("code") == "risk")["effect"][0] for part in (short, long)
    ]
    others = [
        rank_codes(softmax_cohort(logits, part)).filter(pl.col("code") == "n5")["effect"] for part in (short, long)
    ]
    assert effects[1] - others[1][0] == pytest.approx(3.0, abs=1e-6)
    assert len(others[0]) == 0
    assert effects[0] == pytest.approx(1.5, abs=1e-6)


def test_rare_codes_are_left_out() -> None:
    drawn = [["a", "b", "c"]] * 996 + [["a", "b", "rare"]] * 4
    logits = {"a": 0.0, "b": 0.0, "c": 0.0, "rare": 9.0}
    assert "rare" not in rank_codes(softmax_cohort(logits, drawn))["code"].to_list()
    frequent = [["a", "b", "c"]] * 980 + [["a", "b", "rare"]] * 20
    assert rank_codes(softmax_cohort(logits, frequent))["code"][0] == "rare"


def test_noise_lowers_the_score_by_two_standard_errors() -> None:
    rng = np.random.default_rng(1)
    rows = []
    for sample in range(200):
        noisy = np.exp(rng.normal(0, 1))
        parts = np.array([1.0, 1.0, noisy])
        rows += [(sample, k, "abc"[k], float(v)) for k, v in enumerate(parts / parts.sum())]
    ranking = rank_codes(records(rows))
    row = ranking.filter(pl.col("code") == "c").row(0, named=True)
    assert row["score"] == pytest.approx(row["effect"] - 2 * row["error"])
    assert 0.02 < row["error"] < 0.1


def test_features_are_ranked_apart_and_codes_without_a_name_are_left_out() -> None:
    logits = {"a": 0.0, "b": 1.0, "c": 2.0}
    one = softmax_cohort(logits, [["a", "b", "c"]] * 20, "conditions")
    two = softmax_cohort(logits, [["a", "c", "b"]] * 20, "drugs").with_columns(
        code=pl.when(pl.col("code") == "b").then(None).otherwise("code")
    )
    ranking = rank_codes(pl.concat([one, two]))
    assert ranking.select("feature", "rank", "code").rows() == [
        ("conditions", 1, "c"),
        ("conditions", 2, "b"),
        ("drugs", 1, "c"),
    ]


def test_nested_records_leave_out_the_visit_that_is_read() -> None:
    rows = records([(s, p, c, r) for s in range(6) for p, c, r in ((0, "a", 0.5), (1, "b", 0.5), (0, "c", 0.2))])
    rows = rows.with_columns(visit=pl.Series([0, 0, 1] * 6, dtype=pl.Int32))
    assert rank_codes(rows)["code"].to_list() == ["c"]
    assert sorted(rank_codes(rows, read_position=None)["code"]) == ["a", "b", "c"]


def test_planted_codes_in_the_top_k() -> None:
    logits = {"a": 0.0, "b": 1.0, "c": 2.0, "d": 3.0}
    ranking = rank_codes(softmax_cohort(logits, [["a", "b", "c", "d"]] * 20))
    assert planted_found(ranking, {"drugs": ["d", "b"]}) == {"drugs": (1, 2)}
    assert planted_found(ranking, {"drugs": ["d", "c", "b"]}) == {"drugs": (3, 3)}
    assert planted_found(ranking, {"procedures": ["d"]}) == {"procedures": (0, 1)}
