"""What `rollout evaluate` does: a run file or a function gives model and samples, and methods are scored on them."""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from rollout.cohort.evaluation import evaluate_cohort
from rollout.cohort.explain import Explain
from rollout.cohort.store import run_folder
from rollout.cohort.summary import CohortRun
from rollout.files import first_line, read_json, usable_path
from rollout.results.layout import CACHE
from rollout.runfile.entry_point import call_entry, find_entry
from rollout.runfile.events import EventsRun, relevance_of
from rollout.runfile.file import read_run_file
from rollout.runfile.start import returned

EVALUATED = "evaluated"
"""Folder of an evaluation, beside the output of its run file."""
SHARED = ("batch_tokens", "batch_samples", "part_samples", "device", "workers", "equal_lengths")
"""Of the settings of a run file, those that an evaluation has too."""
OF_EXPLAIN = "explain"
"""The name of the method that an entry point's `explain` is, or that of the `[run]` of a model of transformers."""


def predictions_of(explain: Explain, model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The predictions alone of a function that `attribute_cohort` takes as `explain`."""
    found = explain(model, batch).y_prob
    if found is None:
        raise ValueError("explain gives no y_prob: return `predict` beside it, (model, batch) → probabilities")
    return found


def evaluate_run_file(
    path: str | Path,
    output: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    patients: str | Path | None = None,
    trust_cache: bool = False,
    **options: Any,
) -> CohortRun:
    """Evaluate methods on the cohort of a run file.

    Args:
        path: The run file.
        output: Folder; None: `evaluated` beside the `[run] output`.
        settings: Further arguments of `evaluate_cohort`; they go before those of `[run]`.
        patients: A file of patient ids, one a line: of these patients only.
        trust_cache: As in `attribute_run_file`.
        **options: `client`, `resume`, `retry_failures`, `progress`.

    Raises:
        ValueError: If anything in it is wrong, before any table is read; if samples or weights do not fit.
        CohortError: As `evaluate_cohort`.
    """
    run = read_run_file(path)
    chosen = {key: value for key, value in run.settings.items() if key in SHARED} | dict(settings or {})
    if options.get("client") is not None:
        chosen["workers"] = 1
    if output is None and run.output is None:
        raise ValueError(f"{run.path}: [run] needs output, or give --output")
    folder = output if output is not None else run.output.parent / EVALUATED  # type: ignore[union-attr]
    folder = run_folder(usable_path(folder, "output"))
    prepared = run.output is not None and (run.output / CACHE).is_dir()
    wanted = None if patients is None else patients_of(patients)
    model, dataset = run.load(run.output if prepared and run.output is not None else folder, trust_cache=trust_cache)
    if wanted is not None:
        dataset = _of_patients(dataset, wanted)
    if isinstance(run, EventsRun):
        methods = _mapping(chosen.pop("methods", OF_EXPLAIN))
        chosen |= run.evaluation(model, dataset, run.settings, methods)
    return evaluate_cohort(model, dataset, folder, **chosen, **options)


def evaluate_entry(
    entry: str, output: str | Path | None, settings: Mapping[str, Any] | None = None, **options: Any
) -> CohortRun:
    """Evaluate methods on the dataset a Python function returns with the model it returns.

    Args:
        entry: As in `attribute_entry`. Of the arguments it returns those of `evaluate_cohort` are taken; an `explain`
            is the method of that name, and tells the predictions where no `predict` is returned.
        output: Folder for the results.
        settings: Of `evaluate_cohort`; they go before the function's.
        **options: As in `evaluate_run_file`.

    Raises:
        ValueError: If there is no such function, or it returns something else.
        RuntimeError: If it, or importing it, raises.
        ValueError, TypeError, CohortError: As `evaluate_cohort`.
    """
    if output is None:
        raise ValueError("--entry needs --output, a folder for the results")
    function = find_entry(entry)
    folder = run_folder(usable_path(output, "output"))
    model, dataset, arguments = returned(call_entry(function, entry), entry, evaluate_cohort)
    known = inspect.signature(evaluate_cohort).parameters
    chosen = {**{key: value for key, value in arguments.items() if key in known}, **(settings or {})}
    explain = arguments.get("explain")
    if explain is not None:
        chosen.setdefault("predict", partial(predictions_of, explain))
        named = _mapping(chosen.get("methods", OF_EXPLAIN))
        own = partial(relevance_of, explain)
        chosen["methods"] = {name: own if given == OF_EXPLAIN else given for name, given in named.items()}
    return evaluate_cohort(model, dataset, folder, **chosen, **options)


def methods_of(text: Sequence[str]) -> dict[str, Any]:
    """Methods as the command line names them: `rollout,chefer`, `NAME=rollout:own_path=false`, `NAME=FOLDER`.

    Raises:
        ValueError: a name comes twice.
    """
    found: dict[str, Any] = {}
    for one in (part.strip() for each in text for part in each.split(",") if part.strip()):
        name, told, value = one.partition("=")
        if not told or ":" in name:  # rollout:own_path=false names itself
            name = value = one
        if name in found:
            raise ValueError(f"--methods names {name!r} twice; give one of them another name: NAME=METHOD")
        found[name] = value
    return found


def patients_of(path: str | Path) -> list[str]:
    """Patient ids of a file, one a line.

    Raises:
        ValueError: it cannot be read, or holds none.
    """
    path = usable_path(path, "--patients")
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--patients must be a text file of ids, one a line, got {path}: {first_line(error)}"
        ) from error
    if not found:
        raise ValueError(f"--patients must hold at least one patient id, got the empty {path}")
    return found


def _of_patients(dataset: Any, wanted: Sequence[str]) -> Any:
    """The samples of some patients.

    Raises:
        ValueError: one has none.
    """
    by_patient = {str(patient): numbers for patient, numbers in dataset.patient_to_index.items()}
    lacking = [patient for patient in wanted if patient not in by_patient]
    if lacking:
        raise ValueError(
            f"--patients: {len(lacking):,} of {len(wanted):,} have no samples here, the first {lacking[0]!r}; the run "
            f"file has samples of {len(by_patient):,} patients, such as {next(iter(by_patient), None)!r}"
        )
    return dataset.subset(sorted({number for patient in wanted for number in by_patient[patient]}))


def planted_of(path: str | Path) -> dict[str, list[str]]:
    """Planted codes by feature, from the `truth.json` of a synthetic cohort or a JSON file {feature: [code, …]}.

    Raises:
        ValueError: it cannot be read, or is neither.
    """
    path = usable_path(path, "--planted")
    try:
        value = read_json(path)
    except OSError as error:
        raise ValueError(f"--planted must be a JSON file, got {path}: {first_line(error)}") from error
    given = value.get("planted", value) if isinstance(value, dict) else None
    found = {str(feature): _codes(rows) for feature, rows in given.items()} if isinstance(given, dict) else {}
    if not found or not all(found.values()):
        raise ValueError(f"{path} must be {{feature: [code, …]}} or the truth.json of a synthetic cohort")
    return found


def _codes(rows: Any) -> list[str]:
    """The codes of a feature, of those with log odds the ones that raise the risk; none where they are something
    else."""
    given = rows if isinstance(rows, list) else []
    raising = [row for row in given if not isinstance(row, dict) or row.get("log_odds", 1) > 0]
    codes: list[Any] = [row.get("code") if isinstance(row, dict) else row for row in raising]
    return codes if all(isinstance(code, str) for code in codes) else []


def _mapping(methods: Any) -> dict[str, Any]:
    if isinstance(methods, Mapping):
        return dict(methods)
    return {name: name for name in ([methods] if isinstance(methods, str) else methods)}
