"""What `rollout verify` does: a run's folder checked, and the samples it was made of."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rollout.cohort.content import changed
from rollout.data.samples import prepare_samples
from rollout.results.folder import RunFolder
from rollout.results.layout import CACHE
from rollout.results.verify import verify_folder
from rollout.runfile.entry_point import call_entry, find_entry
from rollout.runfile.events import EventsRun
from rollout.runfile.file import read_run_file

SHOWN = 8
"""Samples of a part that a finding names."""


def verify_run(folder: str | Path, run_file: str | Path | None = None, entry: str | None = None) -> list[str]:
    """Check a run's folder, and with a run file or an entry point every sample against what was attributed.

    Args:
        folder: Of the run.
        run_file: The run file it was made by; its samples are prepared again if its cache is not there.
        entry: `package.module:function`, as `rollout attribute --entry` takes it.

    Returns:
        One line per finding.

    Raises:
        ValueError: If there is no such folder, or run file or entry point are wrong.
        RuntimeError: If the entry point raises.
    """
    if run_file is not None and entry is not None:
        raise ValueError("verify takes a run file or --entry, not both")
    findings = verify_folder(folder)
    if run_file is None and entry is None:
        return findings
    dataset = _dataset(folder, run_file, entry)
    try:
        run = RunFolder(folder)
    except ValueError:  # a finding already
        return findings
    return [*findings, *_compared(run, dataset)]


def _dataset(folder: str | Path, run_file: str | Path | None, entry: str | None) -> Any:
    if run_file is not None:
        run = read_run_file(run_file)
        if isinstance(run, EventsRun):
            return run.samples()
        return prepare_samples(run.source, run.cache or Path(folder).expanduser() / CACHE, run.vocabulary)
    made = call_entry(find_entry(str(entry)), str(entry))
    if not isinstance(made, tuple | list) or len(made) < 2:
        raise ValueError(f"--entry {entry} must return (model, dataset), got {type(made).__name__}")
    return made[1]


def _compared(run: RunFolder, dataset: Any) -> Iterator[str]:
    """Where samples are not those that were attributed; one that cannot be read now is not compared."""
    planned = run.manifest.identity["dataset"]["samples"]
    if len(dataset) != planned:
        yield f"{run.path} is of {planned:,} samples, the dataset has {len(dataset):,}"
        return
    for record in run.records:
        found = list(changed(dataset, [record]))
        if found:
            named = ", ".join(map(str, found[:SHOWN])) + ", …" * (len(found) > SHOWN)
            yield f"{record.name}: {len(found):,} samples hold other values than when they were attributed: {named}"
