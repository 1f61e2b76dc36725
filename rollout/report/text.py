"""Numbers and strings as the page shows them."""

import math
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import wraps
from typing import Any

from rollout.report.bounds import NAME, TEXT

DASH = "–"
LARGE = 1e15
"""From here on a number is told by its size, not digit by digit."""
_PICTURES = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\n\t"} | {0x7F: "␡"}
_DIRECTIONS = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_HIDDEN = (*range(0x80, 0xA0), *_DIRECTIONS, 0x2028, 0x2029, 0xFEFF)
_CONTROLS = _PICTURES | {c: f"[U+{c:04X}]" for c in _HIDDEN}
"""What would not be seen, or would turn round what is, and what stands for it."""


def shown(value: Any, length: int = TEXT) -> str:
    """A string of the data: unchanged, but cut to `length` and with control characters made visible.

    HTML has no way to write most control characters; `␀` and its kin stand for them. So does `[U+202E]` for what turns
    the direction of text, as `123` could read `321`.
    """
    text = "" if value is None else str(value)
    cut = text if len(text) <= length else text[: length - 1] + "…"
    return cut.translate(_CONTROLS)


def name(value: Any) -> str:
    """A code's name."""
    return shown(value, NAME)


def in_percent(manifest: Mapping[str, Any]) -> bool:
    """Whether relevance is told in percent: where the rows of the chain sum to 1."""
    method = manifest["identity"].get("method")
    return isinstance(method, Mapping) and bool(method.get("renormalize") or method.get("own_path") is False)


def finite(value: Any) -> float | None:
    """A number that is one: None for what is absent, no number, NaN, infinite or beyond a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _or_dash(form: Callable[[float], str]) -> Callable[[Any], str]:
    """A number in a form, and what is no finite number as a dash."""

    @wraps(form)
    def said(value: Any) -> str:
        found = finite(value)
        return DASH if found is None else form(found)

    return said


@_or_dash
def count(value: float) -> str:
    """12,345."""
    return f"{value:,.0f}" if abs(value) < LARGE else f"{value:.3g}"


@_or_dash
def percent(value: float) -> str:
    """0.1234 → 12.3 %; what is not 0 or 1 never reads as 0 or 100."""
    if 0 < abs(value) < 0.0005:
        return "<0.1 %" if value > 0 else ">−0.1 %"
    if 0.9995 < value < 1:
        return ">99.9 %"
    return f"{100 * value:.1f} %" if abs(value) < LARGE else f"{100 * value:.3g} %"


def chance(value: Any) -> str:
    """In percent, if it can be a probability."""
    found = finite(value)
    return percent(value) if found is not None and 0 <= found <= 1 else number(value)


@_or_dash
def times(value: float) -> str:
    """2.345 → 2.35×, 23.45 → 23.4×."""
    if abs(value) >= LARGE:
        return f"{value:.3g}×"
    return f"{value:.{2 if abs(value) < 9.995 else 1}f}×"


def width(share: float) -> str:
    """The width of a bar in percent of its track, whatever the share."""
    return f"{100 * min(max(share, 0.0), 1.0) + 0.0:.1f}%"


@_or_dash
def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:,.3g}"


@_or_dash
def decimal(value: float) -> str:
    """0.12345 → 0.123."""
    return f"{value:,.3f}".replace("-", "−") if abs(value) < LARGE else f"{value:.3g}"


@_or_dash
def signed(value: float) -> str:
    """0.12345 → +0.123, and what is less than can be told 0.000."""
    text = decimal(value)
    return f"+{text}" if value > 0 and round(value, 3) else text.replace("−0.000", "0.000")


@_or_dash
def small(value: float) -> str:
    """A p value: <0.001, else three decimals."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


@_or_dash
def seconds(value: float) -> str:
    """A duration in the unit that suits it."""
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


@_or_dash
def size(value: float) -> str:
    """Bytes as MiB or GiB."""
    mib = value / 2**20
    return f"{count(mib)} MiB" if mib < 1024 else f"{mib / 1024:,.1f} GiB"


def moment(value: Any) -> str:
    """An ISO date and time to the minute; anything else as it is."""
    try:
        when = datetime.fromisoformat(str(value))
    except ValueError:
        return shown(value, 40)
    return f"{when:%Y-%m-%d %H:%M} {when.tzname() or ''}".strip()


FILTERS = {
    f.__name__: f
    for f in (shown, name, count, percent, chance, times, number, decimal, signed, small, seconds, size, width)
}
