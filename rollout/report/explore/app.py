"""The pages and what they are asked by: every answer is made on the server, of the index and of the parts on disk."""

from typing import Any
from urllib.parse import urlencode

import polars as pl
from markupsafe import Markup
from polars.exceptions import PolarsError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from rollout.report import scale
from rollout.report.environment import environment
from rollout.report.explore.export import as_csv, record_png, record_table
from rollout.report.explore.guard import Guard
from rollout.report.explore.index import build_index, put_beside
from rollout.report.explore.record import compare_records, show_record, with_places
from rollout.report.explore.search import (
    LONGEST,
    BadQuestionError,
    CodeSearch,
    OneCode,
    OneSample,
    Question,
    Search,
    Searcher,
    page_of,
)
from rollout.report.sections.run import run
from rollout.report.text import in_percent, shown
from rollout.results.attributions import CohortAttributions

CODES_MEANT = 12
"""Codes that a search means, named on its page."""


class Explorer:
    """The pages of one cohort, or of two runs of it.

    Args:
        cohort: The run.
        beside: Another run of the same samples.

    Raises:
        ValueError: If a run does not hold what was written, or `beside` is of other samples.
    """

    def __init__(self, cohort: CohortAttributions, beside: CohortAttributions | None = None) -> None:
        self.cohort, self.cohorts = cohort, [cohort] if beside is None else [cohort, beside]
        index = build_index(cohort)
        samples = index.samples if beside is None else put_beside(index, beside)
        self.called = _called(self.cohorts)
        self.searcher = Searcher(cohort, index, samples)
        self.index = index
        self.templates = environment(in_percent(cohort.manifest))
        self.facts = {
            "run": run(cohort),
            "beside": None if beside is None else self.called[1],
            "kind": index.kind,
            "several": index.several,
            "label_names": _label_names(cohort),
            "samples_in_all": index.samples.height,
            "patients_in_all": index.samples["patient_id"].n_unique(),
            "features": [one for one in self.searcher.features if one and one.isprintable()],  # a form sends no others
            "code_link": code_link,
            "read_position": cohort.read_position,
            "legend": scale.legend(),
        }

    def app(self, token: str) -> Guard:
        """The application; it answers under `/token/` only."""
        pages = {
            "/": self.samples, "/codes": self.codes, "/code": self.code, "/record": self.record,
            "/samples.csv": self.samples_csv, "/code.csv": self.code_csv, "/record.csv": self.record_csv,
            "/record.png": self.record_png, "/style.css": self.style,
        }  # fmt: skip
        routes = [Route(path, page, methods=["GET"]) for path, page in pages.items()]
        failures = (ValueError, PolarsError, OSError, ImportError, MemoryError)
        handlers: dict[Any, Any] = {
            BadQuestionError: lambda request, error: self._message(400, "This cannot be asked", error),
            HTTPException: lambda request, error: self._message(
                error.status_code, "There is no such page", error.detail
            ),
            **{kind: lambda request, error: self._message(500, "This cannot be shown", error) for kind in failures},
        }
        return Guard(Starlette(routes=routes, exception_handlers=handlers), token)

    def samples(self, request: Request) -> Response:
        """The samples that answer a search."""
        asked = _asked(Search, request)
        rows, place = page_of(self.searcher.find(asked), asked.page)
        meant = None if asked.code is None else self.searcher.codes(asked.code, asked.feature)
        codes = (
            {} if meant is None else {"meant": meant.head(CODES_MEANT).rows(named=True), "meant_in_all": meant.height}
        )
        return self._page("samples", asked, rows=rows.rows(named=True), place=place, **codes)

    def samples_csv(self, request: Request) -> Response:
        """All of them as CSV."""
        found = self.searcher.find(_asked(Search, request))
        return _download(as_csv(found.drop("predicted") if not self.index.several else found), "samples.csv")

    def codes(self, request: Request) -> Response:
        """The codes of the cohort that have a text in them."""
        asked = _asked(CodeSearch, request)
        rows, place = page_of(self.searcher.codes(asked.q, asked.feature), asked.page)
        return self._page("codes", asked, rows=rows.rows(named=True), place=place)

    def code(self, request: Request) -> Response:
        """The samples that have a code."""
        asked = _asked(OneCode, request, keep_empty=True)
        found = self.searcher.samples_of(asked)
        rows, place = page_of(found, asked.page)
        name = self.cohort.names.get(asked.feature, {}).get(asked.code)
        return self._page(
            "code",
            asked,
            rows=rows.rows(named=True),
            place=place,
            name=name,
            unit=self.cohort.time_units.get(asked.feature),
            timed=found["time"].is_not_null().any(),
            nested=self.cohort.granularity.get(asked.feature) == "visit",
            ones=self._ones(found) if self.index.kind == "binary" else None,
        )

    def code_csv(self, request: Request) -> Response:
        """All of them as CSV."""
        found = self.searcher.samples_of(_asked(OneCode, request, keep_empty=True))
        return _download(as_csv(found), "code.csv")

    def _ones(self, found: pl.DataFrame) -> dict[str, float | None]:
        """The share of label 1 among the samples that have the code, and among all."""
        return {"having": _mean(found["label"]), "all": _mean(self.index.samples["label"])}

    def record(self, request: Request) -> Response:
        """One sample, or one sample of both runs."""
        asked = _asked(OneSample, request)
        known = self._known(asked.sample)
        runs, placed = [], []
        for cohort, called in zip(self.cohorts, self.called, strict=True):
            rows = cohort.rows_of([asked.sample])
            entries = None
            if not rows.is_empty():
                placed.append(with_places(cohort, rows))
                entries = _entries(cohort, asked.sample, rows)
            runs.append({"folder": called, "run": run(cohort), "shown": entries})
        compared = compare_records(*placed) if len(placed) == 2 else None
        return self._page("record", asked, known=known, runs=runs, compared=compared)

    def record_csv(self, request: Request) -> Response:
        """Every entry of one sample as CSV."""
        sample = self._known(_asked(OneSample, request).sample)["sample"]
        table = record_table(self.cohort, self.cohort.rows_of([sample]))
        return _download(as_csv(table), f"record-{sample}.csv")

    def record_png(self, request: Request) -> Response:
        """The picture of one sample."""
        sample = self._known(_asked(OneSample, request).sample)["sample"]
        picture = record_png(self.cohort, sample)
        return Response(picture, media_type="image/png", headers=_named(f"record-{sample}.png"))

    def style(self, request: Request) -> Response:
        """The style sheet."""
        text = self.templates.get_template("explore/style.css").render(
            colours=list(zip(scale.COLOURS, scale.INKS, strict=True))
        )
        return Response(text, media_type="text/css")

    def _known(self, sample: int) -> dict[str, Any]:
        found = self.searcher.samples.filter(pl.col("sample") == sample)
        if found.is_empty():
            raise HTTPException(404, f"no attributed sample has the number {sample}")
        return found.row(0, named=True)

    def _page(self, template: str, asked: Question, **facts: Any) -> HTMLResponse:
        context = {**self.facts, **facts, "asked": asked, "link": lambda **changes: _link(asked, changes)}
        return _html(self.templates.get_template(f"explore/{template}.html").render(**context))

    def _message(self, status: int, title: str, what: Any) -> HTMLResponse:
        said = shown(" ".join(str(what).split()) or type(what).__name__, 1000)
        page = self.templates.get_template("explore/message.html")
        return _html(page.render(**self.facts, title=title, said=said), status)


def _called(cohorts: list[CohortAttributions]) -> list[str]:
    """The names of the folders, with those of the folders they are in where they are one name."""
    paths = [cohort.path.absolute() for cohort in cohorts]
    alike = len({path.name for path in paths}) < len(paths)
    return ["/".join(path.parts[-2:]) if alike else path.name for path in paths]


def _entries(cohort: CohortAttributions, sample: int, rows: pl.DataFrame) -> Markup:
    """A record, its relevance in percent or not as its own run has it."""
    page = environment(in_percent(cohort.manifest)).get_template("explore/entries.html")
    return Markup(page.render(sample=show_record(cohort, sample, rows), code_link=code_link))


def code_link(feature: str, code: str | None) -> str | None:
    """The address of a code's page; None for what is no code, or longer than an address may be."""
    if code is None or max(len(feature), len(code)) > LONGEST:
        return None
    return f"code?{urlencode({'feature': feature, 'code': code})}"


def _link(asked: Question, changes: dict[str, Any]) -> str:
    """The query of what was asked, changed."""
    return f"?{urlencode({**asked.without_page(), **changes})}"


def _asked[Q: Question](kind: type[Q], request: Request, keep_empty: bool = False) -> Q:
    return kind.of(request.query_params.multi_items(), keep_empty)


def _label_names(cohort: CohortAttributions) -> list[str | None]:
    """The names of the labels by number; of several outputs, the labels are not known to be one's."""
    vocabularies = list(cohort.label_names.values())
    return vocabularies[0] if len(vocabularies) == 1 else []


def _mean(labels: pl.Series) -> float | None:
    found = labels.mean()
    return float(found) if isinstance(found, int | float) else None


def _html(page: str, status: int = 200) -> HTMLResponse:
    return HTMLResponse(page.encode("utf-8", "replace"), status)


def _download(content: bytes, name: str) -> Response:
    return Response(content, media_type="text/csv; charset=utf-8", headers=_named(name))


def _named(name: str) -> dict[str, str]:
    return {"content-disposition": f'attachment; filename="{name}"'}
