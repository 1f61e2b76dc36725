"""Folders as an attacker would send them: each gives one page that does nothing but show text, or one clear refusal."""

import html.parser
import re
from pathlib import Path

import pytest

from rollout.report import write_report
from tests.support.hostile_runs import CANARY, write_hostile_run

PARTS, SEEDS = 8, 40
"""Parts, the first of which always runs, and the folders in each."""
TAGS = re.compile(
    "html|head|meta|link|title|style|body|header|nav|main|section|article|footer|h[1-4]|p|b|i|a|small|span|code|pre|bdi|"
    "dl|dt|dd|ul|ol|li|div|figure|figcaption|svg|rect|path|circle|text|table|thead|tbody|tr|th|td|details|summary|"
    "input|label"
)
ATTRIBUTES = re.compile(
    "lang|charset|name|content|http-equiv|rel|href|class|id|type|checked|for|scope|role|aria-label|title|style|viewbox|"
    "x|y|width|height|d|cx|cy|r|text-anchor|transform"
)
SPOKEN = frozenset({"title", "aria-label"})
"""Attributes that hold text of the data."""
HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
LARGEST = 4_000_000


class Page(html.parser.HTMLParser):
    """Refuses whatever a page of ours does not have."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.open: list[str] = []
        self.style = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert TAGS.fullmatch(tag), tag
        self.counts[tag] = self.counts.get(tag, 0) + 1
        for name, value in attrs:
            assert ATTRIBUTES.fullmatch(name), (tag, name)
            assert name in SPOKEN or CANARY not in (value or ""), (tag, name, value)
            if name == "href":
                assert value == "data:," or re.fullmatch(r"#[a-z]+", value or ""), value
            if name == "style":
                assert re.fullmatch(r"width:\d+(\.\d+)?%", value or ""), value
        if tag not in ("meta", "link", "input", "rect", "path", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            self.style += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data[:80]}")

    def handle_pi(self, data: str) -> None:
        raise AssertionError(f"an instruction: {data[:80]}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data[:80]}")

    def handle_decl(self, decl: str) -> None:
        assert decl == "doctype html"


def check(page: str) -> None:
    assert len(page) < LARGEST
    assert not HIDDEN.search(page)
    parsed = Page(page)
    assert all(parsed.counts[tag] == 1 for tag in ("html", "head", "body", "style", "h1", "main", "footer"))
    assert CANARY not in parsed.style
    assert not re.search(r"url\(|@import|expression|//", parsed.style)
    assert "nan" not in re.findall(r'(?: [xyd]|c[xy]|width|height)="([^"]*)"', page)
    assert not re.search(r'(?: [xyd]|c[xyr]|width|height)="[^"]*(?:nan|inf)', page)


def end(root: Path, seed: int) -> str:
    """Report on the folder of a seed; `page` or `refused`."""
    hostile = write_hostile_run(root, seed)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    written, said = None, "a page"
    try:
        written = write_report(hostile.folder, patient=hostile.patient, names=hostile.names)
    except ValueError as error:
        said = str(error)
    assert re.fullmatch(r".{6,1000}", said)
    assert not HIDDEN.search(said)
    if written is not None:
        assert written.parent == hostile.folder
        check(written.read_text(encoding="utf-8"))
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path != written} == before
    return "refused" if written is None else "page"


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, PARTS))])
@pytest.mark.filterwarnings("ignore:the run in .* is not complete")
def test_a_hostile_folder_gives_an_inert_page_or_one_clear_line(tmp_path: Path, part: int) -> None:
    ends = []
    for seed in range(part * SEEDS, (part + 1) * SEEDS):
        try:
            ends.append(end(tmp_path / str(seed), seed))
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    assert ends.count("page") >= SEEDS // 3
    assert ends.count("refused") >= SEEDS // 8
