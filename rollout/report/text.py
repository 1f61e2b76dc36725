"""Numbers and strings as the page shows them."""

from datetime import datetime
from typing import Any

from rollout.report.bounds import TEXT

_CONTROLS = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\n\t"} | {0x7F: "␡"}


def shown(value: Any, length: int = TEXT) -> str:
    """A string of the data: unchanged, but cut to ``length`` and with control characters made visible.

    HTML has no way to write most control characters; ``␀`` and its kin stand for them.
    """
    text = "" if value is None else str(value)
    cut = text if len(text) <= length else text[: length - 1] + "…"
    return cut.translate(_CONTROLS)


def count(value: float | None) -> str:
    """12,345."""
    return "–" if value is None else f"{value:,.0f}"


def percent(value: float | None, digits: int = 1) -> str:
    """0.1234 → 12.3 %; what is not 0 or 1 never reads as 0 or 100."""
    if value is None:
        return "–"
    least = 0.005 / 10**digits
    if 0 < value < least:
        return f"<{200 * least:g} %"
    if 1 - least < value < 1:
        return f">{100 - 200 * least:g} %"
    return f"{100 * value:.{digits}f} %"


def times(value: float | None) -> str:
    """2.345 → 2.35×, 23.45 → 23.4×."""
    return "–" if value is None else f"{value:.{2 if value < 9.995 else 1}f}×"


def number(value: float | None) -> str:
    """Three significant digits."""
    return "–" if value is None else f"{value:,.3g}"


def seconds(value: Any) -> str:
    """A duration in the unit that suits it."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "–"
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def size(value: Any) -> str:
    """Bytes as MiB or GiB."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "–"
    mib = value / 2**20
    return f"{mib:,.0f} MiB" if mib < 1024 else f"{mib / 1024:,.1f} GiB"


def moment(value: Any) -> str:
    """An ISO date and time to the minute; anything else as it is."""
    try:
        when = datetime.fromisoformat(str(value))
    except ValueError:
        return shown(value, 40)
    return f"{when:%Y-%m-%d %H:%M} {when.tzname() or ''}".strip()


FILTERS = {f.__name__: f for f in (shown, count, percent, times, number, seconds, size)}
