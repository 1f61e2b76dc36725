"""What a notebook shows: the numbers of the objects, of bounded size, and nothing that acts, whatever the strings."""

import html.parser
import re
from pathlib import Path

import pytest
import torch

import rollout
from rollout.results.attributions import CohortAttributions
from rollout.results.comparison import compare_cohorts
from rollout.results.faithfulness import CohortFaithfulness
from rollout.results.notebook import SAMPLES, Bar, show_record, table
from tests.support.evaluations import drawn
from tests.support.hostile_runs import CANARY, PAYLOADS
from tests.support.inert import HIDDEN
from tests.support.written_run import Record, Run, write_run

STYLE = re.compile(
    r"text-align:left;vertical-align:top;padding:0 0\.8em 0 0(;min-width:8em)?|"
    r"background:#[0-9a-f]{6};height:0\.5em;width:\d+\.\d%"
)


class Shown(html.parser.HTMLParser):
    """Refuses whatever a notebook's table does not have; keeps its cells, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.lines: list[str] = []
        self.widths: list[str] = []
        assert not HIDDEN.search(text)
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("table", "thead", "tbody", "tr", "th", "td", "p", "bdi", "div"), tag
        for name, value in attrs:
            assert name == "style"
            assert STYLE.fullmatch(value or ""), value
            self.widths += re.findall(r"width:(\d.*)%", value or "")
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "p":
            self.lines.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        assert self.open[-1] == "bdi", data
        if "table" in self.open:
            self.rows[-1][-1] += data
        else:
            self.lines[-1] += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    unknown_decl = handle_decl = handle_pi = handle_comment


TIMED, NESTED = [("a", 0.5, 1.5), ("b", -0.25, 2.5)], [(["x", "y"], 0.75), (["x"], 0.25)]
RECORDS = [
    Record("p0", {"drugs": TIMED, "visits": NESTED}, (0.9,)),
    Record("p1", {"drugs": [("b", 0.6, 3.0), ("a", 0.4, 4.0)]}, (0.2,)),
]


@pytest.fixture
def cohort(tmp_path: Path) -> CohortAttributions:
    run = Run(names={"drugs": {"a": "Aspirin"}}, model="m.Other")
    return CohortAttributions(write_run(tmp_path, RECORDS, run))


def test_a_cohort_says_what_was_run_and_its_leading_codes(cohort: CohortAttributions) -> None:
    shown = Shown(cohort._repr_html_())
    facts = {row[0]: row[1] for row in shown.rows if len(row) == 2}
    assert facts["model"] == "m.Other"
    assert facts["samples"] == "2 of 2"
    assert (facts["method"], facts["status"], facts["dataset"]) == ("rollout", "complete", "demo, mortality")
    codes = {(row[0], row[1]): row[2:] for row in shown.rows if len(row) == 5}
    table = cohort.top_codes(by="lift", minimum_records=1)
    assert len(codes) == 1 + table.height
    for row in table.iter_rows(named=True):
        wanted = [row["name"] or "", f"{row['lift']:.3g}", f"{row['records']}"]
        assert codes[row["feature"], row["code"]] == wanted


def test_a_large_or_damaged_cohort_says_so_at_once(cohort: CohortAttributions, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("rollout.results.notebook.MOST_ROWS", 3)
        assert f"{cohort.rows:,} rows; the leading codes: top_codes()" in Shown(cohort._repr_html_()).lines
    path = next((cohort.path / "attributions").glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    again = CohortAttributions(cohort.path)
    assert any("does not hold the bytes" in line for line in Shown(again._repr_html_()).lines)


def test_records_in_order_with_bars(cohort: CohortAttributions) -> None:
    shown = Shown(show_record(cohort.patient("p0"), cohort.names)._repr_html_())
    assert shown.lines == ["Sample 0, patient p0, prediction 0.9, truth 0", "drugs", "visits"]
    assert shown.rows == [
        ["position", "time", "code", "relevance"], ["0", "1.5", "a Aspirin", "0.5"], ["1", "2.5", "b", "-0.25"],
        ["visit", "code", "relevance"], ["0", "x; y", "0.75"], ["1", "x", "0.25"],
    ]  # fmt: skip
    assert shown.widths == ["100.0", "50.0", "100.0", "33.3"]
    assert repr(show_record(cohort.sample(1))) == repr(cohort.sample(1))
    with pytest.raises(ValueError, match=r"show_record: rows must have the columns .*, got none called \['code'\]"):
        rollout.show_record(cohort.sample(1).drop("code"))


def test_what_is_long_is_cut_and_told(tmp_path: Path) -> None:
    many = {f"f{i}": [("a", 1.0)] for i in range(9)} | {"f0": [(f"c{i}", 0.01) for i in range(120)]}
    many["f1"] = [([f"c{i}" for i in range(30)], 1.0)]
    cohort = CohortAttributions(write_run(tmp_path, [Record("p0", many)] * 8))
    text = show_record(cohort.patient("p0"))._repr_html_()
    lines = Shown(text).lines
    assert lines.count("20 more places") == lines.count("1 more features") == SAMPLES
    assert "2 more samples" in lines
    assert len(text) < 400_000
    assert "1 more features" in Shown(cohort._repr_html_()).lines[-1]


def test_hostile_strings_are_text(tmp_path: Path) -> None:
    runs = []
    for name in "ab":
        (tmp_path / name).mkdir()
        features = {"f" + text[:100]: [(code, 1.0) for code in PAYLOADS] for text in PAYLOADS[:5]}
        names = {feature: dict(zip(PAYLOADS, PAYLOADS[::-1], strict=True)) for feature in features}
        records = [Record(f"p{n}{text}", features) for n, text in enumerate(PAYLOADS[:6])]
        run = Run(names=names, dataset=PAYLOADS[0], task=PAYLOADS[1], model="m." + PAYLOADS[4])
        runs.append(CohortAttributions(write_run(tmp_path / name, records, run)))
    shown = [runs[0], show_record(runs[0].sample(3), runs[0].names), compare_cohorts(*runs)]
    for one in shown:
        text = one._repr_html_()
        assert len(text) < 1_000_000
        assert any(CANARY in cell for row in Shown(text).rows for cell in row)


def test_a_comparison_and_an_evaluation_show_their_numbers(tmp_path: Path) -> None:
    runs = []
    for name, shift in (("a", 0.0), ("b", 0.25)):
        (tmp_path / name).mkdir()
        drugs = [("x", 0.5 + shift), ("y", 0.5 - shift)]
        records = [Record(f"p{n}", {"drugs": drugs}, (0.25 + shift,)) for n in range(6)]
        runs.append(CohortAttributions(write_run(tmp_path / name, records, Run(model="m.Other"))))
    shown = Shown(compare_cohorts(*runs)._repr_html_())
    cells = {(row[0], row[2]): row[4:7] for row in shown.rows}
    assert cells["lift", "x"] == ["1", "1.5", "0.5 [0.5, 0.5]"]
    assert cells["probability", ""] == ["0.25", "0.5", "0.25 [0.25, 0.25]"]
    found = CohortFaithfulness(*drawn({"rollout": 0.1, "random": 0.0}, 40, 10))
    shown = Shown(found._repr_html_())
    assert shown.rows[0] == ["method", *found.measures]
    for row in found.summary().iter_rows(named=True):
        cell = next(one for one in shown.rows if one[0] == row["method"])[1 + found.measures.index(row["measure"])]
        assert cell == f"{row['mean']:.3g} [{row['low']:.3g}, {row['high']:.3g}]"


def test_an_attention_shows_its_shapes() -> None:
    record = rollout.Record(queries=torch.ones(2, 4, 8, 16), keys=torch.ones(2, 2, 8, 16).bfloat16(), causal=True)
    cells = dict(Shown(record._repr_html_()).rows[1:])
    assert cells["queries"] == "float32 [2, 4, 8, 16], cpu"
    assert cells["keys"] == "bfloat16 [2, 2, 8, 16], cpu"
    assert list(cells) == ["queries", "keys", "causal"]
    assert cells["causal"] == "True"


def test_a_bar_stays_within_its_cell() -> None:
    assert Shown(table(["a"], [[Bar(3.0, "3")], [Bar(-0.5, "x")], [Bar(0.0, "")]])).widths == ["100.0", "50.0", "0.0"]
