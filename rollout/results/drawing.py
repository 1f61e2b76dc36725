"""What the pictures have in common: a figure, its axes, text as it is to be read, the colours of lines, the file."""

from io import BytesIO
from pathlib import Path
from typing import Any

from rollout.errors import require

DPI = 150
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#6a3d9a")
"""Colours of lines, after Okabe & Ito, which those who see few colours tell apart."""
GREY = "#7a7a7a"


def new_figure(size: tuple[float, float]) -> Any:
    """A figure that pyplot does not know, so that none is left open."""
    return require("matplotlib.figure", "plots").Figure(figsize=size, layout="constrained")


def saved(figure: Any, path: str | Path | None) -> Any:
    """The figure, written as PNG where there is a path."""
    if path is not None:
        figure.savefig(Path(path).expanduser(), dpi=DPI, facecolor="white")
    return figure


def png_bytes(figure: Any) -> bytes:
    """The figure as PNG."""
    sink = BytesIO()
    figure.savefig(sink, format="png", dpi=DPI, facecolor="white")
    return sink.getvalue()


def tidy(axis: Any) -> None:
    """Small ticks, a light grid, no box."""
    axis.tick_params(labelsize=8)
    axis.grid(axis="both", color="#e6e6e6", lw=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def visible(text: Any) -> str:
    """Without control characters, which no font can draw."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in str(text))


def plain(text: str) -> str:
    """Not to be read as mathematics."""
    return text.replace("$", r"\$")
