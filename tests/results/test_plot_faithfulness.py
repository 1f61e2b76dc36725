"""The picture of an evaluation: what is drawn where, and the file it writes."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from rollout import CohortFaithfulness, plot_faithfulness
from rollout.results.drawing import GREY, LINES
from tests.support.evaluations import drawn, written
from tests.support.written_run import NASTY


@pytest.fixture(scope="module")
def found() -> CohortFaithfulness:
    return CohortFaithfulness(*drawn({"good": 0.1, "same": 0.0, "random": 0.0}), draws=200)


def test_curves_and_their_bands(found: CohortFaithfulness) -> None:
    from matplotlib.colors import to_hex

    left, middle, _ = plot_faithfulness(found).axes
    table = found.curves()
    for axis, direction in ((left, "without"), (middle, "only")):
        assert [to_hex(line.get_color()) for line in axis.lines] == [LINES[0], LINES[1], GREY]
        for line, band, method in zip(axis.lines, axis.collections, found.methods, strict=True):
            part = table.filter((pl.col("method") == method) & (pl.col("direction") == direction))
            assert line.get_xdata().tolist() == part["share"].to_list()
            assert line.get_ydata() == pytest.approx(part["probability"].to_numpy())
            edges = band.get_paths()[0].vertices[:, 1]
            assert (edges.min(), edges.max()) == pytest.approx(
                (part["probability_low"].min(), part["probability_high"].max())
            )
    assert left.get_ylim() == middle.get_ylim()


def test_the_forest_is_turned_so_that_right_is_better(found: CohortFaithfulness) -> None:
    axis = plot_faithfulness(found).axes[2]
    names = [text.get_text() for text in axis.get_yticklabels()]
    assert names[:6] == ["comprehensiveness", "good", "same", "sufficiency", "good", "same"]
    assert "log odds" not in names
    dots = {line.get_ydata()[0]: line for line in axis.lines if line.get_marker() == "o"}
    for row in found.differences(measures=["comprehensiveness", "sufficiency"]).rows(named=True):
        sign = 1 if row["measure"] == "comprehensiveness" else -1
        place = names.index(row["measure"]) + (1 if row["method"] == "good" else 2)
        assert dots[place].get_xdata()[0] == pytest.approx(sign * row["difference"])
        assert (dots[place].get_markerfacecolor() == "white") is (row["method"] == "same")
    assert all(dots[names.index(measure) + 1].get_xdata()[0] > 0.05 for measure in ("comprehensiveness", "sufficiency"))


def test_the_file_is_a_picture_and_no_figure_stays_open(found: CohortFaithfulness, tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    figure = plot_faithfulness(found, tmp_path / "faithful.png")
    assert figure.get_suptitle() == "Faithfulness over 120 samples of 40 patients"
    assert not plt.get_fignums()
    with Image.open(tmp_path / "faithful.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 300
    assert 0.01 < (pixels.min(axis=2) < 250).mean() < 0.7


@pytest.mark.filterwarnings("ignore:Glyph")
def test_hostile_names_of_one_patient_are_drawn_as_text(tmp_path: Path) -> None:
    curves = {name: ([0.5, 0.4], [0.5, 0.6]) for name in (*NASTY, "\x00\x1b[31m", "$\\bad{$", "random")}
    one = CohortFaithfulness(*written([("p", 0.7, curves)]))
    figure = plot_faithfulness(one, tmp_path / "a.png", title="$ \x00")
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert "(empty string)" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert not figure.axes[0].collections  # no intervals


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to draw, no sample was evaluated"):
        plot_faithfulness(CohortFaithfulness(*written([])))
    alone = CohortFaithfulness(*written([("p", 0.7, {"good": ([0.5, 0.4], [0.5, 0.6])})]))
    with pytest.raises(ValueError, match=r"to must be one of the methods \['good'\], got 'random'"):
        plot_faithfulness(alone)


def test_random_alone_has_curves_and_no_forest(tmp_path: Path) -> None:
    rows = {"random": ([0.5, 0.4], [0.5, 0.6])}
    figure = plot_faithfulness(CohortFaithfulness(*written([("p", 0.7, rows), ("q", 0.7, rows)])), tmp_path / "a.png")
    assert len(figure.axes[0].lines) == 1
    assert (tmp_path / "a.png").is_file()
