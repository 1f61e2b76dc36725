"""The command line: a thin registry of commands."""

import sys
from pathlib import Path
from typing import Annotated

from rollout.extras import require

typer = require("typer", "cohort")
app = typer.Typer(
    help="Attention rollout for whole cohorts.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)


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
    from rollout.synthetic import write_synthetic_cohort

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
    from rollout.demo import report, run_demo
    from rollout.training import Recipe

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


@app.command()
def doctor(
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: a GPU if there is one.")] = None,
) -> None:
    """Which backend serves which call on this machine and why, each checked against the float64 oracle."""
    from rollout.doctor import lines

    bad = 0
    for line, good in lines(device):
        typer.echo(line)
        bad += not good
    if bad:
        typer.echo(f"{bad} checks failed", err=True)
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; wrong input ends with one line on stderr and exit status 2."""
    try:
        app()
    except (ValueError, ImportError) as error:
        typer.echo(f"rollout: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
