"""The page: its sections put into the templates, and written whole or not at all."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rollout.files import write_whole
from rollout.report import scale
from rollout.report.sections.codes import codes
from rollout.report.sections.patients import patients
from rollout.report.sections.places import places
from rollout.report.sections.run import run
from rollout.report.sections.summary import summary
from rollout.report.text import FILTERS, number, percent
from rollout.results.attributions import CohortAttributions


def write_report(
    path: str | Path,
    output: str | Path | None = None,
    patient: str | None = None,
    names: str | Path | Mapping[str, Mapping[str, str]] | None = None,
) -> Path:
    """Write the report of a cohort run as one self-contained HTML file.

    The page needs no network and no script. Its size is bounded however large the cohort is, and it says what it leaves
    out. It holds patient ids and codes of the samples it shows: it is as confidential as the data.

    Args:
        path: Folder of the run (``out`` of ``attribute_cohort``); one that is not complete can be reported on.
        output: File to write; None: ``report.html`` in the folder, or ``report-<patient>.html`` for a patient.
        patient: Show this patient's samples rather than a choice; the tables of the cohort's codes and positions, which
            take a pass over every row, are then left out.
        names: Names of codes, ``{feature: {code: name}}`` or a JSON file of them, before those of the folder.

    Returns:
        The file.

    Raises:
        ValueError: If the folder is no sound run, no attributed sample is of the patient, or the file cannot be
            written.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is not complete.*")
        cohort = CohortAttributions(path, names)
    target = _target(cohort.path, output, patient)
    text = render(cohort, patient)
    try:
        return write_whole(target, text.encode("utf-8", "replace"))
    except OSError as error:
        raise ValueError(f"output must be a file that can be written, got {target}: {error.strerror}") from error


def render(cohort: CohortAttributions, patient: str | None = None) -> str:
    """The page as a string."""
    shown = patients(cohort, patient)  # first: it refuses an unknown patient
    identity = cohort.manifest["identity"]
    environment = _environment()
    environment.filters["relevance"] = percent if shares(identity) else number
    return environment.get_template("page.html").render(
        title=_title(identity),
        run=run(cohort),
        identity={key: value if isinstance(value, dict) else {} for key, value in identity.items()},
        summary=summary(cohort),
        codes=codes(cohort) if patient is None else None,  # sums over every row of the cohort: minutes, for one patient
        places=places(cohort) if patient is None else None,
        patients=shown,
        colours=list(zip(scale.COLOURS, scale.INKS, strict=True)),
    )  # fmt: skip


def shares(identity: Mapping[str, Any]) -> bool:
    """Whether a record's relevance sums to 1, so that it is told in percent: where the rows of the chain do."""
    method = identity.get("method")
    return isinstance(method, Mapping) and bool(method.get("renormalize"))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("rollout.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    return environment


def _title(identity: Mapping[str, Any]) -> str:
    data = identity.get("dataset")
    parts = [str(data[key]) for key in ("name", "task") if data.get(key)] if isinstance(data, Mapping) else []
    return " · ".join(parts) or "cohort"


def _target(folder: Path, output: str | Path | None, patient: str | None) -> Path:
    if output is None:
        tail = "" if patient is None else "-" + re.sub(r"[^A-Za-z0-9_-]+", "_", str(patient))[:60]
        return folder / f"report{tail}.html"
    target = Path(output).expanduser()
    if target.is_dir():
        raise ValueError(f"output must be a file to write, got the folder {target}; give a name in it")
    if not target.parent.is_dir():
        raise ValueError(f"output must be in a folder that exists, got {target}: no folder {target.parent}")
    return target
