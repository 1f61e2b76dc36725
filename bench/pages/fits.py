"""Fitted exponents: y = a·x^b by least squares on logarithms, over the tail of a curve."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

TAIL = 4  # points


@dataclass(frozen=True)
class Power:
    """y = exp(intercept)·x^exponent; `error` is the exponent's standard error, None with fewer than three points."""

    exponent: float
    intercept: float
    error: float | None
    points: int

    def at(self, x: float) -> float:
        return math.exp(self.intercept + self.exponent * math.log(x))

    def reaches(self, y: float) -> float:
        """The x at which the fit reaches y; infinite when it does not grow."""
        if self.exponent <= 0:
            return math.inf
        return math.exp((math.log(y) - self.intercept) / self.exponent)

    def __str__(self) -> str:
        return f"{self.exponent:.2f}" + ("" if self.error is None else f" ± {self.error:.2f}")


def power(x: Sequence[float], y: Sequence[float], tail: int = TAIL) -> Power | None:
    """The fit of the last `tail` points with a positive y; None with fewer than two.

    Raises:
        ValueError: x and y differ in length, or x is not positive.
    """
    if len(x) != len(y):
        raise ValueError(f"power: x and y must be of one length, got {len(x)} and {len(y)}")
    if any(value <= 0 for value in x):
        raise ValueError(f"power: x must be positive, got {min(x)}")
    pairs = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if b > 0][-tail:]
    if len(pairs) < 2:
        return None
    slope, intercept = statistics.linear_regression(*zip(*pairs, strict=True))
    error = None
    if len(pairs) > 2:
        centre = statistics.fmean(a for a, _ in pairs)
        left = sum((b - intercept - slope * a) ** 2 for a, b in pairs)
        error = math.sqrt(left / (len(pairs) - 2) / sum((a - centre) ** 2 for a, _ in pairs))
    return Power(slope, intercept, error, len(pairs))
