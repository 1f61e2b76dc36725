"""The statistics of the regression gate, on synthetic timings."""

import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from bench.gate.paired import REPEATS, SUSPECTED, Interval, Pairs, judge, sign_interval, turns

PAIRS, THRESHOLD = 32, 0.10  # the defaults of the command line
CASES = 12  # of one run

# --- the interval of a median


@pytest.mark.parametrize(("n", "low", "high"), [(6, 1, 6), (8, 1, 8), (9, 2, 8), (25, 8, 18), (32, 10, 23)])
def test_the_interval_is_between_the_order_statistics_of_the_sign_test(n: int, low: int, high: int) -> None:
    values = list(range(1, n + 1))
    random.Random(0).shuffle(values)
    found = sign_interval(values)
    assert (found.estimate, found.low, found.high) == ((n + 1) / 2, low, high)


def test_too_few_values_or_one_that_is_not_finite_have_no_interval() -> None:
    with pytest.raises(ValueError, match=r"5 values are too few for a median's 95% interval"):
        sign_interval([1.0] * 5)
    with pytest.raises(ValueError, match="must be finite"):
        sign_interval([1.0] * 9 + [float("nan")])


@pytest.mark.parametrize("draw", ["standard_normal", "standard_cauchy", "exponential"])
def test_the_interval_covers_the_median_as_often_as_it_says(draw: str) -> None:
    generator = np.random.default_rng(1)
    true = {"exponential": np.log(2)}.get(draw, 0.0)
    intervals = [sign_interval(row.tolist()) for row in getattr(generator, draw)(size=(2000, 32))]
    covered = np.mean([interval.low <= true <= interval.high for interval in intervals])
    exact = 1 - 2 * sum(math.comb(32, k) for k in range(10)) / 2**32
    assert exact > 0.95
    assert abs(covered - exact) < 3 * math.sqrt(exact * (1 - exact) / 2000)


# --- pairs and verdicts


def constant(ratio: float) -> Pairs:
    return ((0.01, 0.01 * ratio),) * PAIRS


def test_what_slows_both_cancels() -> None:
    load = np.exp(np.random.default_rng(0).normal(0, 1, PAIRS))
    pairs = tuple((each, 1.25 * each) for each in load)
    _, ratio = judge(pairs, THRESHOLD)
    assert ratio.estimate == pytest.approx(1.25, rel=1e-12)
    assert ratio.high - ratio.low < 1e-12
    # The seconds themselves say nothing: their intervals overlap.
    base, head = (sign_interval(seconds) for seconds in zip(*pairs, strict=True))
    assert base.high > head.low


@pytest.mark.parametrize(
    ("pairs", "verdict", "estimate"),
    [
        (constant(1.00), "same", 1.00),
        (constant(1.09), "same", 1.09),
        (constant(1.11), "slower", 1.11),
        (constant(0.80), "faster", 0.80),
        (constant(0.95), "same", 0.95),
        (constant(1.02) + constant(1.30) + constant(1.02), "same", 1.02),  # one unlucky process does not decide
        (constant(1.30) + constant(1.30) + constant(1.02), "slower", 1.30),
        (tuple((1.0, ratio) for ratio in [0.7] * 15 + [1.5] * 17), "unclear", 1.5),
        (tuple((1.0, ratio) for ratio in [1.4] * 15 + [0.7] * 17), "same", 0.7),
    ],
)
def test_verdicts(pairs: Pairs, verdict: str, estimate: float) -> None:
    found, ratio = judge(pairs, THRESHOLD)
    assert found == verdict
    assert ratio.estimate == pytest.approx(estimate)


# --- synthetic machines

Machine = Callable[[np.random.Generator, float], Pairs]


def machine(
    *, jitter: float = 0.02, luck: float = 0.02, burst: float = 0.3, slow: float = 2.0, spikes: float = 0.1
) -> Machine:
    """Timings of two processes: head takes `ratio` times base's time, and on top of it

    jitter: spread of every turn, log-normal; luck: of each process, as long as it lives; burst: share of the time in
    which a neighbour makes everything `slow` times as slow, for 20 turns on average; spikes: share of the turns that
    were interrupted, for a Pareto time without a variance.
    """

    def measure(generator: np.random.Generator, ratio: float) -> Pairs:
        seconds = 0.01 * np.exp(generator.normal(0, jitter, 2 * PAIRS))
        switches = np.cumsum(generator.random(2 * PAIRS) < 1 / 20)
        seconds *= np.where(generator.random(switches[-1] + 1) < burst, slow, 1.0)[switches]
        interrupted = generator.random(2 * PAIRS) < spikes
        seconds[interrupted] *= 1 + generator.pareto(1.5, int(interrupted.sum()))
        turn = seconds.reshape(PAIRS, 2)
        head_first = generator.random(PAIRS) < 0.5
        base = np.where(head_first, turn[:, 1], turn[:, 0]) * np.exp(generator.normal(0, luck))
        head = np.where(head_first, turn[:, 0], turn[:, 1]) * np.exp(generator.normal(0, luck)) * ratio
        return tuple(zip(base.tolist(), head.tolist(), strict=True))

    return measure


MACHINES = {
    "ordinary": machine(),
    "quiet": machine(jitter=0.005, luck=0.01, burst=0.0, spikes=0.02),
    "long bursts": machine(burst=0.5, slow=3.0),
    "heavy tail": machine(spikes=0.3),
    "unequal processes": machine(luck=0.03),
}


def judged(measure: Machine, generator: np.random.Generator, ratio: float) -> tuple[str, Interval]:
    """As the gate does it: a suspected case is judged by new measurements alone."""
    found = judge(measure(generator, ratio), THRESHOLD)
    if found[0] not in SUSPECTED:
        return found
    return judge(sum((measure(generator, ratio) for _ in range(REPEATS)), ()), THRESHOLD)


@pytest.mark.parametrize("name", MACHINES)
def test_false_alarms_of_whole_runs(name: str) -> None:
    """Of 400 runs of twelve cases with nothing changed, fewer than 1 % fail."""
    generator = np.random.default_rng(2)
    alarms = sum(any(judged(MACHINES[name], generator, 1.0)[0] == "slower" for _ in range(CASES)) for _ in range(400))
    assert alarms < 4


@pytest.mark.parametrize("name", MACHINES)
def test_power_at_a_fifth_slower(name: str) -> None:
    """Of 1000 cases that are 1.2 times as slow, more than 95 % fail."""
    generator = np.random.default_rng(3)
    found = [judged(MACHINES[name], generator, 1.2) for _ in range(1000)]
    assert sum(verdict == "slower" for verdict, _ in found) > 950
    estimates = [interval.estimate for _, interval in found]
    assert np.median(estimates) == pytest.approx(1.2, rel=0.01)


def test_a_single_measurement_would_raise_false_alarms() -> None:
    """Why there are repeats: processes that differ by chance are past 10 % often enough to matter in twelve cases."""
    generator = np.random.default_rng(4)
    unequal = machine(luck=0.04)
    first = [judge(unequal(generator, 1.0), THRESHOLD)[0] for _ in range(1000)]
    assert first.count("slower") > 20
    verdicts = [judged(unequal, generator, 1.0)[0] for _ in range(1000)]
    assert verdicts.count("slower") <= 2


def test_turns_are_even_mirrored_and_reproducible() -> None:
    order = list(turns(200, random.Random(0)))
    assert all(sorted(pair) == ["base", "head"] for pair in order)
    assert all(order[i] == order[i + 1][::-1] for i in range(0, 200, 2))
    firsts = [order[i][0] for i in range(0, 200, 2)]
    assert 30 < firsts.count("base") < 70
    assert order == list(turns(200, random.Random(0)))
    assert len(list(turns(7, random.Random(0)))) == 7
