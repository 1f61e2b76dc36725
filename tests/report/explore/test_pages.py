"""The pages: what they say against the frames, hostile strings, what is refused and how, and who may ask."""

import csv
import io
import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import polars as pl
import pytest
from starlette.testclient import TestClient

from rollout.report.explore.app import Explorer, code_link
from rollout.report.explore.export import as_csv
from rollout.report.explore.record import compare_records, with_places
from rollout.results.attributions import CohortAttributions
from tests.support.explored import FORMULA, NAMES, RECORDS, TOKEN, client_of, explorer_of, written
from tests.support.hostile_runs import write_hostile_run
from tests.support.inert import check_served
from tests.support.pages import Parsed, text_of
from tests.support.toy_cohort import NASTY, attribute
from tests.support.written_run import Record

PAGES = ("", "codes", "code?feature=drugs&code=d1", "record?sample=1", "?patient=p1&label=1")
FILES = ("samples.csv", "code.csv?feature=drugs&code=d1", "record.csv?sample=1", "record.png?sample=1", "style.css")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def client(folder: Path) -> TestClient:
    return client_of(explorer_of(folder))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "toy"
    attribute(folder)
    return folder


@pytest.fixture(scope="module")
def toy_explorer(toy: Path) -> Explorer:
    return explorer_of(toy)


def table(client: TestClient, path: str) -> list[list[str]]:
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    check_served(answer.text)
    return [[" ".join(cell.split()) for cell in row] for row in Parsed(answer.text).rows][1:]


def cells(client: TestClient, path: str) -> list[dict[str, str]]:
    answer = client.get(path)
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    return list(csv.DictReader(io.StringIO(answer.text)))


def links(client: TestClient, path: str, to: str) -> list[str]:
    return [
        a["href"] or ""
        for tag, a in Parsed(client.get(path).text).tags
        if tag == "a" and (a["href"] or "").startswith(to)
    ]


def test_the_list_says_what_the_cohort_has(client: TestClient) -> None:
    assert table(client, "") == [
        ["p0sample 0, visit v0", "95.0 %", "1", "3"],
        ["p1sample 1", "20.0 %", "0", "7"],
        ["p1sample 2", "50.0 %", "1", "3"],
        ["p10sample 3", "70.0 %", "0", "1"],
        ["@SUM(1)sample 4", "10.0 %", "none", "2"],
    ]
    assert "5 samples of 4 patients" in text_of(client.get("").text)


def test_a_search_is_kept_in_its_form_and_its_links(client: TestClient) -> None:
    page = client.get("?code=metformin&label=1&sort=prediction&order=desc").text
    assert [row[0] for row in table(client, "?code=metformin&label=1&sort=prediction&order=desc")] == [
        "p0sample 0, visit v0",
        "p1sample 2",
    ]
    filled = {a["name"]: a["value"] for tag, a in Parsed(page).tags if tag == "input" and a["value"]}
    assert filled == {"code": "metformin", "label": "1"}
    (taken,) = [a["href"] for tag, a in Parsed(page).tags if "download" in a]
    assert parse_qs(urlsplit(taken or "").query) == {
        "code": ["metformin"], "label": ["1"], "sort": ["prediction"], "order": ["desc"],
    }  # fmt: skip
    assert "Having the code: d1 Metformin" in text_of(page)
    assert "No code is so called" in text_of(client.get("?code=zzz").text)


def test_codes_and_a_codes_patients(client: TestClient) -> None:
    assert table(client, "codes?q=d")[0] == ["d1 Metformin", "drugs", "3"]
    assert ["N18 Kidney disease", "visits", "1"] in table(client, "codes?q=KIDNEY")
    assert [row[0] for row in table(client, "codes?feature=visits")] == [
        "I10 Hypertension",
        "E11",
        "N18 Kidney disease",
    ]
    assert table(client, "code?feature=drugs&code=d1") == [
        ["p0sample 0; first at 1 days", "40.0 %", "1.33×", "95.0 %", "1"],
        ["p1sample 1; first at 6.5 days", "60.0 %", "1.00×", "20.0 %", "0"],
        ["p1sample 2; first at 0 days", "30.0 %", "0.67×", "50.0 %", "1"],
    ]
    text = text_of(client.get("code?feature=drugs&code=d1").text)
    assert "in 3 samples, 60.0 % of all" in text
    assert "With label 1: 66.7 % of the samples that have it, 50.0 % of all samples." in text
    assert ["p10sample 3", "where the model reads", "–", "70.0 %", "0"] in table(client, "code?feature=visits&code=I10")


def test_a_record_has_its_times_on_the_axis(client: TestClient) -> None:
    """p1's drugs at 0 and 6.5 days, its visits, which have no times, at their places; each mark in its colour."""
    page = client.get("record?sample=1").text
    check_served(page)
    wide = re.findall(r'<div class="is-wide">(.*?)</div>', page, re.S)
    assert len(wide) == 2
    marks = [re.findall(r'class="mark (\w+)" x="(\d+)".*?<title>(.*?)</title>', chart) for chart in wide]
    assert [(style, int(x)) for style, x, _ in marks[0]] == [("read", 6), ("l2", 942)]
    assert marks[0][1][2] == "d1 Metformin: position 1, time 6.5 days, relevance 60.0 %, lift 1.00×"
    assert [(style, int(x)) for style, x, _ in marks[1]] == [
        ("read", 6), ("read", 6), ("l2", 478), ("l2", 478), ("l1", 942),
    ]  # fmt: skip
    assert "time (days)" in wide[0]
    assert "place in the record" in wide[1]
    assert set(links(client, "record?sample=1", "code?")) == {
        f"code?feature={f}&code={c}"
        for f, c in (("drugs", "read"), ("drugs", "d1"), ("visits", "I10"), ("visits", "E11"), ("visits", "N18"))
    }
    assert client.get(links(client, "record?sample=1", "./?patient")[0]).text.count("record?sample=") == 2


def test_the_tables_taken_away_are_the_frames_with_no_formula_in_them(client: TestClient) -> None:
    found = cells(client, "samples.csv?sort=prediction")
    assert [row["patient_id"] for row in found] == ["'@SUM(1)", "p1", "p1", "p10", "p0"]
    assert [float(row["prediction"]) for row in found] == pytest.approx([0.1, 0.2, 0.5, 0.7, 0.95])
    record = cells(client, "record.csv?sample=4")
    assert [row["code"] for row in record] == ["d3", f"'{FORMULA}"]
    assert [float(row["attribution"]) for row in record] == [0.5, 0.5]
    assert [row["model_reads"] for row in record] == ["true", "false"]
    assert cells(client, "record.csv?sample=2")[1]["name"] == "'-insulin"
    assert [row["sample"] for row in cells(client, "code.csv?feature=drugs&code=d1")] == ["0", "1", "2"]
    assert client.get("record.csv?sample=4").headers["content-disposition"] == 'attachment; filename="record-4.csv"'


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\t", "\r", "\n", "＝"])
def test_what_a_spreadsheet_would_run_is_text(begin: str) -> None:
    frame = pl.DataFrame(
        {"code": [f"{begin}1+1", f"a{begin}", "", None, f'{begin}"x",2'], "value": [-1.5, 2.0, None, -0.0, 3e9]}
    )
    found = list(csv.reader(io.StringIO(as_csv(frame).decode(), newline="")))
    assert [row[0] for row in found[1:]] == [f"'{begin}1+1", f"a{begin}", "", "", f'\'{begin}"x",2']
    assert [float(row[1]) if row[1] else None for row in found[1:]] == [-1.5, 2.0, None, 0.0, 3e9]


def test_lists_of_labels_are_one_cell() -> None:
    assert as_csv(pl.DataFrame({"label": [[0, 2], [], None]})) == b'label\n0;2\n""\n\n'


def test_the_picture_is_a_png(client: TestClient) -> None:
    answer = client.get("record.png?sample=1")
    assert answer.headers["content-type"] == "image/png"
    assert answer.content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(answer.content) > 10_000


def test_two_runs_of_a_record(tmp_path: Path, folder: Path) -> None:
    changed = list(RECORDS)
    changed[2] = Record("p1", {"drugs": [("d1", 0.1), ("d2", 0.2), ("d1", 0.7)]}, (0.8,), (1.0,))
    explorer = explorer_of(folder, written(tmp_path / "second", changed))
    client = client_of(explorer)
    assert table(client, "?label=1")[1] == ["p1sample 2", "50.0 %", "80.0 %+0.300", "1", "3"]
    page = text_of(client.get("record?sample=2").text)
    assert page.index("predicted50.0 %") < page.index("predicted80.0 %") < page.index("Where the two differ")
    assert table(client, "record?sample=2")[-2:] == [
        ["d1drugs, place 2", "0.67×", "1.56×"],
        ["d2drugs, place 1", "1.33×", "0.44×"],
    ]
    frames = [with_places(one, one.rows_of([2])) for one in explorer.cohorts]
    found = compare_records(*frames)
    assert (found["in_all"], found["apart"]) == (2, 0)
    assert found["features"] == [{"name": "drugs", "places": 2, "correlation": None}]
    same = compare_records(frames[0], frames[0])
    assert (same["entries"], same["in_all"]) == ([], 0)
    with_other = compare_records(frames[0], with_places(explorer.cohort, explorer.cohort.rows_of([1])))
    assert with_other["apart"] == 9  # of 3 and 6 entries; I10 twice in a visit is one


def test_the_order_of_two_runs_is_spearmans() -> None:
    def frame(lifts: list[float]) -> pl.DataFrame:
        return pl.DataFrame({"feature": "f", "place": range(5), "code": list("abcde"), "lift": lifts})

    found = compare_records(frame([1.0, 2.0, 3.0, 4.0, 5.0]), frame([2.0, 1.0, 3.0, 5.0, 40.0]))
    assert found["features"][0]["correlation"] == pytest.approx(1 - 6 * 2 / (5 * 24))
    assert [row["code"] for row in found["entries"]] == ["e", "a", "b", "d"]


def test_each_run_is_told_in_its_own_unit(tmp_path: Path, folder: Path) -> None:
    """Beside a run in percent stands one whose relevance is none: it does not sum to 1."""
    other = written(tmp_path / "chefer", method={"renormalize": False})
    page = text_of(client_of(explorer_of(folder, other)).get("record?sample=0").text)
    assert page.count("d1 40.0 %") == page.count("d1 0.4") == 1


@pytest.mark.parametrize("path", PAGES + FILES)
def test_only_the_token_is_let_in(client: TestClient, path: str) -> None:
    for start in ("", "wrong/", f"{TOKEN}x/", f"{TOKEN[:-1]}/", f"{TOKEN.upper()}/", "é/", f"x/../{TOKEN}0/"):
        answer = client.get(f"http://127.0.0.1/{start}{path}", follow_redirects=False)
        assert answer.status_code == 403, start
        assert answer.text == "403: the address must be the one that rollout explore printed\n"
        assert TOKEN not in answer.text + str(answer.headers)
    assert client.get(path).status_code == 200
    assert client.get(path, headers={"cookie": "token=x"}).status_code == 200


def test_only_this_machine_by_name_only_to_read(client: TestClient) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.evil.example:8000"):
        assert client.get("", headers={"host": host}).status_code == 403
    for host in ("127.0.0.1:8000", "localhost", "localhost:1"):
        assert client.get("", headers={"host": host}).status_code == 200
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        answer = client.request(method, "samples.csv")
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert client.head("").status_code == 200
    answer = client.get(f"http://127.0.0.1/{TOKEN}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, f"/{TOKEN}/")


@pytest.mark.parametrize("path", [*PAGES, *FILES, "nothing", "?label=x"])
def test_every_answer_forbids_scripts_caches_and_referrers(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert not {"script-src", "connect-src", "frame-src", "object-src"} & set(policy)
    assert policy["style-src"] == policy["form-action"] == "'self'"
    assert policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("?label=x", 400, "label: input should be a valid integer, unable to parse string as an integer, got 'x'"),
        ("?frobnicate=1", 400, "frobnicate is no parameter of this page"),
        ("codes?q=1&q=2", 400, "q must be given once, got it 2 times"),
        ("code?code=d1", 400, "feature must be given"),
        ("code?feature=drugs&code=nope", 400, "code: drugs has no 'nope' in this cohort"),
        ("code?feature=drugs&code=", 400, "code: drugs has no '' in this cohort"),
        ("record", 400, "sample must be given"),
        ("record?sample=<script>", 400, "got '<script>'"),
        ("record.png?sample=-1", 400, "sample: input should be greater than or equal to 0"),
        ("record?sample=5", 404, "no attributed sample has the number 5"),
        ("record.csv?sample=99999999999999", 404, "no attributed sample has the number 99999999999999"),
        ("../../etc/passwd", 403, ""),
        ("%2e%2e/manifest.json", 404, "Not Found"),
        ("manifest.json", 404, "Not Found"),
    ],
)
def test_what_is_refused_is_one_clear_message(client: TestClient, path: str, status: int, said: str) -> None:
    answer = client.get(path)
    assert answer.status_code == status
    if status != 403:
        check_served(answer.text)
        assert said in text_of(answer.text)
        assert "Traceback" not in answer.text


def test_a_file_damaged_meanwhile_is_told(tmp_path: Path) -> None:
    folder = written(tmp_path)
    client = client_of(explorer_of(folder))
    path = folder / "attributions" / "part-00000.parquet"
    path.write_bytes(bytes(len(path.read_bytes())))
    answer = client.get("record?sample=1")
    assert answer.status_code == 500
    check_served(answer.text)
    assert "does not hold the bytes that were written" in text_of(answer.text)
    assert client.get("record?sample=4").status_code == 200


def test_hostile_ids_and_codes_of_the_toy_cohort(toy_explorer: Explorer) -> None:
    """Each is text on the pages, and found again by the links made of it."""
    client = client_of(toy_explorer)
    seen = set()
    for page in (1, 2):
        answer = client.get(f"?page={page}")
        check_served(answer.text)
        seen |= set(re.findall(r"record\?sample=(\d+)", answer.text))
    assert len(seen) == 90
    for number in range(7):  # p0 <script>…, p0 line\nbreak, p1 …
        answer = client.get(f"record?sample={number}")
        check_served(answer.text)
        (mine,) = links(client, f"record?sample={number}", "./?patient=")
        assert f"record?sample={number}" in client.get(mine).text
    found = links(client, "codes", "code?")
    assert {parse_qs(urlsplit(link).query, keep_blank_values=True)["code"][0] for link in found} >= set(NASTY)
    for link in found:
        assert table(client, link)


@pytest.mark.filterwarnings("ignore:the run in .* is not complete")
def test_hostile_folders_give_inert_pages_or_one_clear_line(tmp_path: Path) -> None:
    pages = 0
    for seed in range(24):
        hostile = write_hostile_run(tmp_path / str(seed), seed)
        try:
            explorer = explorer_of(hostile.folder)
        except ValueError:
            continue
        client, before = client_of(explorer), {p: p.stat().st_mtime_ns for p in hostile.folder.rglob("*")}
        codes = explorer.index.codes.select("feature", "code").rows()
        for path in ("", "codes", *(f"record?sample={n}" for n in explorer.index.samples["sample"])):
            answer = client.get(path)
            assert answer.status_code == 200, (seed, path, text_of(answer.text))
            check_served(answer.text)
        for feature, code in codes[:6]:
            link = code_link(feature, code)
            answer = client.get(link or "codes")
            assert (link is None) == (max(len(feature), len(code)) > 1000)
            assert answer.status_code == 200, (seed, text_of(answer.text))
            check_served(answer.text)
        assert {p: p.stat().st_mtime_ns for p in hostile.folder.rglob("*")} == before
        pages += 1
    assert pages >= 8


def test_names_of_codes_come_from_the_folder_and_from_a_file(tmp_path: Path) -> None:
    folder = written(tmp_path / "run")
    names = {"drugs": {"d1": "Metformin <b>850</b>"}}
    client = client_of(Explorer(CohortAttributions(folder, names)))
    assert "d1 Metformin <b>850</b>" in text_of(client.get("codes").text)
    assert NAMES["visits"]["I10"] in text_of(client.get("codes").text)
