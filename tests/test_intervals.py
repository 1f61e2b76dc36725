"""Bootstrap, sign flips and Holm against scipy, by hand, and on clustered data whose truth is known."""

import numpy as np
import pytest

from rollout.intervals import (
    bootstrap_differences,
    bootstrap_mean,
    bootstrap_means,
    holm,
    permutation_test,
    sign_flip_test,
)


def clusters(rng: np.random.Generator, patients: int, mean: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values whose mean is `mean`, a patient's being alike; sums and sizes by patient."""
    size = rng.integers(1, 8, patients)
    owner = np.repeat(np.arange(patients), size)
    values = mean + rng.normal(0, 1, patients)[owner] + rng.normal(0, 0.3, len(owner))
    return values, np.bincount(owner, values), size.astype(float)


def test_many_means_at_once_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    size = rng.integers(0, 5, (40, 3)).astype(float)
    total = rng.gamma(0.5, 1.0, (40, 3)) * size  # skewed: the BCa interval is not the percentile one
    found = bootstrap_means(total, size, draws=20_000)
    for k in range(3):
        theirs = stats.bootstrap(
            (total[:, k], size[:, k]), lambda a, b, axis=-1: a.sum(axis) / b.sum(axis), paired=True, vectorized=True,
            n_resamples=20_000, method="BCa", batch=500, rng=np.random.default_rng(1),
        ).confidence_interval  # fmt: skip
        estimate, low, high = (part[k] for part in found)
        assert estimate == pytest.approx(total[:, k].sum() / size[:, k].sum())
        assert low == pytest.approx(theirs.low, abs=0.02 * (theirs.high - theirs.low))
        assert high == pytest.approx(theirs.high, abs=0.02 * (theirs.high - theirs.low))


def test_a_column_is_what_it_is_alone_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values, total, size = clusters(np.random.default_rng(1), 30)
    owner = np.repeat(np.arange(30), size.astype(int))
    alone = bootstrap_mean(values, owner.tolist())
    monkeypatch.setattr("rollout.intervals.BLOCK", 100)
    _, low, high = bootstrap_means(np.stack([total, -total], 1), size[:, None])
    assert (low[0], high[0]) == pytest.approx((alone.low, alone.high), abs=1e-12)
    assert (-high[1], -low[1]) == pytest.approx((alone.low, alone.high), abs=0.05)


def test_means_of_nothing_and_of_one_group_have_no_interval() -> None:
    total, size = np.array([[1.0, 0.0, 2.0], [0.0, 0.0, 2.0]]), np.array([[2.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    estimate, low, high = bootstrap_means(total, size)
    assert estimate[0] == 0.5
    assert np.isnan(estimate[1])
    assert np.isnan([*low[:2], *high[:2]]).all()
    assert (estimate[2], low[2], high[2]) == (2.0, 2.0, 2.0)  # no spread
    assert [part.shape for part in bootstrap_means(np.empty((0, 2)), np.empty((0, 2)))] == [(2,)] * 3
    with pytest.raises(ValueError, match="bootstrap_means: level must lie between 0 and 1, got 95"):
        bootstrap_means(total, size, level=95)


def test_intervals_of_a_ratio_cover_the_truth() -> None:
    rng, covered = np.random.default_rng(2), 0
    for trial in range(400):
        _, total, size = clusters(rng, 40, mean=0.3)
        _, low, high = bootstrap_means(total[:, None], size[:, None], draws=400, seed=trial)
        covered += low[0] <= 0.3 <= high[0]
    assert 0.91 <= covered / 400 <= 0.975


def test_signs_by_hand() -> None:
    # Of the 8 sums of ±1 ±2 ±3, |sum| ≥ 6: 2; of ±1 ±1 ±0, |sum| ≥ 2: 4; of zeros all.
    assert sign_flip_test([[1, 1, 0], [2, 1, 0], [3, 0, 0]]).tolist() == [2 / 8, 4 / 8, 1.0]
    assert sign_flip_test(np.full((9, 1), 0.1))[0] == 2 / 512  # though the sums round differently
    assert sign_flip_test(np.empty((0, 2))).tolist() == [1.0, 1.0]


def test_sign_flips_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    for groups, tolerance in ((10, 1e-12), (60, 0.02)):
        total = rng.normal(0.2, 1, (groups, 4))
        theirs = stats.permutation_test(
            (total,), lambda a, axis=0: a.sum(axis), permutation_type="samples", vectorized=True, axis=0,
            n_resamples=9999, rng=np.random.default_rng(4),
        ).pvalue  # fmt: skip
        assert sign_flip_test(total) == pytest.approx(theirs, abs=tolerance)


def test_the_test_by_patient_keeps_its_level_and_one_by_sample_does_not() -> None:
    rng = np.random.default_rng(5)
    by_patient = by_sample = 0
    for trial in range(200):
        values, total, _ = clusters(rng, 30)
        by_patient += sign_flip_test(total[:, None], flips=999, seed=trial)[0] <= 0.05
        by_sample += sign_flip_test(values[:, None], flips=999, seed=trial)[0] <= 0.05
    assert by_patient / 200 <= 0.09
    assert by_sample / 200 >= 0.2


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.2]).tolist() == [0.2]
    assert holm([]).tolist() == []


def test_differences_of_means_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    size, to_size = (rng.integers(0, 5, (60, 1)).astype(float) for _ in range(2))
    total, to_total = rng.gamma(0.5, 1.0, (60, 1)) * size, rng.gamma(0.7, 1.0, (60, 1)) * to_size
    estimate, low, high = bootstrap_differences(total, size, to_total, to_size, draws=5000)
    theirs = stats.bootstrap(
        (total[:, 0], size[:, 0], to_total[:, 0], to_size[:, 0]),
        lambda a, b, c, d, axis=-1: a.sum(axis) / b.sum(axis) - c.sum(axis) / d.sum(axis), paired=True,
        vectorized=True, n_resamples=5000, method="BCa", batch=500, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert estimate[0] == pytest.approx(total.sum() / size.sum() - to_total.sum() / to_size.sum())
    assert (low[0], high[0]) == pytest.approx(tuple(theirs), abs=1e-9)
    nothing = bootstrap_differences(total, size, 0 * total, 0 * size)
    assert np.isnan(nothing).all()


def test_a_permutation_test_is_scipys_for_values_of_their_own() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(4)
    values, first = rng.normal(0, 1, 30), np.arange(30) < 12
    values[first] += 0.8
    one, two = first[:, None].astype(float), ~first[:, None]
    found = permutation_test(values[:, None] * one, one, values[:, None] * two, two, first, ~first, flips=20_000)
    theirs = stats.permutation_test(
        (values[first], values[~first]), lambda a, b, axis=-1: a.mean(axis) - b.mean(axis), vectorized=True,
        n_resamples=20_000, rng=np.random.default_rng(1),
    ).pvalue  # fmt: skip
    assert 0.005 < theirs < 0.2
    assert found[0] == pytest.approx(theirs, abs=0.006)


def test_groups_of_both_cohorts_exchange_what_they_have() -> None:
    rng = np.random.default_rng(5)
    total, to_total, ones, all_of = (
        rng.normal(0.4, 1, (25, 1)),
        rng.normal(0, 1, (25, 1)),
        np.ones((25, 1)),
        [True] * 25,
    )
    found = permutation_test(total, ones, to_total, ones, all_of, all_of, flips=20_000)
    assert found[0] == pytest.approx(sign_flip_test(total - to_total, flips=20_000)[0], abs=0.01)


def test_a_permutation_test_by_patient_keeps_its_level() -> None:
    rng, low = np.random.default_rng(6), 0
    for trial in range(300):
        _, total, size = clusters(rng, 40)
        first = rng.permutation(40) < 15
        one, two = first[:, None].astype(float), ~first[:, None]
        p = permutation_test(
            total[:, None] * one, size[:, None] * one, total[:, None] * two, size[:, None] * two, first, ~first,
            flips=199, seed=trial,
        )  # fmt: skip
        low += p[0] <= 0.05
    assert 3 <= low <= 28  # 15 are expected, with a standard deviation of 4
