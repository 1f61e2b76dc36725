"""Which methods find the truth: models of synthetic cohorts, whose outcome planted codes alone drive.

    python -m rollout.demo.truth [--page docs/methods.md]

Trains PyHealth's Transformer on several cohorts and sizes, ranks within each record of the test patients its codes by
every method, and prints, per model and pooled, how well the planted ones come out on top; one cohort has protective
codes as well. With `--page` the table replaces what stands between `<!-- truth -->` markers there.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from rollout.data.mimic import mimic_source
from rollout.data.samples import prepare_samples
from rollout.data.synthetic import write_synthetic_cohort
from rollout.demo.recovery import explainers, planted_records, recovery
from rollout.demo.training import Recipe, auroc, labels_of, predict, split_patients, train_transformer
from rollout.files import put_between_markers
from rollout.intervals import bootstrap_mean

MARKER = "truth"
BASELINE = "rollout"


class Trial(NamedTuple):
    """A cohort, by its seed, and a size of the model."""

    seed: int
    layers: int
    heads: int
    protective: bool = False

    @property
    def name(self) -> str:
        return f"{self.layers}×{self.heads}, cohort {self.seed}"


TRIALS = (
    Trial(0, 2, 2), Trial(0, 1, 4), Trial(3, 2, 2), Trial(3, 4, 4), Trial(4, 2, 2), Trial(4, 1, 8), Trial(5, 2, 2),
    Trial(5, 2, 8), Trial(7, 2, 2, protective=True),
)  # fmt: skip


class Found(NamedTuple):
    """A trial, the model's AUROC on test patients, and the areas of `recovery`."""

    trial: Trial
    auroc: float
    areas: pl.DataFrame


def run_trial(trial: Trial, patients: int, folder: Path) -> Found:
    """Write a cohort, train a model, and rank the codes of the test patients' records; folders are used again."""
    root = folder / f"cohort-{trial.seed}"
    if not root.exists():
        write_synthetic_cohort(root, patients, trial.seed, protective=trial.protective)
    dataset = prepare_samples(mimic_source(root), folder / f"samples-{trial.seed}")
    samples = list(dataset)
    labels = labels_of(samples, next(iter(dataset.output_schema)))
    split = split_patients([sample["patient_id"] for sample in samples], labels, trial.seed)
    recipe = Recipe(layers=trial.layers, heads=trial.heads)
    model = train_transformer(dataset, samples, split, recipe, seed=trial.seed, progress=False).model
    predicted = auroc(labels[split.test], predict(model, samples, split.test, progress=False))
    truth = json.loads((root / "truth.json").read_text())
    marks, chosen = planted_records(dataset, samples, split.test, truth)
    return Found(trial, predicted, recovery(model, chosen, marks, explainers(model)))


def table(found: Sequence[Found]) -> str:
    """Areas by model and pooled, and how far each method is from rollout, with intervals by patient; Markdown."""
    plain, signed = [f for f in found if not f.trial.protective], [f for f in found if f.trial.protective]
    lines = []
    if plain:
        pooled = pl.concat([f.areas.with_columns(model=pl.lit(f.trial.name)) for f in plain])
        means = {f.trial: dict(f.areas.group_by("method").agg(pl.col("risk").mean()).iter_rows()) for f in plain}
        order = pooled.group_by("method").agg(pl.col("risk").mean()).sort("risk", descending=True)["method"].to_list()
        lines += _row("method", *(trial.name for trial in means), "pooled", f"pooled − {BASELINE}")
        lines += _row(*["---"] * (len(means) + 3))
        lines += _row("the model's own AUROC", *(f"{f.auroc:.3f}" for f in plain), "", "")
        for method in order:
            own = pooled.filter(pl.col("method") == method)
            areas = (f"{of[method]:.3f}" for of in means.values())
            lines += _row(
                f"`{method}`", *areas, f"{np.nanmean(own['risk'].to_numpy()):.3f}", _against_baseline(pooled, method)
            )
        count, people = pooled.filter(pl.col("method") == BASELINE), pooled.select("model", "patient").unique()
        lines.append(f"\n{len(count):,} records and features of {len(people):,} patients, in {len(plain)} models.")
    for f in signed:
        lines += ["", *_row("method", "risk over ordinary", "ordinary over protective"), *_row("---", "---", "---")]
        for method, risk, protective in (
            f.areas.group_by("method").agg(pl.col("risk").mean(), pl.col("protective").mean())
            .sort("protective", descending=True).iter_rows()
        ):  # fmt: skip
            lines += _row(f"`{method}`", f"{risk:.3f}", f"{protective:.3f}")
        lines.append(f"\nModel {f.trial.name}, with protective codes; its own AUROC {f.auroc:.3f}.")
    return "\n".join(lines)


def _row(*cells: str) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]


def _against_baseline(pooled: pl.DataFrame, method: str) -> str:
    """The mean difference to rollout on the same records, with its interval by patient."""
    if method == BASELINE:
        return "–"
    keys = ["model", "patient", "sample", "feature"]
    pairs = pooled.filter(pl.col("method") == method).join(pooled.filter(pl.col("method") == BASELINE), on=keys)
    groups = list(pairs.select("model", "patient").iter_rows())
    found = bootstrap_mean((pairs["risk"] - pairs["risk_right"]).to_numpy(), groups)
    return f"{found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _trials(count: int) -> Iterator[Trial]:
    """The first models, and the one with protective codes."""
    yield from TRIALS[: min(count, len(TRIALS) - 1)]
    yield TRIALS[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rollout.demo.truth", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=int, default=len(TRIALS) - 1, help="beside the one with protective codes")
    parser.add_argument("--patients", type=int, default=6000, help="in a cohort (default: %(default)s)")
    parser.add_argument("--page", type=Path, help="put the table between the markers of this Markdown page")
    options = parser.parse_args(arguments)
    if options.models < 1 or options.patients < 1:
        parser.error("--models and --patients must be at least 1")
    if options.page is not None:
        put_between_markers(options.page, MARKER, None)
    found: list[Found] = []
    with tempfile.TemporaryDirectory() as folder:
        for trial in _trials(options.models):
            begun = time.perf_counter()
            found.append(run_trial(trial, options.patients, Path(folder)))
            spent = time.perf_counter() - begun
            print(f"{trial.name}: AUROC {found[-1].auroc:.3f}, {spent:.0f} s", flush=True)
    text = table(found)
    print(f"\n{text}")
    if options.page is not None:
        put_between_markers(options.page, MARKER, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
