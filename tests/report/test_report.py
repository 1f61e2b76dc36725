"""The report: its numbers against the frames, its strings against the data, and the page in a real browser."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import polars as pl
import pytest

from rollout.report import scale, text, write_report
from rollout.report.charts import Axes, Bars, bar_chart, ticks
from rollout.report.page import render
from rollout.report.sections.run import formula
from rollout.report.sections.summary import summary
from rollout.results.attributions import CohortAttributions
from tests.support.pages import Parsed, text_of
from tests.support.written_run import HOSTILE, NASTY, Record, Run, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VISITS = [(["I10", "E11", "I10"], 0.5), (["N18"], 0.3), (["I10"], 0.2)]


def records() -> list[Record]:
    """24 binary samples of 12 patients with a flat, a nested and two timed features; nasty ids, codes and labels."""
    found = []
    for i in range(24):
        patient = NASTY[i // 2] if i // 2 < 6 else f"p{i // 2}"
        drugs = [("read", 0.4), ("d1", 0.3), (NASTY[i % 7], 0.2), (f"d{i % 3 + 2}", 0.1)]
        features = {"drugs": drugs, "visits": VISITS[: 1 + i % 3]}
        if i % 2:
            features["labs"] = [(None, 0.25, 1.5), (None, 0.75, 30.0)]  # type: ignore[list-item]
            features[HOSTILE] = [("t1", 0.9, 2.0), ("t2", 0.07, 4.0), ("t3", 0.03, 5.0)]  # type: ignore[list-item]
        found.append(Record(patient, features, ((i + 0.5) / 24,), (float(i % 3 == 0),), f"v{i}{NASTY[i % 6]}"))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = {"drugs": {"d1": "Metformin <b>500</b>", NASTY[0]: NASTY[1]}, "visits": {"I10": "Hypertension"}}
    run = Run(status="complete with failures", failures={5: f"ValueError: {HOSTILE}"}, names=names, dataset=HOSTILE,
              notes=[f"note {HOSTILE}", "halved: 3"])  # fmt: skip
    return write_run(tmp_path_factory.mktemp("run") / "run", records(), run, part_samples=7)


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def cells(page: str) -> list[list[str]]:
    return [[" ".join(cell.split()) for cell in row] for row in Parsed(page).rows]


def test_the_page_needs_no_network_and_no_script(page: str) -> None:
    tags = Parsed(page).tags
    assert {"script", "img", "iframe", "object", "embed", "video", "form"} & {tag for tag, _ in tags} == set()
    links = [a[key] for _, a in tags for key in ("href", "src", "srcset", "action", "data", "poster") if key in a]
    assert links
    assert all(link == "data:," or (link or "").startswith("#") for link in links)
    assert not [name for _, a in tags for name in a if name.startswith("on")]
    style = re.search(r"<style>(.*?)</style>", page, re.S)
    assert style
    assert not re.search(r"url\(|@import|https?:", style.group(1))
    policy = next(a for tag, a in tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_hostile_strings_are_text_and_nothing_else(page: str) -> None:
    parsed = Parsed(page)
    shown = "".join(parsed.text)
    for string in NASTY:
        assert string in shown
    assert f"ValueError: {HOSTILE}" in shown
    assert f"note {HOSTILE}" in shown
    assert "Metformin <b>500</b>" in shown
    assert len(re.findall(r"<style|</style", page)) == 2
    assert page.count("<!doctype html>") == page.count("</html>") == 1


def test_code_tables_are_those_of_the_frames(folder: Path, page: str) -> None:
    cohort, found = CohortAttributions(folder), cells(page)
    table = cohort.top_codes(by="lift", minimum_records=5, k=15)
    assert table.height > 5
    for row in table.rows(named=True):
        name = f"{row['code'] or 'empty string'} {row['name'] or ''}".strip()
        expected = [name, f"{row['lift']:.2f}×", f"{100 * row['relevance']:.1f} %", f"{100 * row['prevalence']:.1f} %",
                    str(row["records"])]  # fmt: skip
        assert [" ".join(cell.split()) for cell in expected] in found
    assert "of those in 5 records or more" in " ".join("".join(Parsed(page).text).split())


def test_summary_numbers(folder: Path, page: str) -> None:
    cohort = CohortAttributions(folder)
    facts = summary(cohort)
    assert (facts["samples"], facts["patients"], facts["labelled"]) == (23, 12, 23)
    assert facts["rows"] == cohort.attributions.collect().height
    assert {row["label"]: row["samples"] for row in facts["labels"]} == {0: 15, 1: 8}
    lengths = {row["feature"]: row for row in facts["lengths"]}
    assert lengths["drugs"]["quantiles"] == (4, 4, 4)
    assert lengths["visits"]["quantiles"] == (4, 5, 5)
    assert lengths["visits"]["visits"] == (2, 3, 3)
    assert lengths["labs"]["records"] == 11
    assert facts["failures"]["reasons"] == [{"error": f"ValueError: {HOSTILE}", "samples": 1, "example": 5}]
    assert ["0", "15", "65.2 %"] in cells(page)
    assert ["1", "8", "34.8 %"] in cells(page)


def test_the_histogram_counts_every_sample(folder: Path, page: str) -> None:
    chart = re.search(r"<svg[^>]*Histogram of the predicted probability, 23 samples.*?</svg>", page, re.S)
    assert chart
    bars = re.findall(r'<rect class="(series\d)".*?height="([\d.]+)"', chart.group(0))
    heights = {name: sum(float(h) for n, h in bars if n == name) for name in ("series0", "series1")}
    assert heights["series1"] / heights["series0"] == pytest.approx(8 / 15, rel=1e-3)


def test_the_record_stands_in_order_with_its_shares(folder: Path, page: str) -> None:
    panels = re.findall(r'<article class="panel">(.*?)</article>', page, re.S)
    assert len(panels) == 6
    panel = next(p for p in panels if "sample 21:" in p)  # the highest prediction with label 1
    assert "highest prediction with label 1" in panel
    chips = re.findall(r'<li class="chip (\w+)".*?<bdi class="data">(.*?)</bdi> <small>(.*?)</small>', panel, re.S)
    # places 1 to 3 share .6: lifts 1.5, 1 and 0.5
    assert [(level, code, share) for level, code, share in chips if code in ("read", "d1", "d2")] == [
        ("read", "read", "40.0 %"), ("l2", "d1", "30.0 %"), ("l1", "d2", "10.0 %")]  # fmt: skip
    assert "Not drawn: the place the model reads, with 90.0 %." in panel
    shown = " ".join("".join(Parsed(panel).text).split())
    assert re.search(r"predicted ?89\.6 % ?truth ?label 1", shown)


def test_entries_in_time_are_drawn_at_their_time(page: str) -> None:
    chart = re.search(r"<svg[^>]*relevance over time, 2 of 2 entries.*?</svg>", page, re.S)
    assert chart
    stems = re.findall(r'<circle class="(l\d)" cx="([\d.]+)" cy="([\d.]+)"', chart.group(0))
    (near, x1, y1), (far, x2, y2) = [(name, float(x), float(y)) for name, x, y in stems]
    assert (near, far) == ("l2", "l1")  # 7 % and 3 %: 1.4 and 0.6 of the 5 % each would have
    assert x1 < x2
    assert (170 - y2) / (170 - y1) == pytest.approx(3 / 7, abs=0.01)


def test_a_patient_asked_for(folder: Path, tmp_path: Path) -> None:
    path = write_report(folder, patient="p8")
    assert path == folder / "report-p8.html"
    page = path.read_text(encoding="utf-8")
    assert page.count('<article class="panel">') == 2
    assert "Shown: 2 of the 2 samples of this patient." in " ".join(page.split())
    assert "codes and positions of the whole cohort are in the report" in page  # no pass over every row for one patient
    assert 'id="codes"' not in page
    nasty = write_report(folder, patient=NASTY[1])
    assert nasty.parent == folder
    assert re.fullmatch(r"report-[A-Za-z0-9_-]+\.[0-9a-f]{12}\.html", nasty.name)
    output = tmp_path / "none.html"
    with pytest.raises(ValueError, match="no attributed sample is of patient 'nobody'"):
        write_report(folder, output, patient="nobody")
    assert not output.exists()


def test_no_two_patients_share_a_file(tmp_path: Path) -> None:
    ids = ["7/1", "7:1", "7_1", "7?1", "é", "è", "", "_", "x" * 70, "x" * 71, "7-1"]
    folder = write_run(tmp_path, [Record(one, {"f": [("a", 0.5), ("b", 0.5)]}) for one in ids])
    pages = {one: write_report(folder, patient=one) for one in ids}
    assert len(set(pages.values())) == len(ids)
    assert [pages[one].name for one in ("7_1", "7-1")] == ["report-7_1.html", "report-7-1.html"]
    for one in ids[:4]:
        assert f"patient {one}" in text_of(pages[one].read_text(encoding="utf-8")).replace("Patient", "patient")


def test_both_titles_of_an_ambiguous_code_are_seen(tmp_path: Path) -> None:
    named = f"either ICD-9 diagnosis “{'long ' * 16}” or ICD-9 procedure “{'stent ' * 12}”"
    found = [Record(f"p{i}", {"icd_codes": [(["5187"], 0.5), (["I10"], 0.5)], "f": [("5187", 0.5), ("b", 0.5)]})
             for i in range(8)]  # fmt: skip
    names = {feature: {"5187": named} for feature in ("icd_codes", "f")}
    page = render(CohortAttributions(write_run(tmp_path, found, Run(names=names))))
    assert page.count("or ICD-9 procedure “stent") > 5
    assert page.count("or ICD-9 procedure “stent") == page.count("either ICD-9 diagnosis “long")
    assert "The features are measurements" not in page


def test_labels_have_their_names_and_times_their_unit(tmp_path: Path) -> None:
    timed, visits = [(None, 0.5, 1.0), (None, 0.2, 2.0), (None, 0.3, 4.0)], [(["I10"], 0.5, 2.0), (["N18"], 0.5, 3.0)]
    found = [Record(f"p{i}", {"labs": timed, "visits": visits}, (0.5,), (float(i % 2),)) for i in range(8)]
    run = Run(
        labels={"mortality": ["survived", "died <b>"]}, time={"labs": "hours <i>", "visits": "hours since admission"}
    )
    page = render(CohortAttributions(write_run(tmp_path, found, run)))
    assert ["1 died <b>", "4", "50.0 %"] in cells(page)
    assert "label 0 survived" in text_of(page)
    assert "time (hours &lt;i&gt;)" in page
    assert "time 2 hours since admission" in text_of(page)
    plain = Run(labels={"mortality": ["0", "1"]})
    page = render(CohortAttributions(write_run(tmp_path / "plain", found, plain)))
    assert ["1", "4", "50.0 %"] in cells(page)
    assert "time (in the unit of the data)" in page


def test_names_given_go_first(folder: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"drugs": {"d1": "Another & name"}}), encoding="utf-8")
    page = write_report(folder, tmp_path / "out.html", names=names).read_text(encoding="utf-8")
    assert "Another &amp; name" in page
    assert "Metformin" not in page


def test_written_whole_or_not_at_all(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = write_report(folder, tmp_path / "report.html")
    earlier = output.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match="No space left on device"):
        write_report(folder, output)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert output.read_bytes() == earlier


def test_only_a_report_is_replaced(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "thesis.html"
    output.write_text("<!doctype html><p>Years of work")
    with pytest.raises(ValueError, match=r"output must be a new file or an earlier report, got .*thesis\.html"):
        write_report(folder, output)
    assert output.read_text() == "<!doctype html><p>Years of work"
    written = write_report(folder, output, overwrite=True).read_bytes()
    assert b"Years" not in written
    output.write_bytes(written[:5000])
    assert write_report(folder, output).read_bytes() == written


@pytest.mark.parametrize("content", ["", "<!doctype html><title>Attention rollout: mine</title>", "\0" * 9000])
def test_a_file_that_is_no_report_is_not_replaced(folder: Path, tmp_path: Path, content: str) -> None:
    output = tmp_path / "thesis.html"
    output.write_text(content)
    with pytest.raises(
        ValueError, match=r"must be a new file or an earlier report, got .*thesis\.html, which is neither"
    ):
        write_report(folder, output)
    assert output.read_text() == content
    linked = tmp_path / "linked.html"
    linked.symlink_to(output)
    with pytest.raises(ValueError, match=r"linked\.html, which is neither"):
        write_report(folder, linked)
    page = write_report(folder, output, overwrite=True).read_bytes()
    assert page == write_report(folder, output).read_bytes()  # an earlier report is
    assert linked.is_symlink()


def test_bad_paths_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        write_report(tmp_path / "none")
    with pytest.raises(ValueError, match="got the folder"):
        write_report(folder, tmp_path)
    with pytest.raises(ValueError, match="in a folder that exists"):
        write_report(folder, tmp_path / "no" / "report.html")


def test_a_running_run_says_so(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    write_run(tmp_path, records(), Run(status="running"), part_samples=7)
    (tmp_path / "parts" / "part-00003.json").unlink()
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "This run is not complete." in page
    assert "21 of 24 samples are in this page" in page
    assert not recwarn.list
    for part in (tmp_path / "parts").iterdir():
        part.unlink()
    assert "0 of 24 samples" in write_report(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("prob", "truths", "words"),
    [
        ((0.2, 0.5, 0.3), [(1.0,), (0.0,), (2.0,)], ["class 1 with 50.0 %", "class predicted right", "class 0"]),
        ((0.9, 0.6, 0.1), [(1.0, 0.0, 1.0), (0.0, 0.0, 0.0)], ["2 of 3 labels at 0.5", "labels 0, 2", "no label"]),
        ((3.25,), [(1.5,), (7.25,)], ["predicted value", "3.25", "measured values"]),
        ((0.25,), [None], ["The samples have no labels.", "not known", "predicted probability"]),
        ((), [(1.0,), (0.0,)], ["no prediction kept", "label 1"]),
    ],
)
def test_every_kind_of_label(tmp_path: Path, prob: tuple, truths: list, words: list[str]) -> None:
    drugs = [("a", 0.5), ("b", 0.3), ("c", 0.2)]
    found = [Record(f"p{i}", {"f": drugs}, prob, truths[i % len(truths)]) for i in range(12)]
    write_run(tmp_path, found, Run(model="mine.Encoder"))
    shown = " ".join("".join(Parsed(write_report(tmp_path).read_text(encoding="utf-8")).text).split())
    for word in words:
        assert word in shown
    assert "place the model reads" not in shown


def test_the_page_stays_small(tmp_path: Path) -> None:
    long = "x" * 400
    features = {f"f{k}{long}": [(f"c{i % 300}{long}", 0.01) for i in range(600)] for k in range(15)}
    features["v"] = [([f"c{i}" for i in range(90)], 0.01) for _ in range(50)]  # type: ignore[misc]
    found = [Record(f"p{i}{long}", features, (0.1,), (float(i % 2),), long) for i in range(8)]
    write_run(tmp_path, found, Run(failures={0: long}, status="complete with failures", notes=[long] * 50))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert len(page) < 3_500_000
    shown = " ".join("".join(Parsed(page).text).split())
    for words in ("the first 12 of 16 features", "the first 150 of 600 entries", "Shown: 12 of 50"):
        assert words in shown
    assert "x" * 301 not in shown.split("The manifest")[0]


def test_formula_in_words() -> None:
    assert formula({"head_fusion": "mean", "residual": 0.5, "attention": None, "renormalize": True}) == [
        "F(l) = mean over heads of the attention A(l)", "M(l) = 0.5 · I + 0.5 · F(l)",
        "each row of M(l) divided by its sum", "R = M(L) · … · M(1); the row that the model reads",
    ]  # fmt: skip
    assert formula({"residual": 1.0, "attention": 1.0, "renormalize": False, "gradients": "clamp_then_fuse"})[:2] == [
        "F(l) = mean over heads of max(A(l) ∘ ∇A(l), 0)", "M(l) = I + F(l)"]  # fmt: skip
    discard = formula({"head_fusion": "max", "discard_ratio": 0.9, "start_layer": 2})
    assert discard[1] == "the lowest 90% of the entries of F(l) set to 0"
    assert discard[-1].startswith("R = M(L) · … · M(3)")
    summed = formula({"residual": 1.0, "attention": 1.0, "renormalize": True, "values": "norm_then_sum"})
    assert summed[:3] == [
        "F(l) = sum over heads of the lengths of the attention A(l) × W_O · v of each key",
        "M(l) = ‖x(l)‖ on the diagonal + F(l); x(l): what the residual adds", "each row of M(l) divided by its sum",
    ]  # fmt: skip
    mixed = formula({"residual": 0.5, "attention": 1.0, "renormalize": True, "values": "sum_then_norm"})
    assert mixed[1] == "M(l) = ‖f(l) + 0.5 · x(l) on the diagonal‖; x(l): what the residual adds"
    assert formula({"residual": 0.5, "normalize_attention": True, "gradients": "clamp_then_fuse"})[:3] == [
        "F(l) = mean over heads of max(A(l) ∘ ∇A(l), 0)", "each row of F(l) divided by its sum",
        "M(l) = 0.5 · I + 0.5 · F(l)",
    ]  # fmt: skip
    assert not any("keeps for itself" in line for line in summed + mixed)
    assert formula({"renormalize": True, "own_path": False})[-1].startswith("without what the row keeps for itself")
    assert formula({}) == []


def test_numbers_in_words() -> None:
    assert [text.percent(v) for v in (0, 0.00001, 0.1234, 0.99999, 1.0, None)] == [
        "0.0 %", "<0.1 %", "12.3 %", ">99.9 %", "100.0 %", "–"]  # fmt: skip
    assert [text.times(v) for v in (1.234, 12.34, None)] == ["1.23×", "12.3×", "–"]
    assert [text.seconds(v) for v in (0.1234, 90, 600, 9000, "x")] == ["0.123 s", "90 s", "10.0 min", "2.5 h", "–"]
    assert [text.size(v) for v in (5 << 20, 3 << 30, None)] == ["5 MiB", "3.0 GiB", "–"]
    assert text.shown("a\x00\x1b\nb") == "a␀␛\nb"
    assert text.shown("y" * 300) == "y" * 159 + "…"
    assert text.moment("2026-01-01T10:00:00+00:00") == "2026-01-01 10:00 UTC"
    assert text.moment("yesterday") == "yesterday"


def test_charts_are_to_scale_and_escaped() -> None:
    axes = Axes(x="<x>", y="a & b", start=0, stop=3, line=1.0, whole=True)
    chart = str(bar_chart('"t"', [Bars([1, 2, 0, 4], "series0", "n")], axes))
    heights = [float(h) for h in re.findall(r'<rect class="series0".*?height="([\d.]+)"', chart)]
    assert heights == pytest.approx([heights[2] / 4, heights[2] / 2, heights[2]], abs=0.02)
    assert "&lt;x&gt;" in chart
    assert "a &amp; b" in chart
    assert 'aria-label="&#34;t&#34;"' in chart
    assert ticks(0, 0.9, 4) == [0, 0.5, 1.0]
    assert ticks(0, 37, 4) == [0, 10, 20, 30, 40]


def test_every_colour_has_contrast_and_an_order() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    steps = [luminance(colour) for colour in scale.COLOURS]
    assert steps == sorted(steps, reverse=True)
    for colour, ink in zip(scale.COLOURS, scale.INKS, strict=True):
        low, high = sorted((luminance(colour), luminance(ink)))
        assert (high + 0.05) / (low + 0.05) >= 4.5
    assert [scale.level(v) for v in (0.0, 0.49, 0.5, 1.0, 3.9, 4.0, 99)] == [0, 0, 1, 2, 3, 4, 4]


PROBE = """<script>
const root = document.documentElement;
const seen = [...document.querySelectorAll("body *")].filter(e => e.getClientRects().length);
const out = seen.filter(e => e.getBoundingClientRect().right > root.clientWidth + 0.5);
const panel = () => [...document.querySelectorAll(".panel")].findIndex(e => getComputedStyle(e).display != "none");
const first = panel();
document.querySelectorAll(".tablist label")[2].click();
parent.document.documentElement.setAttribute("data-found", JSON.stringify({
  width: root.clientWidth, scroll: root.scrollWidth, out: out.map(e => e.outerHTML.slice(0, 80)), first, then: panel(),
  fetched: performance.getEntriesByType("resource").length, text: document.body.textContent,
}));
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(page: str, tmp_path: Path, width: int) -> None:
    """In a frame of that width: no element beyond it, nothing fetched, patients selectable, every string as it was."""
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', page)
    assert policy
    probed = html.escape(page.replace(policy.group(0), "").replace("</body>", PROBE + "</body>"))
    frame = tmp_path / "frame.html"
    frame.write_text(f'<meta charset="utf-8"><iframe width="{width}" height="900" srcdoc="{probed}"></iframe>', "utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(next(a["data-found"] for tag, a in Parsed(done.stdout).tags if tag == "html") or "")
    shown = found.pop("text")
    assert found == {"width": width, "scroll": width, "out": [], "first": 0, "then": 2, "fetched": 0}
    for string in NASTY:
        assert string in shown
    assert "Codes that draw the most relevance" in shown


def test_rendering_is_the_same_every_time(folder: Path) -> None:
    cohort = CohortAttributions(folder)
    assert render(cohort) == render(cohort)
    assert isinstance(cohort.predictions, pl.LazyFrame)


def test_what_would_turn_text_round_is_seen() -> None:
    assert text.shown("a\u202eb\u2066\x9b\ufeff") == "a[U+202E]b[U+2066][U+009B][U+FEFF]"
    assert text.shown("א ب e\u0301 👩\u200d⚕") == "א ب e\u0301 👩\u200d⚕"


def test_numbers_that_are_none() -> None:
    for form in (text.count, text.percent, text.times, text.number, text.seconds, text.size, text.chance):
        assert [form(v) for v in (None, float("nan"), float("inf"), 10**400, "x", True, [])] == [text.DASH] * 7
    assert (text.percent(-0.25), text.percent(-0.0001), text.times(-12.34)) == ("-25.0 %", ">−0.1 %", "-12.3×")
    assert (text.count(1e30), text.percent(1e20), text.times(1e20)) == ("1e+30", "1e+22 %", "1e+20×")
    assert [text.width(v) for v in (-1.0, 0.25, 7.0)] == ["0.0%", "25.0%", "100.0%"]
    assert (text.chance(0.25), text.chance(1.5)) == ("25.0 %", "1.5")
