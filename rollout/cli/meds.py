"""The commands `rollout meds …`."""

from pathlib import Path
from typing import Annotated

from rollout.errors import require
from rollout.files import usable_path, write_json

typer = require("typer", "cohort")

meds = typer.Typer(
    help="MEDS, the Medical Event Data Standard, in and out.", no_args_is_help=True, rich_markup_mode=None
)


@meds.command()
def attributions(
    run_file: Annotated[Path, typer.Argument(help="Of a classifier over a MEDS folder.")],
    out: Annotated[Path, typer.Argument(help="New or empty folder.")],
    attributed: Annotated[Path | None, typer.Option(help="Folder of the run; default: that of the run file.")] = None,
) -> None:
    """Write a run's attributions as MEDS events, and its predictions as meds-evaluation takes them."""
    for module in ("polars", "pyarrow"):
        require(module, "cohort")
    from rollout.runfile.to_meds import write_run_file

    typer.echo(str(write_run_file(run_file, out, attributed)))


@meds.command()
def convert(
    root: Annotated[Path, typer.Argument(help="MIMIC-IV folder, or one of rollout synthetic.")],
    out: Annotated[Path, typer.Argument(help="New or empty folder.")],
) -> None:
    """Write MIMIC-IV's admissions, diagnoses, procedures and prescriptions as MEDS, with labels of mortality."""
    for module in ("polars", "pyarrow"):
        require(module, "cohort")
    from rollout.data.meds.convert import convert_mimic

    typer.echo(", ".join(f"{count:,} {what}" for what, count in convert_mimic(root, out).items()) + f": {out}")


@meds.command()
def vocabulary(
    root: Annotated[Path, typer.Argument(help="MEDS folder.")],
    out: Annotated[Path, typer.Argument(help="New JSON file.")],
) -> None:
    """Write code → id of every code of a MEDS folder, with <pad> and <unk>, to train a model with."""
    require("polars", "cohort")
    from rollout.data.meds import fit_vocabulary

    target = _new_file(out)
    found = fit_vocabulary(root)
    typer.echo(f"{len(found):,} ids: {write_json(found, target)}")


@meds.command()
def parents(
    root: Annotated[Path, typer.Argument(help="MEDS folder.")],
    out: Annotated[Path, typer.Argument(help="New JSON file.")],
) -> None:
    """Write code → parent codes, by which `rollout groups --by` sums relevance up."""
    require("polars", "cohort")
    from rollout.data.meds import MedsFolder

    target = _new_file(out)
    found = MedsFolder(root).parents()
    typer.echo(f"{len(found):,} codes with parents: {write_json(found, target)}")


def _new_file(path: Path) -> Path:
    found = usable_path(path, "out")
    if found.exists():
        raise ValueError(f"out must be a new file, got {found}, which is there")
    if not found.parent.is_dir():
        raise ValueError(f"out must be a file in a folder that is there, got {found}")
    return found
