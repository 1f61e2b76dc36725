"""The pages in a real browser, at the width of a phone and of a desk: clicked through, nothing beyond the edge."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from rollout.report.explore.server import listen
from tests.support.explored import TOKEN, explorer_of, written
from tests.support.toy_cohort import attribute

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect  # asks again until the next page is there
expect.set_options(timeout=30_000)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
WIDTHS = (390, 1280)
OUT = """() => {
  const wide = document.documentElement.clientWidth;
  const seen = [...document.querySelectorAll("body *")].filter(e => e.getClientRects().length);
  const out = seen.filter(e => e.getBoundingClientRect().right > wide + 0.5 && !e.closest("svg"));
  return [document.documentElement.scrollWidth - wide, out.map(e => e.outerHTML.slice(0, 80))];
}"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("runs")
    attribute(root / "toy")
    return root / "toy", written(root / "hand")


@pytest.fixture(scope="module")
def addresses(folders: tuple[Path, Path]) -> Iterator[dict[str, str]]:
    """The toy cohort beside itself, and the one written by hand, each with a server of its own."""
    toy, hand = folders
    found, servers = {}, []
    for name, explorer in (("toy", explorer_of(toy, toy)), ("hand", explorer_of(hand))):
        listener = listen(0)
        server = uvicorn.Server(uvicorn.Config(explorer.app(TOKEN), log_level="error", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        servers.append((server, thread, listener))
        found[name] = f"http://127.0.0.1:{listener.getsockname()[1]}/{TOKEN}/"
    yield found
    for server, thread, listener in servers:
        server.should_exit = True
        thread.join(10)
        listener.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(params=WIDTHS)
def page(request: pytest.FixtureRequest, browser: Any) -> Iterator[Any]:
    """A page of that width; whatever its console says, and every request that leaves this machine, fails the test."""
    context = browser.new_context(viewport={"width": request.param, "height": 900}, accept_downloads=True)
    opened, said = context.new_page(), []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
    opened.on("request", lambda sent: said.append(sent.url) if "//127.0.0.1:" not in sent.url[:20] else None)
    yield opened
    context.close()
    assert [line for line in said if line != "data:,"] == []


def fits(page: Any) -> None:
    page.wait_for_load_state("load")  # with its style sheet
    assert page.evaluate(OUT) == [0, []], page.url


def test_from_a_search_to_a_record_to_a_codes_patients(page: Any, addresses: dict[str, str]) -> None:
    page.goto(addresses["hand"])
    fits(page)
    expect(page.locator("tbody tr")).to_have_count(5)
    page.get_by_label("code", exact=True).fill("Metformin")
    page.get_by_label("order by").select_option("prediction")
    page.get_by_label("direction").select_option("desc")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("tbody td a")).to_have_text(["p0", "p1", "p1"])
    fits(page)
    page.locator("tbody td a").nth(2).click()
    expect(page.locator("h1")).to_have_text("Patient p1")
    fits(page)
    shown = [chart for chart in page.locator(".lanes svg").all() if chart.is_visible()]
    assert len(shown) == 2  # by time and by place, in one of the two widths
    assert shown[0].locator("rect").count() == 2
    assert "time (days)" in shown[0].inner_html()
    box = shown[0].bounding_box()
    assert box
    assert box["width"] > 0.85 * page.viewport_size["width"] - 180
    page.locator(".chips a", has_text="d1").first.click()
    expect(page.locator("h1")).to_have_text("d1")
    expect(page.locator("tbody tr")).to_have_count(3)
    fits(page)
    page.get_by_role("link", name="relevance", exact=True).click()
    expect(page.locator("tbody td a")).to_have_text(["p1", "p0", "p1"])
    page.get_by_role("link", name="low first").click()
    expect(page.locator("tbody td:nth-child(2)")).to_have_text(["30.0 %", "40.0 %", "60.0 %"])
    page.get_by_role("link", name="Codes").click()
    page.get_by_label("code", exact=True).fill("kidney")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("tbody td a")).to_have_text(["N18"])
    fits(page)
    page.get_by_role("link", name="Patients").click()
    page.get_by_label("label", exact=True).fill("1")
    page.get_by_role("button", name="Search").press("Enter")
    expect(page.locator("tbody tr")).to_have_count(2)
    page.get_by_role("link", name="Clear").click()
    expect(page.locator("tbody tr")).to_have_count(5)


def test_downloads(page: Any, addresses: dict[str, str], tmp_path: Path) -> None:
    page.goto(addresses["hand"] + "record?sample=4")
    for name, begin in (("CSV", b"sample,patient_id"), ("PNG", b"\x89PNG")):
        with page.expect_download() as started:
            page.get_by_role("link", name=name).click()
        started.value.save_as(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begin)
    assert b"'=cmd|" in (tmp_path / "CSV").read_bytes()


def test_pages_of_a_list_and_two_runs_of_hostile_records(page: Any, addresses: dict[str, str]) -> None:
    page.goto(addresses["toy"])
    fits(page)
    first = page.locator("tbody td a").all_inner_texts()
    page.get_by_role("link", name="next →").first.click()
    expect(page.locator(".pager").first).to_contain_text("51–90 of 90 samples")
    fits(page)
    assert len(first + page.locator("tbody td a").all_inner_texts()) == 90
    for number in (0, 1, 3, 21):
        page.goto(addresses["toy"] + f"record?sample={number}")
        fits(page)
        two = [article.bounding_box() for article in page.locator("article").all()]
        assert (two[0]["y"] == two[1]["y"]) == (page.viewport_size["width"] == 1280)  # beside, or below each other
        assert page.get_by_text("No entry has another lift in the other run.").is_visible()


def test_a_wrong_question_is_a_clear_page(browser: Any, addresses: dict[str, str]) -> None:
    opened = browser.new_page(viewport={"width": 390, "height": 800})
    answer = opened.goto(addresses["hand"] + "?label=<b>x</b>")
    assert answer.status == 400
    assert "got '<b>x</b>'" in opened.locator(".message").inner_text()
    fits(opened)
    opened.get_by_role("link", name="All patients").click()
    expect(opened.locator("tbody tr")).to_have_count(5)
    opened.close()
