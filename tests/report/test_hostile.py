"""Folders as an attacker would send them: each gives one page that does nothing but show text, or one clear refusal."""

import re
from pathlib import Path

import pytest

from rollout.report import write_report
from tests.support.hostile_runs import write_hostile_run
from tests.support.inert import HIDDEN, check

PARTS, SEEDS = 8, 40
"""Parts, the first of which always runs, and the folders in each."""


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
