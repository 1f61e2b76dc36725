"""Is one of two revisions slower? An interval of a median, and a verdict that noise alone cannot bring about.

Timings on a shared machine are a floor plus delays; means and standard deviations do not describe that. So:

- The unit is a **pair**: the two revisions timed one right after the other. What slows a stretch of time slows both and
  cancels in the pair's ratio. The estimate is the median of the ratios, head / base.
- The **interval** of that median is the sign test's, between two order statistics: it holds however heavy the delays'
  tail is, and needs no resampling. The intervals of raw seconds would overlap in bursts of a neighbour's work, and hide
  half of all 1.3× slowdowns.
- Two processes of the same code can differ by several percent for as long as they live (where their memory came to
  lie), and every one of many cases has its chance of it. So a case past the threshold is only **suspected**: it is
  measured again in new processes, several times over, and fails by those pairs alone.
"""

import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

LEVEL = 0.95
REPEATS = 3  # of a suspected case, each in new processes


class Interval(NamedTuple):
    """A median with the interval of the sign test."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def sign_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The median of independent values, and the narrowest symmetric pair of order statistics that covers the true one.

    The true median lies below the k-th smallest of n values with probability P(Bin(n, ½) < k), whatever they are
    distributed as.

    Args:
        values: n finite numbers.
        level: the least coverage, in (0, 1).

    Raises:
        ValueError: so few values that even the smallest and the largest do not cover (n < 6 at 95 %), or a value is
            not finite.

    Source: Conover 1999, Practical Nonparametric Statistics, section 3.2.
    """
    ordered, n = sorted(values), len(values)
    if not all(math.isfinite(value) for value in ordered):
        raise ValueError("sign_interval: values must be finite")
    tail, k = 0.0, 0
    while k < n // 2 and 2 * (tail + math.comb(n, k) / 2**n) <= 1 - level:
        tail += math.comb(n, k) / 2**n
        k += 1
    if k == 0:
        raise ValueError(f"sign_interval: {n} values are too few for a median's {level:.0%} interval")
    return Interval(statistics.median(ordered), ordered[k - 1], ordered[n - k])


@dataclass(frozen=True)
class Pairs:
    """Seconds of the two revisions, one of each a pair."""

    base: tuple[float, ...]
    head: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.base) != len(self.head):
            raise ValueError(f"Pairs: base and head must be equally many, got {len(self.base)} and {len(self.head)}")
        if not all(seconds > 0 for seconds in (*self.base, *self.head)):
            raise ValueError("Pairs: seconds must be positive")

    def __add__(self, other: "Pairs") -> "Pairs":
        return Pairs(self.base + other.base, self.head + other.head)

    @property
    def ratio(self) -> Interval:
        """Head / base."""
        return sign_interval([h / b for b, h in zip(self.base, self.head, strict=True)])


def suspected(first: Pairs, threshold: float) -> bool:
    """Whether a case must be measured again: slower by more than the threshold, the interval not asked."""
    return first.ratio.estimate > 1 + threshold


def judge(first: Pairs, repeats: Sequence[Pairs], threshold: float) -> tuple[str, Pairs]:
    """The verdict and the pairs it rests on: the first measurement, or where that is suspected, all of the repeats.

    Past the threshold `"slower"` or `"faster"`, and `"unclear"` where the interval holds 1; all else is `"same"`.

    Raises:
        ValueError: the first measurement is suspected and there are no repeats.
    """
    if not suspected(first, threshold):
        ratio = first.ratio
        return "faster" if ratio.estimate < 1 / (1 + threshold) and ratio.high < 1 else "same", first
    if not repeats:
        raise ValueError("judge: a suspected case must be measured again before it is judged")
    pooled = sum(repeats[1:], repeats[0])
    if not suspected(pooled, threshold):
        return "same", pooled
    return "slower" if pooled.ratio.low > 1 else "unclear", pooled


def turns(pairs: int, generator: random.Random) -> Iterator[tuple[str, str]]:
    """Who goes first in each pair: base-head-head-base or its mirror image, drawn anew for every two pairs.

    Over two pairs a steady drift adds the same to both revisions.
    """
    while pairs > 0:
        first = generator.choice((("base", "head"), ("head", "base")))
        yield from (first, first[::-1])[:pairs]
        pairs -= 2
