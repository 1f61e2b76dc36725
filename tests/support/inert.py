"""A page that does nothing but show text: what it may have, and the check that it has nothing else."""

import html.parser
import re

from tests.support.hostile_runs import CANARY

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
LINKS = re.compile(r"data:,|#[a-z]+")
HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
LARGEST = 4_000_000


class Page(html.parser.HTMLParser):
    """Refuses whatever a page of ours does not have."""

    tags, attributes, spoken, links = TAGS, ATTRIBUTES, SPOKEN, LINKS

    def __init__(self, page: str) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.open: list[str] = []
        self.style = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert self.tags.fullmatch(tag), tag
        self.counts[tag] = self.counts.get(tag, 0) + 1
        for name, value in attrs:
            assert self.attributes.fullmatch(name), (tag, name)
            assert name in self.spoken or CANARY not in (value or ""), (tag, name, value)
            if name in ("href", "action"):
                assert self.links.fullmatch(value or ""), value
            if name == "style":
                assert re.fullmatch(r"width:\d+(\.\d+)?%", value or ""), value
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

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


class ServedPage(Page):
    """The same of a page that a server of ours answers with: it has forms, and links to pages of the same."""

    tags = re.compile(f"{TAGS.pattern}|form|fieldset|legend|button|select|option")
    attributes = re.compile(
        f"{ATTRIBUTES.pattern}|action|method|value|min|step|maxlength|placeholder|selected|download"
    )
    spoken = SPOKEN | {"value", "href"}
    links = re.compile(
        r"data:,|style\.css|\./|codes|code|(\./|codes|code|record|(samples|code|record)\.(csv|png))?\?[\w%+.~&=-]*"
    )


def check_served(page: str) -> None:
    """The check of an answer."""
    assert len(page) < LARGEST
    assert not HIDDEN.search(page)
    parsed = ServedPage(page)
    assert all(parsed.counts[tag] == 1 for tag in ("html", "head", "body", "h1", "main", "footer"))
    assert "style" not in parsed.counts
    assert not re.search(r'(?: [xyd]|c[xyr]|width|height)="[^"]*(?:nan|inf)', page)


def check(page: str) -> None:
    """The check of a file."""
    assert len(page) < LARGEST
    assert not HIDDEN.search(page)
    parsed = Page(page)
    assert all(parsed.counts[tag] == 1 for tag in ("html", "head", "body", "style", "h1", "main", "footer"))
    assert CANARY not in parsed.style
    assert not re.search(r"url\(|@import|expression|//", parsed.style)
    assert "nan" not in re.findall(r'(?: [xyd]|c[xy]|width|height)="([^"]*)"', page)
    assert not re.search(r'(?: [xyd]|c[xyr]|width|height)="[^"]*(?:nan|inf)', page)
