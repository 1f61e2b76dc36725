"""The commands that do a whole cohort: `rollout attribute` and `rollout evaluate`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from rollout.errors import require

typer = require("typer", "cohort")

RunFile = Annotated[Path | None, typer.Argument(help="TOML or JSON; rollout demo leaves one.")]
BatchTokens = Annotated[int | None, typer.Option(help="Most tokens in a batch.")]
BatchSamples = Annotated[int | None, typer.Option(help="Most samples in a batch.")]
EqualLengths = Annotated[bool, typer.Option("--equal-lengths", help="Batch samples of equal length only: no padding.")]
Device = Annotated[str | None, typer.Option(help="Where the model runs: cpu, cuda, …")]
Workers = Annotated[int | None, typer.Option(help="Processes on this machine.")]
Scheduler = Annotated[str | None, typer.Option(help="Address of a Dask scheduler whose workers to use.")]
NoResume = Annotated[bool, typer.Option("--no-resume", help="Refuse a folder that holds a run.")]
RetryFailures = Annotated[bool, typer.Option("--retry-failures", help="Do failed samples again.")]
TrustCache = Annotated[
    bool,
    typer.Option(
        "--trust-cache",
        help="Open samples that somebody else prepared: PyHealth unpickles them, which can run anything as you.",
    ),
]


def attribute(
    run_file: RunFile = None,
    entry: Annotated[
        str | None,
        typer.Option(
            help="package.module:function that returns (model, dataset), or (model, dataset, arguments): a mapping of "
            "further arguments of attribute_cohort, such as collate, vocabularies and explain."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results; default: that of the run file.")] = None,
    method: Annotated[str | None, typer.Option(help="rollout, chefer, …")] = None,
    readout: Annotated[str | None, typer.Option(help="model or forward.")] = None,
    backend: Annotated[str | None, typer.Option(help="auto, torch, triton or reference.")] = None,
    target_class: Annotated[int | None, typer.Option(help="For class-specific methods.")] = None,
    batch_tokens: BatchTokens = None,
    batch_samples: BatchSamples = None,
    equal_lengths: EqualLengths = False,
    device: Device = None,
    local_workers: Workers = None,
    scheduler: Scheduler = None,
    no_resume: NoResume = False,
    retry_failures: RetryFailures = False,
    trust_cache: TrustCache = False,
) -> None:
    """Attribute a whole cohort; the same command goes on where it was stopped.

    Exit status: 0 when every sample is attributed, 1 when some failed, 2 when refused or stopped by an error, 130 on
    Ctrl-C. With ROLLOUT_DEBUG=1 an error shows its traceback.
    """
    for module in ("polars", "pyarrow"):
        require(module, "cohort")
    from rollout.runfile.start import attribute_entry, attribute_run_file

    _check_source("attribute", run_file, entry, trust_cache)
    settings = _given(
        method=method, readout=readout, backend=backend, target_class=target_class, batch_tokens=batch_tokens,
        batch_samples=batch_samples, equal_lengths=equal_lengths or None, device=device, workers=local_workers,
    )  # fmt: skip
    with _client(scheduler, local_workers) as client:
        options = {"client": client, "resume": not no_resume, "retry_failures": retry_failures}
        if run_file is not None:
            run = attribute_run_file(run_file, output, settings, trust_cache=trust_cache, **options)
        else:
            run = attribute_entry(str(entry), output, settings, **options)
    typer.echo(str(run))
    if run.failed:
        raise typer.Exit(1)


def evaluate(
    run_file: RunFile = None,
    entry: Annotated[str | None, typer.Option(help="Instead of a run file, as rollout attribute takes it.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; default: evaluated, beside the run file's.")] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="rollout,chefer,… or NAME=METHOD; METHOD:own_path=false leaves out what the position read keeps for "
            "itself; NAME=FOLDER takes stored attributions. A random ranking is always among them."
        ),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="eraser or pyhealth.")] = None,
    shares: Annotated[str | None, typer.Option(help="Top shares in percent, such as 1,5,10,20,50.")] = None,
    replacement: Annotated[str | None, typer.Option(help="delete, pad or resample.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Class 1 is predicted from this probability on.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random ranking and of resampling.")] = None,
    leave_one_out: Annotated[
        int | None, typer.Option(help="Take each code out alone in records of at most so many codes.")
    ] = None,
    planted: Annotated[
        Path | None, typer.Option(help="Codes known to drive the outcome: truth.json, or {feature: [code, …]}.")
    ] = None,
    patients: Annotated[
        Path | None, typer.Option(help="Of a run file: these patients only, ids one a line, such as the test split's.")
    ] = None,
    batch_tokens: BatchTokens = None,
    batch_samples: BatchSamples = None,
    equal_lengths: EqualLengths = False,
    device: Device = None,
    local_workers: Workers = None,
    scheduler: Scheduler = None,
    no_resume: NoResume = False,
    retry_failures: RetryFailures = False,
    trust_cache: TrustCache = False,
) -> None:
    """Is it true? Score methods by what the model predicts without the codes they rank first; goes on where stopped.

    Exit status: as rollout attribute.
    """
    for module in ("polars", "pyarrow"):
        require(module, "cohort")
    from rollout.results.faithfulness import open_faithfulness
    from rollout.results.told import told
    from rollout.runfile.evaluate import evaluate_entry, evaluate_run_file, methods_of, planted_of

    _check_source("evaluate", run_file, entry, trust_cache)
    if patients is not None and entry is not None:
        raise ValueError("--patients is for the samples of a run file; let the function of --entry return fewer")
    settings = _given(
        methods=methods_of(methods) if methods else None, metric=metric, shares=_numbers(shares, "--shares"),
        replacement=replacement, threshold=threshold, seed=seed, leave_one_out=leave_one_out,
        planted=None if planted is None else planted_of(planted), batch_tokens=batch_tokens,
        batch_samples=batch_samples, equal_lengths=equal_lengths or None, device=device, workers=local_workers,
    )  # fmt: skip
    with _client(scheduler, local_workers) as client:
        options = {"client": client, "resume": not no_resume, "retry_failures": retry_failures}
        if run_file is not None:
            chosen: dict[str, Any] = {"patients": patients, "trust_cache": trust_cache}
            run = evaluate_run_file(run_file, output, settings, **chosen, **options)
        else:
            run = evaluate_entry(str(entry), output, settings, **options)
    typer.echo(f"{run}\n\n{told(open_faithfulness(run.out))}")
    if run.failed:
        raise typer.Exit(1)


def _check_source(command: str, run_file: Path | None, entry: str | None, trust_cache: bool) -> None:
    if (run_file is None) == (entry is None):
        raise ValueError(f"{command} needs a run file or --entry, one of them")
    if trust_cache and entry is not None:
        raise ValueError("--trust-cache is for the cache of a run file; --entry has none")


def _given(**settings: Any) -> Mapping[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


@contextmanager
def _client(scheduler: str | None, local_workers: int | None) -> Iterator[Any]:
    """The client of a Dask scheduler, if one is named; Ctrl-C within ends the command with status 130."""
    from rollout.runfile.start import scheduler_client

    if scheduler is not None and local_workers is not None:
        raise ValueError("give --local-workers (processes of this machine) or --scheduler (a cluster), not both")
    try:
        with scheduler_client(scheduler) as client:
            yield client
    except KeyboardInterrupt:
        typer.echo("rollout: interrupted; the same command goes on where it stopped", err=True)
        raise typer.Exit(130) from None


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} must be numbers with commas between, such as 1,5,10, got {text!r}") from None
