"""What `rollout attribute` does: a run file or a function gives model and samples, and the cohort is attributed."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rollout.cohort.run import CohortRun, attribute_cohort
from rollout.cohort.store import run_folder
from rollout.data.classes import did_you_mean
from rollout.data.meds import MedsFolder
from rollout.data.names import names_for, vocabulary_codes
from rollout.errors import require
from rollout.files import usable_path
from rollout.results.layout import NAMES
from rollout.runfile.entry_point import call_entry, find_entry
from rollout.runfile.events import EventsRun
from rollout.runfile.file import RunFile, read_run_file
from rollout.runfile.settings import check_settings

MIMIC = ("MIMIC4Dataset", "MIMIC4EHRDataset")
PYHEALTH_MEDS = "MEDSDataset"
OURS = ("model", "dataset", "out", "client", "resume", "retry_failures", "progress")
"""Arguments of `attribute_cohort` that an entry point does not return among the further ones."""


def attribute_run_file(
    path: str | Path,
    output: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    trust_cache: bool = False,
    **options: Any,
) -> CohortRun:
    """Attribute the cohort of a run file.

    Args:
        path: The run file.
        output: Instead of its `[run] output`.
        settings: Go before those of its `[run]`.
        trust_cache: Whether to open samples that somebody else prepared. Whoever did can run anything as you.
        **options: Further arguments of `attribute_cohort`: `client`, `resume`, `retry_failures`, `progress`.

    Raises:
        ValueError: If anything in it is wrong, before any table is read; if samples or weights do not fit.
        CohortError: As `attribute_cohort`.
    """
    run = read_run_file(path)
    chosen = {**run.settings, **(settings or {})}
    if options.get("client") is not None:
        chosen["workers"] = 1
    check_settings(chosen, _option)
    folder = output if output is not None else run.output
    if folder is None:
        raise ValueError(f"{run.path}: [run] needs output, or give --output")
    folder = run_folder(usable_path(folder, "output"))
    model, dataset = run.load(folder, trust_cache=trust_cache)
    if isinstance(run, EventsRun):
        further = run.arguments(model, dataset, chosen)
    else:
        further = {"code_names": _names(run, dataset, folder)}
    return attribute_cohort(model, dataset, folder, **chosen, **options, **further)


def attribute_entry(
    entry: str, output: str | Path | None, settings: Mapping[str, Any] | None = None, **options: Any
) -> CohortRun:
    """Attribute the dataset a Python function returns with the model it returns.

    Args:
        entry: `package.module:function`; the current folder can be imported from. Called without arguments, it returns
            `(model, dataset)` as `attribute_cohort` takes them, or `(model, dataset, arguments)`: a mapping of what
            else it takes that says how this model and these data are attributed, such as
            `{"collate": …, "vocabularies": …, "explain": …}`.
        output: Folder for the results.
        settings: Of `attribute_cohort`; they go before the function's.
        **options: As in `attribute_run_file`.

    Raises:
        ValueError: If there is no such function, or it returns something else.
        RuntimeError: If it, or importing it, raises.
        ValueError, TypeError, CohortError: As `attribute_cohort`.
    """
    check_settings(settings or {}, _option)
    if output is None:
        raise ValueError("--entry needs --output, a folder for the results")
    function = find_entry(entry)
    folder = run_folder(usable_path(output, "output"))
    model, dataset, arguments = returned(call_entry(function, entry), entry)
    return attribute_cohort(model, dataset, folder, **{**arguments, **(settings or {})}, **options)


def returned(made: Any, entry: str, *further: Callable[..., Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Model, dataset and further arguments, as an entry point returned them.

    Args:
        made: What it returned.
        entry: Its name.
        further: Functions whose arguments it may return, beside `attribute_cohort`.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(made, tuple | list) or len(made) not in (2, 3):
        raise ValueError(
            f"--entry {entry} must return (model, dataset) or (model, dataset, arguments), got {_told(made)}"
        )
    model, dataset, arguments = made if len(made) == 3 else (*made, {})
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f"--entry {entry} must return as arguments a mapping such as {{'collate': …}}, got {_told(arguments)}"
        )
    functions = (attribute_cohort, *further)
    named = dict.fromkeys(name for function in functions for name in inspect.signature(function).parameters)
    allowed = [name for name in named if name not in OURS]
    for name in arguments:
        if name not in allowed:
            raise ValueError(
                f"--entry {entry} returned the argument {name!r}{did_you_mean(name, allowed)} It may return "
                f"{', '.join(allowed)}"
            )
    return model, dataset, dict(arguments)


def _told(value: Any) -> str:
    sized = isinstance(value, tuple | list)
    return f"{type(value).__name__} of {len(value)}" if sized else type(value).__name__


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
    """The names of MIMIC-IV's codes, or of a MEDS folder's, unless the run's folder has them already."""
    if (folder / NAMES).is_file():
        return None
    if run.source.dataset in MIMIC:
        return names_for(run.source.root, dataset.input_processors) or None
    if run.source.dataset != PYHEALTH_MEDS:
        return None
    meds, codes = MedsFolder(run.source.root), vocabulary_codes(dataset.input_processors)
    return {feature: meds.described(held) for feature, held in codes.items()}


def _option(key: str) -> str:
    return "--local-workers" if key == "workers" else f"--{key.replace('_', '-')}"
