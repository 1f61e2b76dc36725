"""The report of an evaluation: its numbers against the frames, its sentences against the verdicts, its text inert."""

import random
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from rollout.cli import app
from rollout.report import write_report
from rollout.report.charts import Axes, Line, line_chart
from rollout.report.forest import Row, forest_chart
from rollout.report.page import render
from rollout.report.sections.faithfulness import faithfulness
from rollout.report.text import decimal, signed, small
from rollout.results.attributions import CohortAttributions
from rollout.results.faithfulness import CohortFaithfulness, is_evaluation, open_faithfulness
from tests.support.evaluated import evaluate_toy, table
from tests.support.evaluations import drawn, written
from tests.support.hostile_runs import NUMBERS, PAYLOADS
from tests.support.inert import check
from tests.support.pages import Parsed, text_of
from tests.support.toy_cohort import attribute
from tests.support.written_run import NASTY, Record, write_run


def manifest(methods: Any = ("good", "same", "random"), **fields: Any) -> dict[str, Any]:
    identity = {
        "model": {"class": "pyhealth.models.transformer.Transformer", "fingerprint": "m"},
        "dataset": {"name": "demo", "task": "mortality", "fingerprint": "d"},
        "evaluation": {"metric": "eraser", "replacement": "delete", "shares": [10.0, 50.0], "seed": 0},
        "methods": dict.fromkeys(methods, "what it is"),
    }
    return {"status": "complete", "identity": identity, "sessions": [], "notes": [], "labels": {}, **fields}


def of(frames: Any, told: Mapping[str, Any] | None = None, **options: Any) -> CohortFaithfulness:
    return CohortFaithfulness(*frames, manifest=told or manifest(), **{"draws": 200, **options})


@pytest.fixture(scope="module")
def found() -> CohortFaithfulness:
    labels = {"mortality": ["survived", "died <b>"]}
    return of(drawn({"good": 0.1, "same": 0.0, "bad": -0.1, "random": 0.0}), manifest(labels=labels))


@pytest.fixture(scope="module")
def page(found: CohortFaithfulness) -> str:
    return render(None, None, found)


def test_the_tables_are_those_of_the_frames(found: CohortFaithfulness, page: str) -> None:
    rows = [[" ".join(cell.split()) for cell in row] for row in Parsed(page).rows]
    differences = {(r["measure"], r["method"]): r for r in found.differences().rows(named=True)}
    summary = found.summary()
    assert summary.height == 4 * 7
    for row in summary.rows(named=True):
        other = differences.get((row["measure"], row["method"]))
        expected = [row["method"], decimal(row["mean"]), f"[{decimal(row['low'])}, {decimal(row['high'])}]"]
        verdict = (
            ["", ""]
            if other is None
            else [signed(other["difference"]), f"{other['verdict']} p {small(other['p_holm'])}"]
        )
        assert expected + verdict in rows


def test_who_does_not_beat_random_is_named(page: str) -> None:
    banners = [" ".join(text_of(part).split()) for part in re.findall(r'<p class="banner">.*?</p>', page, re.S)]
    assert len(banners) == 2
    same, bad = banners
    assert same.startswith("same is not shown to beat a random ranking.")
    assert "this cohort would have shown a difference of 0.0" in same
    assert bad.startswith("bad does worse than a random ranking.")
    assert "Better than a random ranking in comprehensiveness: good." in text_of(page)


def test_a_cohort_too_small_is_said_to_be_so() -> None:
    small_one = of(drawn({"same": 0.0, "random": 0.0}, samples=12, patients=4, spread=0.1))
    text = text_of(render(None, None, small_one))
    assert "same is not shown to beat a random ranking." in text
    assert "the cohort is too small to tell. Its relevance should not" in text  # of 4 patients nothing can be shown


def test_curves_and_forest_are_drawn_in_their_places(found: CohortFaithfulness, page: str) -> None:
    chart = re.search(r"<svg[^>]*Deletion: the top codes taken out; a line per method.*?</svg>", page, re.S)
    assert chart
    lines = re.findall(r'<path class="line (\w+)" d="M([^"]*)"', chart.group(0))
    assert [style for style, _ in lines] == ["m0", "m1", "m2", "mr"]
    assert len(re.findall(r'<path class="band', chart.group(0))) == 4
    table = found.curves().filter(pl.col("direction") == "without")
    drawn_y = [[float(point.split()[1]) for point in points.split("L")] for _, points in lines]
    true_y = [table.filter(pl.col("method") == method)["probability"].to_list() for method in found.methods]
    scale = (drawn_y[0][2] - drawn_y[0][0]) / (true_y[0][2] - true_y[0][0])
    for ys, values in zip(drawn_y, true_y, strict=True):
        assert [(y - drawn_y[0][0]) / scale for y in ys] == pytest.approx([v - true_y[0][0] for v in values], abs=1e-3)
    forest = re.search(r"<svg[^>]*Difference of each method to random.*?</svg>", page, re.S)
    assert forest
    zero = float(re.search(r'<path class="axis" d="M([\d.]+)', forest.group(0)).group(1))  # type: ignore[union-attr]
    dots = re.findall(r'<circle class="(dot|ring) (m\d)" cx="([\d.]+)"', forest.group(0))
    assert len(dots) == 3 * 6  # log odds are of another unit
    for kind, style, x in dots:
        if style == "m0":
            assert kind == "dot"
            assert float(x) > zero + 5
        if style == "m2":
            assert float(x) < zero - 5
        if style == "m1":
            assert kind == "ring"


def test_groups_with_the_names_of_their_labels(found: CohortFaithfulness, page: str) -> None:
    text = text_of(page)
    for title in ("By the class predicted", "By the true label", "By the length of the record"):
        assert title in text
    assert "label 1 died <b> 60 samples of" in text
    view = faithfulness(found)
    by = {one["by"]: one for one in view["groups"]}
    assert [group["name"] for group in by["predicted"]["groups"]] == ["0", "1"]
    assert len(by["length"]["groups"]) == 4
    assert by["label"]["comparisons"] == 2 * 2 * 3
    mean = found.summary("label").filter(
        (pl.col("group") == "1") & (pl.col("method") == "good") & (pl.col("measure") == "sufficiency")
    )["mean"][0]
    blocks = {block["measure"]: block for block in by["label"]["groups"][1]["blocks"]}
    assert blocks["sufficiency"]["rows"][0]["mean"] == mean


def test_too_many_groups_are_said_and_not_shown() -> None:
    frames = drawn({"same": 0.0, "random": 0.0}, samples=60, patients=20)
    many = frames[1].with_columns(target=(pl.col("sample") % 12).cast(pl.Int32))
    text = text_of(render(None, None, of((frames[0], many, frames[2]))))
    assert 'There are 12 groups, too many for this page: CohortFaithfulness.differences(by="predicted")' in text


def test_hostile_names_are_text_and_nothing_else() -> None:
    for first in range(0, len(PAYLOADS), 6):
        names = PAYLOADS[first : first + 6]
        curves = {name: ([0.5, 0.4], [0.5, 0.6 + i / 100]) for i, name in enumerate((*names, "random"))}
        told = manifest(names, labels={names[0]: [names[-1], *names]}, notes=list(names))
        told["identity"]["evaluation"] |= {"metric": names[0], "replacement": names[-1]}
        told["identity"]["methods"] = {name: name + "!" for name in (*names, "random")}
        told["identity"]["dataset"]["name"] = names[1]
        failures = pl.LazyFrame({"sample": [7], "error": [names[0]]})
        samples = [(names[i % len(names)], 0.7, curves) for i in range(5)]
        check(render(None, None, of(written(samples), told, failures=failures)))
    curves = {name: ([0.5, 0.4], [0.5, 0.6]) for name in (*NASTY, "random")}
    page = render(None, None, of(written([("a", 0.7, curves), ("b", 0.6, curves)]), manifest(NASTY)))
    shown = "".join(Parsed(page).text)
    assert all(name in shown for name in NASTY)
    assert "empty string" in shown


def test_an_empty_one_and_one_patient_have_no_number_that_is_none() -> None:
    rows, predictions = written([("a", 0.7, {"same": ([0.5, 0.4], [0.5, 0.6]), "random": ([0.5, 0.4], [0.4, 0.6])})])
    for frames in (written([]), (rows, predictions), (rows, predictions.with_columns(evaluated=False))):
        page = render(None, None, of(frames))
        check(page)
        assert not re.search(r"\b(nan|inf|None)\b", text_of(page), re.I)
    assert "No sample was evaluated." in text_of(page)
    assert "–" in text_of(render(None, None, of((rows, predictions))))


def test_hostile_numbers_give_an_inert_page_or_one_clear_line() -> None:
    draw, ends = random.Random(0), []
    for _ in range(60):
        hostile = draw.choice([0.0, 0.0, 0.3])
        number = partial(_number, draw, hostile)
        names = ["a", "random"][draw.randrange(2) :]
        samples = [
            (f"p{draw.randrange(3)}", number(), {name: ([number(), number()], [number(), number()]) for name in names})
            for _ in range(draw.randint(0, 5))
        ]
        truth = [draw.choice([None, [], [1.0], [0.0], [float("nan")], [1e30], [2.0, 1.0]]) for _ in samples]
        codes = [draw.choice([0, 1, -5, 2**31 - 1, None]) for _ in samples]
        try:
            page = render(None, None, of(written(samples, y_true=truth, codes=codes)))
        except ValueError as error:
            ends.append(str(error))
        else:
            check(page)
    assert 10 <= len(ends) <= 30
    assert all("must be finite, got" in said for said in ends)


def _number(draw: random.Random, hostile: float) -> float:
    return draw.choice(NUMBERS) if draw.random() < hostile else draw.random()


def test_many_methods_are_bounded_and_random_stays() -> None:
    curves = {f"method {i:02}": ([0.5, 0.4], [0.5, 0.6]) for i in range(30)} | {"random": ([0.6, 0.4], [0.4, 0.6])}
    one = of(written([(f"p{i}", 0.7, curves) for i in range(3)]), manifest(()))
    view = faithfulness(one)
    assert [method["name"] for method in view["methods"]] == [*(f"method {i:02}" for i in range(11)), "random"]
    assert "Shown: 12 of 31 methods." in text_of(render(None, None, one))


def test_ignored_samples_are_told_and_the_metric_of_padding_warned_of() -> None:
    rows, predictions, scores = drawn({"same": 0.0, "random": 0.0}, samples=12, patients=6)
    told = manifest()
    told["identity"]["evaluation"]["metric"] = "pyhealth"
    text = text_of(
        render(None, None, of((rows, predictions.with_columns(evaluated=pl.col("sample") > 2), scores), told))
    )
    assert "3 samples that the metric's filter ignores are not counted." in text
    assert "This metric counts padding as codes" in text


def test_failures_and_an_evaluation_that_is_not_complete() -> None:
    frames = drawn({"same": 0.0, "random": 0.0}, samples=12, patients=6)
    failures = pl.LazyFrame({"sample": [30, 31], "error": ["ValueError: no"] * 2})
    text = text_of(render(None, None, of(frames, failures=failures)))
    assert "2 samples could not be evaluated" in text
    assert "ValueError: no: 2 samples, first 30" in text
    assert "This evaluation is not complete." in text_of(render(None, None, of(frames, complete=False)))


@pytest.fixture
def attributed(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", [Record(f"p{i}", {"drugs": [("a", 0.6), ("b", 0.4)]}) for i in range(4)])


def test_on_the_page_of_the_attributions(attributed: Path, found: CohortFaithfulness) -> None:
    cohort = CohortAttributions(attributed)
    told = manifest(found.methods)
    told["identity"]["model"]["fingerprint"] = cohort.manifest["identity"]["model"]["fingerprint"]
    told["identity"]["dataset"]["fingerprint"] = cohort.manifest["identity"]["dataset"]["fingerprint"]
    frames = drawn({"good": 0.1, "random": 0.0}, samples=12, patients=6)
    page = render(cohort, None, of(frames, told))
    check(page)
    assert re.findall(r'<section id="(\w+)"', page) == ["summary", "faithfulness", "codes", "places", "patients", "run"]
    assert '<a href="#faithfulness">' in page
    assert "other samples" not in text_of(page)
    told["identity"]["dataset"]["fingerprint"] = "another"
    assert "The evaluation is of other samples than the attributions" in text_of(render(cohort, None, of(frames, told)))
    told["identity"]["model"]["fingerprint"] = "another"
    with pytest.raises(ValueError, match="evaluation must be of the model whose attributions the report is of"):
        render(cohort, None, of(frames, told))
    assert 'id="faithfulness"' not in render(cohort)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `rollout.evaluate_cohort` leaves it, by PyHealth's metric."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    evaluate_toy(out, 40, metric="pyhealth", threshold=0.5, leave_one_out=12)
    return out


def test_a_folder_as_it_is_written(evaluated: Path, attributed: Path, tmp_path: Path) -> None:
    assert is_evaluation(evaluated)
    assert not is_evaluation(attributed)
    assert not is_evaluation(tmp_path / "none")
    found, rows = open_faithfulness(evaluated), table(evaluated)
    assert (found.samples, found.methods) == (40, ["rollout", "random"])
    drops = rows.filter((pl.col("method") == "rollout") & (pl.col("direction") == "only"))["drop"].cast(pl.Float64)
    own = found.summary().filter((pl.col("method") == "rollout") & (pl.col("measure") == "sufficiency"))
    assert own["mean"][0] == pytest.approx(drops.mean())
    page = write_report(evaluated, tmp_path / "alone.html").read_text(encoding="utf-8")
    check(page)
    text = text_of(page)
    assert "This metric counts padding as codes" in text
    assert re.search("threshold 0.5, seed 0, leave one out 12 ?Batches", text)  # no word of what was not planted
    assert re.search(r"collate [\d.e-]+ s; attribute [\d.e-]+ s; predict [\d.e-]+ s; write", text)
    for given in ({"patient": "p0"}, {"names": {}}, {"evaluation": evaluated}):
        with pytest.raises(ValueError, match="must be the folder of attributions where patient, names or evaluation"):
            write_report(evaluated, **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be the folder of an evaluation"):
        write_report(attributed, evaluation=attributed)
    damaged = next((evaluated / "faithfulness").glob("*.parquet"))
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-9] + b"x" * 9)
    try:
        with pytest.raises(ValueError, match=damaged.name):
            write_report(evaluated, tmp_path / "damaged.html")
    finally:
        damaged.write_bytes(content)
    assert not (tmp_path / "damaged.html").exists()


def test_both_folders_from_the_command_line(evaluated: Path, tmp_path: Path) -> None:
    attribute(tmp_path / "run", 40)
    out = str(tmp_path / "both.html")
    arguments = ["report", str(tmp_path / "run"), "--evaluation", str(evaluated), "--output", out]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.output.strip() == out
    page = Path(out).read_text(encoding="utf-8")
    check(page)
    assert re.findall(r'<section id="(summary|faithfulness|codes)"', page) == ["summary", "faithfulness", "codes"]
    assert "other samples" not in text_of(page)


def test_a_line_and_a_forest_by_hand() -> None:
    line = Line([0.0, 50.0], [0.8, 0.4], [0.7, None], [0.9, None], "m0", "one")
    chart = str(line_chart("title", [line], Axes("x", "y", 0.0, 50.0, zero=False)))
    assert "band" not in chart  # of one point
    (x1, y1), (x2, y2) = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)]
    assert (x1, x2) == (46.0, 392.0)
    assert 10 <= y1 < y2 <= 170
    flat = str(line_chart("t", [Line([1.0], [0.5], [0.5], [0.5], "m0", "n")], Axes("x", "y", 1.0, 1.0, zero=False)))
    assert "nan" not in flat
    forest = str(forest_chart("<t>", [Row("<m>"), Row("x" * 60, "m1", -0.1, -0.2, 0.0), Row("none", "m2")], "<n>"))
    assert "<m>" not in forest
    assert "&lt;m&gt;" in forest
    assert forest.count("<circle") == 1
    assert "x" * 21 not in forest
    empty = str(forest_chart("t", [Row("m"), Row("none", "m2")], "n"))
    assert "nan" not in empty


def test_numbers_in_words() -> None:
    assert [decimal(v) for v in (0.12345, -0.5, None, float("nan"))] == ["0.123", "−0.500", "–", "–"]
    assert [signed(v) for v in (0.12345, -0.5, 0.0, -0.0001, 0.0001)] == ["+0.123", "−0.500", "0.000", "0.000", "0.000"]
    assert [small(v) for v in (0.0001, 0.05, 1.0, None)] == ["<0.001", "0.050", "1.000", "–"]
