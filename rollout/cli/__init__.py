"""The command line: a thin registry of commands."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

from rollout.cli.meds import meds
from rollout.cli.runs import attribute, evaluate
from rollout.errors import CohortError, one_line, require
from rollout.files import usable_path

typer = require("typer", "cohort")
DEBUG = "ROLLOUT_DEBUG"
"""Environment variable: set, an error is shown with its traceback."""

app = typer.Typer(
    help="Attention rollout for whole cohorts.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)


app.add_typer(meds, name="meds")


@app.callback()
def _commands() -> None:
    """Attention rollout for whole cohorts."""


@app.command()
def synthetic(
    out: Annotated[Path, typer.Argument(help="New or empty folder for the tables.")],
    patients: Annotated[int, typer.Option(help="Number of patients.")] = 6000,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
) -> None:
    """Write a synthetic cohort in MIMIC-IV's layout, with planted risk codes listed in truth.json."""
    require("polars", "cohort")
    from rollout.data.synthetic import write_synthetic_cohort

    truth = write_synthetic_cohort(out, patients, seed)
    planted = sum(len(rows) for rows in truth["planted"].values())
    typer.echo(f"{patients} patients, {truth['admissions']} admissions, {planted} planted codes: {out}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="New or empty folder for the results.")] = Path("demo-output"),
    ehr_root: Annotated[Path | None, typer.Option(help="MIMIC-IV folder; default: a synthetic cohort.")] = None,
    patients: Annotated[int, typer.Option(help="Size of the synthetic cohort.")] = 6000,
    seed: Annotated[int, typer.Option(help="Of the cohort, the split and the training.")] = 0,
    epochs: Annotated[int, typer.Option(help="Passes over the training patients.")] = 6,
    batch_size: Annotated[int, typer.Option(help="Samples per attributed batch.")] = 32,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, …")] = "cpu",
    workers: Annotated[int, typer.Option(help="Processes PyHealth reads the tables with.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo in the folder.")] = False,
) -> None:
    """Tables to attributions: train PyHealth's Transformer, attribute the whole cohort, write rows and pictures."""
    for module, extra in (
        ("polars", "cohort"),
        ("pyarrow", "cohort"),
        ("pyhealth", "pyhealth"),
        ("matplotlib", "plots"),
    ):
        require(module, extra)
    from rollout.demo.printed import report
    from rollout.demo.run import run_demo
    from rollout.demo.training import Recipe

    found = run_demo(
        output,
        ehr_root,
        patients=patients,
        seed=seed,
        recipe=Recipe(epochs=epochs),
        batch_size=batch_size,
        device=device,
        workers=workers,
        overwrite=overwrite,
    )
    typer.echo("\n" + report(found))


for _of_cohorts in (attribute, evaluate):
    app.command()(_of_cohorts)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="Folder of a cohort run.")],
    patient: Annotated[str | None, typer.Option(help="One patient instead of the cohort.")] = None,
    output: Annotated[Path | None, typer.Option(help="HTML file; default: report.html in the folder.")] = None,
    names: Annotated[Path | None, typer.Option(help="JSON of further code names: {feature: {code: name}}.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="Folder of an evaluation, to be on the same page.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is no report.")] = False,
) -> None:
    """Write one self-contained HTML page of a cohort run: of attributions, of an evaluation, or of both."""
    for module in ("polars", "pyarrow"):
        require(module, "cohort")
    from rollout.report import write_report

    path = usable_path(path, "path")
    written = write_report(path, output, patient=patient, names=names, evaluation=evaluation, overwrite=overwrite)
    typer.echo(str(written))


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Folder of a cohort run.")],
    run_file: Annotated[Path | None, typer.Argument(help="Its run file: compare its samples too.")] = None,
    entry: Annotated[str | None, typer.Option(help="Instead of a run file, as rollout attribute takes it.")] = None,
) -> None:
    """Check every byte of a cohort run against what was written; with a run file or --entry, every sample as well.

    Exit status: 0 when all is as it was written, 2 with a line per finding when it is not.
    """
    for module in ("polars", "pyarrow"):
        require(module, "cohort")
    from rollout.runfile.verify import verify_run

    findings = verify_run(path, run_file, entry)
    for finding in findings:
        typer.echo(one_line(finding))
    if findings:
        raise typer.Exit(2)
    typer.echo(f"{path}: as it was written")


@app.command()
def doctor(
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: a GPU if there is one.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="package.module:function that returns a model, or (model, batch): say what a capture makes of it, "
            "instead of checking the machine."
        ),
    ] = None,
) -> None:
    """Which backend serves which call on this machine and why, each checked against the float64 oracle.

    With --model: which modules of a model `rollout.capture` records, which it leaves out or refuses, and why. Exit
    status: 0 when all is good, 1 when a check failed or the model is refused, 2 when it cannot be run.
    """
    from rollout.doctor import examine, lines

    if model is not None and device is not None:
        raise ValueError("--device is for the checks of the machine; a model runs where its function puts it")
    bad = 0
    for line, good in lines(device) if model is None else examine(model):
        typer.echo(line)
        bad += not good
    if bad:
        typer.echo(f"{bad} checks failed" if model is None else "the model cannot be captured", err=True)
        raise typer.Exit(1)


@app.command()
def bench(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch: Annotated[int, typer.Option(help="B, samples.")] = 32,
    heads: Annotated[int, typer.Option(help="H.")] = 8,
    layers: Annotated[int, typer.Option(help="L.")] = 4,
    size: Annotated[int, typer.Option(help="D, of a head.")] = 64,
    seq: Annotated[list[int] | None, typer.Option(help="S, repeatable; default 64 128 256 512.")] = None,
    seconds: Annotated[float, typer.Option(help="Timing of each pair, about.")] = 2.0,
    pyhealth: Annotated[bool, typer.Option("--pyhealth", help="Patients/s against PyHealth's too.")] = False,
    record: Annotated[Path | None, typer.Option("--json", help="Write the record to this file.")] = None,
) -> None:
    """How fast this machine is, against the naive chain; every result is checked before it is timed."""
    from rollout.bench import Settings, run

    sizes = Settings(device, batch, heads, layers, size, tuple(seq or (64, 128, 256, 512)), seconds)
    if not run(sizes, pyhealth=pyhealth, file=record, say=typer.echo):
        raise typer.Exit(1)


@app.command()
def explore(
    path: Annotated[Path, typer.Argument(help="Folder of a cohort run of attributions.")],
    beside: Annotated[Path | None, typer.Option(help="Another run of the same samples, shown beside it.")] = None,
    port: Annotated[int, typer.Option(help="Of 127.0.0.1; 0: any that is free.")] = 0,
    names: Annotated[Path | None, typer.Option(help="JSON of further code names: {feature: {code: name}}.")] = None,
) -> None:
    """Search a cohort run in a browser on this machine: patients, records as timelines, a code's patients, two runs.

    Prints an address that holds a token; only it is answered, and nothing is written. Ctrl-C ends it, with status 0.
    """
    for module, extra in (
        ("polars", "cohort"),
        ("pyarrow", "cohort"),
        ("starlette", "explore"),
        ("uvicorn", "explore"),
    ):
        require(module, extra)
    from rollout.report.explore import explore as serve

    with suppress(KeyboardInterrupt):
        serve(path, beside, port, names, say=typer.echo)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Folder of a cohort run.")],
    b: Annotated[Path, typer.Argument(help="Folder of another: of the same samples, or of a different cohort.")],
    feature: Annotated[str | None, typer.Option(help="Of this feature only.")] = None,
    by: Annotated[str, typer.Option(help="lift or relevance.")] = "lift",
    k: Annotated[int, typer.Option(help="Codes compared per feature, the commonest.")] = 50,
    minimum_records: Annotated[int, typer.Option(help="Codes in fewer records are left out.")] = 5,
    show: Annotated[int, typer.Option(min=0, help="Codes shown.")] = 20,
    csv: Annotated[Path | None, typer.Option(help="New file for the whole table.")] = None,
) -> None:
    """What differs between two runs: predictions, rankings, codes; by patient, corrected for how many are compared."""
    for module in ("polars", "pyarrow"):
        require(module, "cohort")
    from rollout.results.comparison import compare_cohorts
    from rollout.results.text_table import csv_target, write_csv
    from rollout.results.told_comparison import told_comparison

    target = None if csv is None else csv_target(csv)
    with _warnings_told():
        found = compare_cohorts(a, b, feature=feature, by=by, k=k, minimum_records=minimum_records)
    typer.echo(told_comparison(found, show))
    if target is not None:
        typer.echo(str(write_csv(found.table, target)))


@app.command()
def groups(
    path: Annotated[Path, typer.Argument(help="Folder of a cohort run.")],
    feature: Annotated[str, typer.Option(help="Whose codes.")],
    by: Annotated[
        str,
        typer.Option(
            help="icd-chapter, icd9-chapter, icd10-chapter, icd10-block, ccsr, ccs, atc-1 … atc-4, or a JSON or CSV "
            "file of {code: group}."
        ),
    ],
    order: Annotated[str, typer.Option(help="relevance, lift or prevalence.")] = "relevance",
    minimum_records: Annotated[int, typer.Option(help="Groups in fewer records are left out.")] = 5,
    show: Annotated[int, typer.Option(min=0, help="Groups shown.")] = 30,
    download: Annotated[
        bool, typer.Option("--download", help="Let PyHealth download a code system's table that is not there.")
    ] = False,
    csv: Annotated[Path | None, typer.Option(help="New file for the whole table.")] = None,
) -> None:
    """Relevance, lift and prevalence of groups of codes, such as chapters of the ICD, with intervals by patient."""
    for module in ("polars", "pyarrow"):
        require(module, "cohort")
    from rollout.results.attributions import CohortAttributions
    from rollout.results.text_table import csv_target, write_csv
    from rollout.results.told_comparison import told_groups

    target = None if csv is None else csv_target(csv)
    with _warnings_told():
        cohort = CohortAttributions(path)
    table = cohort.top_groups(feature, by, order=order, download=download, minimum_records=minimum_records)
    typer.echo(told_groups(table, cohort, feature, show))
    if target is not None:
        typer.echo(str(write_csv(table, target)))


@contextmanager
def _warnings_told() -> Iterator[None]:
    """What is warned of within, such as a run that is not complete, as a line of stderr each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        typer.echo(f"rollout: {one_line(str(warning.message))}", err=True)


def main() -> None:
    """Run the command line; wrong input, and what stops a run, ends with one line on stderr and exit status 2."""
    try:
        app()
    except (ValueError, ImportError, CohortError) as error:
        _tell(error, one_line(error))
    except (TypeError, OSError, RuntimeError, MemoryError) as error:
        _tell(error, f"{type(error).__name__}: {one_line(error)} ({DEBUG}=1 shows where)")
    sys.exit(2)


def _tell(error: BaseException, line: str) -> None:
    if os.environ.get(DEBUG):
        raise error
    typer.echo(f"rollout: {line}", err=True)
