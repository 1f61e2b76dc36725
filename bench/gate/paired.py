"""Is one of two revisions slower? An interval of a median, and a verdict that noise alone cannot bring about.

Timings on a shared machine are a floor plus delays; means and standard deviations do not describe that. So:

- The unit is a **pair**: the two revisions timed one right after the other. What slows a stretch of time slows both and
  cancels in the pair's ratio. The estimate is the median of the ratios, head / base.
- The **interval** of that median is the sign test's, between two order statistics: it holds however heavy the delays'
  tail is. Those of raw seconds would overlap in bursts of a neighbour's work, and hide half of all 1.3× slowdowns.
- Two processes of the same code can differ by several percent for as long as they live (where their memory came to
  lie), and every one of many cases has its chance of it. So a case past the threshold is only **suspected**: it is
  measured again in new processes, several times over, and fails by those pairs alone.
"""

import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

SIDES = ("base", "head")
LEVEL = 0.95
SUSPECTED = ("slower", "unclear")  # verdicts past the threshold: of a first measurement, no more than a suspicion
REPEATS = 3  # of a suspected case, each in new processes

Pairs = tuple[tuple[float, float], ...]
"""Seconds of (base, head), timed one right after the other."""


@dataclass(frozen=True)
class Interval:
    """A median with the interval of the sign test."""

    estimate: float
    low: float
    high: float


def sign_interval(values: Sequence[float]) -> Interval:
    """The median of independent values, and the narrowest symmetric pair of order statistics that covers the true one.

    The true median lies below the k-th smallest of n values with probability P(Bin(n, ½) < k), whatever they are
    distributed as, and above the k-th largest as often: k is the largest with which both are at most 5 % together.

    Raises:
        ValueError: so few values that even the smallest and the largest do not cover (n < 6), or one is not finite.

    Source: Conover 1999, Practical Nonparametric Statistics, section 3.2.
    """
    ordered, n = sorted(values), len(values)
    if not all(map(math.isfinite, ordered)):
        raise ValueError("sign_interval: values must be finite")
    below = accumulate(math.comb(n, i) for i in range(n // 2))  # 2ⁿ P(Bin(n, ½) < k) for k = 1, 2, …
    k = sum(2 * ways <= (1 - LEVEL) * 2**n for ways in below)
    if k == 0:
        raise ValueError(f"sign_interval: {n} values are too few for a median's {LEVEL:.0%} interval")
    return Interval(statistics.median(ordered), ordered[k - 1], ordered[n - k])


def judge(pairs: Pairs, threshold: float) -> tuple[str, Interval]:
    """The verdict, and head / base.

    Past the threshold `"slower"` or `"faster"`; slower with 1 in the interval is `"unclear"`; all else is `"same"`.
    """
    ratio = sign_interval([head / base for base, head in pairs])
    if ratio.estimate > 1 + threshold:
        return "slower" if ratio.low > 1 else "unclear", ratio
    return "faster" if ratio.estimate < 1 / (1 + threshold) and ratio.high < 1 else "same", ratio


def turns(pairs: int, generator: random.Random) -> Iterator[tuple[str, str]]:
    """Who goes first in each pair: base-head-head-base or its mirror image, drawn anew for every two pairs.

    Over two pairs a steady drift adds the same to both revisions.
    """
    while pairs > 0:
        first = generator.choice((SIDES, SIDES[::-1]))
        yield from (first, first[::-1])[:pairs]
        pairs -= 2
