"""A report's page taken apart: its tags, its text, its tables and its pictures."""

import html.parser
import re


class Parsed(html.parser.HTMLParser):
    """Tags with their attributes, the text, and the rows of the tables as texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self.inside:
            return
        self.text.append(data)
        if "td" in self.inside or "th" in self.inside:
            self.rows[-1][-1] += data


def text_of(page: str) -> str:
    """The text of a page, its white space made one."""
    return " ".join("".join(Parsed(page).text).split())


def figure_of(page: str, named: str) -> str:
    """The picture whose name has these words, with its caption and notes."""
    found = re.search(rf'<svg[^>]*aria-label="[^"]*{named}.*?</svg>.*?</figure>', page, re.S)
    assert found, named
    return found.group(0)
