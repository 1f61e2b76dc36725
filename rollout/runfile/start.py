"""What `rollout attribute` does: a run file or a function gives model and samples, and the cohort is attributed."""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from rollout.cohort.run import CohortRun, attribute_cohort
from rollout.cohort.store import run_folder
from rollout.data.names import names_for
from rollout.errors import require
from rollout.results.layout import NAMES
from rollout.runfile.file import RunFile, read_run_file
from rollout.runfile.settings import check_settings

MIMIC = ("MIMIC4Dataset", "MIMIC4EHRDataset")


def attribute_run_file(
    path: str | Path, output: str | Path | None = None, settings: Mapping[str, Any] | None = None, **options: Any
) -> CohortRun:
    """Attribute the cohort of a run file.

    Args:
        path: The run file.
        output: Instead of its ``[run] output``.
        settings: Go before those of its ``[run]``.
        **options: Further arguments of ``attribute_cohort``: ``client``, ``resume``, ``retry_failures``, ``progress``.

    Raises:
        ValueError: If anything in it is wrong, before any table is read; if samples or weights do not fit.
        CohortError: As ``attribute_cohort``.
    """
    run = read_run_file(path)
    chosen = {**run.settings, **(settings or {})}
    if options.get("client") is not None:
        chosen["workers"] = 1
    check_settings(chosen, _option)
    folder = output if output is not None else run.output
    if folder is None:
        raise ValueError(f"{run.path}: [run] needs output, or give --output")
    folder = run_folder(folder)
    model, dataset = run.load(folder)
    return attribute_cohort(model, dataset, folder, **chosen, **options, code_names=_names(run, dataset, folder))


def attribute_entry(
    entry: str, output: str | Path | None, settings: Mapping[str, Any] | None = None, **options: Any
) -> CohortRun:
    """Attribute the dataset a Python function returns with the model it returns.

    Args:
        entry: ``package.module:function``; the current folder can be imported from. Called without arguments, it
            returns ``(model, dataset)`` as ``attribute_cohort`` takes them.
        output: Folder for the results.
        settings: Of ``attribute_cohort``.
        **options: As in ``attribute_run_file``.

    Raises:
        ValueError: If there is no such function, or it returns something else.
        RuntimeError: If it raises.
        CohortError: As ``attribute_cohort``.
    """
    check_settings(settings or {}, _option)
    if output is None:
        raise ValueError("--entry needs --output, a folder for the results")
    function = find_entry(entry)
    folder = run_folder(output)
    try:
        made = function()
    except Exception as error:
        raise RuntimeError(f"--entry {entry} raised {type(error).__name__}: {error}") from error
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise ValueError(f"--entry {entry} must return (model, dataset), got {type(made).__name__}")
    model, dataset = made
    return attribute_cohort(model, dataset, folder, **(settings or {}), **options)


def find_entry(entry: str) -> Any:
    """Return the function that ``package.module:function`` names.

    Raises:
        ValueError: If the text, the module or the function is not there.
    """
    if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", entry):
        raise ValueError(f"--entry must be package.module:function, got {entry!r}")
    module_name, name = entry.split(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"--entry {entry}: there is no module {error.name} to import from {os.getcwd()}") from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ValueError(f"--entry {entry}: {module_name} has no function {name}")
    return found


@contextmanager
def scheduler_client(address: str | None) -> Iterator[Any]:
    """A Dask client of a running scheduler, closed on leaving; None without an address.

    Raises:
        ValueError: If nothing answers there.
    """
    if address is None:
        yield None
        return
    distributed = require("dask.distributed", "dask")
    try:
        client = distributed.Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--scheduler must be the address of a running Dask scheduler, such as tcp://host:8786, got {address!r}: "
            f"{error}"
        ) from error
    with client:
        yield client


def _names(run: RunFile, dataset: Any, folder: Path) -> dict[str, dict[str, str]] | None:
    """The names of MIMIC-IV's codes, unless the folder has them already."""
    if run.source.dataset not in MIMIC or (folder / NAMES).is_file():
        return None
    return names_for(run.source.root, dataset.input_processors) or None


def _option(key: str) -> str:
    return "--local-workers" if key == "workers" else f"--{key.replace('_', '-')}"
