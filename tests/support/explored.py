"""Cohorts whose every answer is known, and the pages of them asked without a server."""

from pathlib import Path

from starlette.testclient import TestClient

from rollout.report.explore.app import Explorer
from rollout.results.attributions import CohortAttributions
from tests.support.written_run import Record, Run, write_run

TOKEN = "the-token"
FORMULA = "=cmd|'/c calc'!A1"
VISITS = [(["I10", "E11"], 0.5), (["I10", "I10"], 0.3), (["N18"], 0.2)]
RECORDS = [
    Record("p0", {"drugs": [("read", 0.4, 0.0), ("d1", 0.4, 1.0), ("d2", 0.2, 2.0)]}, (0.95,), (1.0,), "v0"),
    Record("p1", {"drugs": [("read", 0.4, 0.0), ("d1", 0.6, 6.5)], "visits": VISITS}, (0.2,), (0.0,)),
    Record("p1", {"drugs": [("d1", 0.1, 0.0), ("d2", 0.6, 3.0), ("d1", 0.3, 9.0)]}, (0.5,), (1.0,)),
    Record("p10", {"visits": [(["I10"], 1.0)]}, (0.7,), (0.0,)),
    Record("@SUM(1)", {"drugs": [("d3", 0.5, 0.0), (FORMULA, 0.5, 1.0)]}, (0.1,), None),
]  # fmt: skip
NAMES = {"drugs": {"d1": "Metformin", "d2": "-insulin"}, "visits": {"I10": "Hypertension", "N18": "Kidney disease"}}


def written(folder: Path, records: list[Record] = RECORDS, **facts: object) -> Path:
    """The folder of `RECORDS`, or of others; the model reads place 0."""
    return write_run(folder, records, Run(**{"names": NAMES, "time": {"drugs": "days"}, **facts}), part_samples=2)  # type: ignore[arg-type]


def explorer_of(folder: Path, beside: Path | None = None) -> Explorer:
    """The pages of a folder."""
    return Explorer(CohortAttributions(folder), None if beside is None else CohortAttributions(beside))


def client_of(explorer: Explorer) -> TestClient:
    """Asks for pages by their names."""
    return TestClient(explorer.app(TOKEN), base_url=f"http://127.0.0.1/{TOKEN}/", raise_server_exceptions=True)
