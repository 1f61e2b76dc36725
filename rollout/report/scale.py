"""The colour scale of relevance: five steps of one hue, by lift, so that records of any length compare."""

from itertools import pairwise

EDGES = (0.5, 1.0, 2.0, 4.0)
COLOURS = ("#f4f7fa", "#d7e4f0", "#a3c4e0", "#3873a6", "#174a7a")
INKS = ("#1d2733", "#1d2733", "#1d2733", "#ffffff", "#ffffff")
"""Ink on each colour, of a contrast of 4.5 or more."""


def level(lift: float) -> int:
    """The step of a lift: 0 below ½ of an even spread, 4 from 4 times it on."""
    return sum(round(lift, 4) >= edge for edge in EDGES)


def legend() -> list[str]:
    """What each step means."""
    inner = [f"{low:g} to {high:g}×" for low, high in pairwise(EDGES)]
    return [f"below {EDGES[0]:g}×", *inner, f"{EDGES[-1]:g}× and more"]
