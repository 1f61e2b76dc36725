"""The page: its sections put into the templates, and written whole or not at all."""

import os
import re
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from polars.exceptions import PolarsError

from rollout.files import usable_path, write_whole
from rollout.report import scale
from rollout.report.sections.codes import codes
from rollout.report.sections.patients import patients
from rollout.report.sections.places import places
from rollout.report.sections.run import run
from rollout.report.sections.summary import summary
from rollout.report.text import FILTERS, in_percent, number, percent, shown
from rollout.results.attributions import CohortAttributions

MARK = b'<meta name="generator" content="attention-rollout report">'
"""By this a report of ours is known, which another may replace."""
HEAD = 4096
MESSAGE = 1000


def write_report(
    path: str | Path,
    output: str | Path | None = None,
    patient: str | None = None,
    names: str | Path | Mapping[str, Mapping[str, str]] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write the report of a cohort run as one self-contained HTML file.

    The page needs no network and no script. Its size is bounded however large the cohort is, and it says what it leaves
    out. It holds patient ids and codes of the samples it shows: it is as confidential as the data.

    Args:
        path: Folder of the run (`out` of `attribute_cohort`); one that is not complete can be reported on.
        output: File to write; None: `report.html` in the folder, or `report-<patient>.html` for a patient. An earlier
            report is replaced.
        patient: Show this patient's samples rather than a choice; the tables of the cohort's codes and positions, which
            take a pass over every row, are then left out.
        names: Names of codes, `{feature: {code: name}}` or a JSON file of them, before those of the folder.
        overwrite: Replace `output` also if it is no report.

    Returns:
        The file.

    Raises:
        ValueError: If the folder is no sound run, holds numbers that are none, no attributed sample is of the patient,
            or the file cannot be written or is something else than a report.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is not complete.*")
            cohort = CohortAttributions(path, names)
        target = _target(cohort.path, output, patient, overwrite)
        text = render(cohort, patient)
    except RecursionError:
        raise ValueError(f"{path}: what its JSON files say is nested too deep for a report") from None
    except (ValueError, PolarsError) as error:  # what it quotes may be of any length, and on any number of lines
        raise ValueError(shown(" ".join(str(error).split()), MESSAGE)) from error
    try:
        return write_whole(target, text.encode("utf-8", "replace"))
    except OSError as error:
        raise ValueError(f"output must be a file that can be written, got {target}: {error.strerror}") from error


def render(cohort: CohortAttributions, patient: str | None = None) -> str:
    """The page as a string."""
    samples = patients(cohort, patient)  # first: it refuses an unknown patient
    return _environment(in_percent(cohort.manifest)).get_template("page.html").render(
        run=run(cohort),
        summary=summary(cohort),
        codes=codes(cohort) if patient is None else None,  # sums over every row of the cohort: minutes, for one patient
        places=places(cohort) if patient is None else None,
        patients=samples,
        colours=list(zip(scale.COLOURS, scale.INKS, strict=True)),
    )  # fmt: skip


@cache
def _environment(relevance_in_percent: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("rollout.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS, relevance=percent if relevance_in_percent else number)
    return environment


def _target(folder: Path, output: str | Path | None, patient: str | None, overwrite: bool) -> Path:
    tail = "" if patient is None else "-" + re.sub(r"[^A-Za-z0-9_-]+", "_", str(patient))[:60]
    target = folder / f"report{tail}.html" if output is None else usable_path(output, "output")
    if target.is_dir():
        raise ValueError(f"output must be a file to write, got the folder {target}; give a name in it")
    if not target.parent.is_dir():
        raise ValueError(f"output must be in a folder that exists, got {target}: no folder {target.parent}")
    if os.path.lexists(target) and not overwrite and not _is_report(target):
        raise ValueError(
            f"output must be a new file or an earlier report, got {target}, which is neither; give another name or "
            "overwrite (--overwrite)"
        )
    return target


def _is_report(path: Path) -> bool:
    """Whether a file is a page that this module wrote: its head says so."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return MARK in file.read(HEAD)
    except OSError as error:
        raise ValueError(f"output must be a file that can be read, got {path}: {error.strerror}") from error
