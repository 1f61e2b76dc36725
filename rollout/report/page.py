"""The page: its sections put into the templates, and written whole or not at all."""

import hashlib
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polars.exceptions import PolarsError

from rollout.files import usable_path, write_whole
from rollout.report import scale
from rollout.report.environment import environment
from rollout.report.sections.codes import codes
from rollout.report.sections.faithfulness import faithfulness
from rollout.report.sections.patients import patients
from rollout.report.sections.places import places
from rollout.report.sections.run import run
from rollout.report.sections.summary import summary
from rollout.report.text import in_percent, shown
from rollout.results.attributions import CohortAttributions
from rollout.results.drawing import GREY, LINES
from rollout.results.faithfulness import CohortFaithfulness, is_evaluation, open_faithfulness

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
    evaluation: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the report of a cohort run, of attributions or of an evaluation, as one self-contained HTML file.

    The page needs no network and no script. Its size is bounded however large the cohort is, and it says what it leaves
    out. It holds patient ids and codes of the samples it shows: it is as confidential as the data.

    Args:
        path: Folder of the run (`out` of `attribute_cohort` or of `evaluate_cohort`); one that is not complete can be
            reported on.
        output: File to write; None: `report.html` in the folder, or `report-<patient>.html` for a patient, with a
            digest of the id where it is no file name. An earlier report is replaced.
        patient: Show this patient's samples rather than a choice; the tables of the cohort's codes and positions, which
            take a pass over every row, are then left out.
        names: Names of codes, `{feature: {code: name}}` or a JSON file of them, before those of the folder.
        evaluation: Folder of an evaluation of the same model, to be shown on the page of the attributions.
        overwrite: Replace `output` also if it is no report.

    Returns:
        The file.

    Raises:
        ValueError: If a folder is no sound run, holds numbers that are none, no attributed sample is of the patient,
            the evaluation is of another model, `patient`, `names` or `evaluation` is given for an evaluation alone, or
            the file cannot be written or is something else than a report.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is not complete.*")
            alone = is_evaluation(path)
            if alone and (patient, names, evaluation) != (None, None, None):
                raise ValueError(
                    f"path must be the folder of attributions where patient, names or evaluation is given, got the "
                    f"evaluation {path}"
                )
            cohort = None if alone else CohortAttributions(path, names)
            tested = path if alone else evaluation
            found = None if tested is None else open_faithfulness(tested)
        target = _target(usable_path(path, "path"), output, patient, overwrite)
        text = render(cohort, patient, found)
    except RecursionError:
        raise ValueError(f"{path}: what its JSON files say is nested too deep for a report") from None
    except (ValueError, PolarsError) as error:  # what it quotes may be of any length, and on any number of lines
        raise ValueError(shown(" ".join(str(error).split()), MESSAGE)) from error
    try:
        return write_whole(target, text.encode("utf-8", "replace"))
    except OSError as error:
        raise ValueError(f"output must be a file that can be written, got {target}: {error.strerror}") from error


def render(
    cohort: CohortAttributions | None, patient: str | None = None, evaluation: CohortFaithfulness | None = None
) -> str:
    """The page of attributions, of an evaluation, or of both, as a string."""
    first = cohort or evaluation
    if first is None:
        raise ValueError("render: there must be attributions or an evaluation to show, got neither")
    shown: dict[str, Any] = dict.fromkeys(("summary", "codes", "places", "patients"))
    if cohort is not None:
        shown["patients"] = patients(cohort, patient)  # first: it refuses an unknown patient
        shown["summary"] = summary(cohort)
        if patient is None:  # sums over every row of the cohort: minutes, for one patient
            shown |= {"codes": codes(cohort), "places": places(cohort)}
    return environment(in_percent(first.manifest)).get_template("page.html").render(
        **shown,
        faithfulness=None if evaluation is None else faithfulness(evaluation, cohort),
        run=run(first),
        legend=scale.legend(),
        read_position=None if cohort is None else cohort.read_position,
        code_link=lambda feature, code: None,
        colours=list(zip(scale.COLOURS, scale.INKS, strict=True)),
        line_colours=LINES,
        line_grey=GREY,
    )  # fmt: skip


def _target(folder: Path, output: str | Path | None, patient: str | None, overwrite: bool) -> Path:
    target = folder / _default_name(patient) if output is None else usable_path(output, "output")
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


def _default_name(patient: str | None) -> str:
    """Of the file: two patients share none, also where their ids differ only in signs that a file name cannot have."""
    if patient is None:
        return "report.html"
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", patient := str(patient))[:60]
    digest = "" if name == patient else "." + hashlib.sha256(patient.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"report-{name}{digest}.html"


def _is_report(path: Path) -> bool:
    """Whether a file is a page that this module wrote: its head says so."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return MARK in file.read(HEAD)
    except OSError as error:
        raise ValueError(f"output must be a file that can be read, got {path}: {error.strerror}") from error
