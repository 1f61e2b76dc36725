"""Are attention rollout's explanations faithful? Every patient tested once, on the MIMIC-IV demo or a known truth.

    python examples/attention_rollout_benchmark_mimic4_demo.py --ehr_root <folder of the MIMIC-IV demo>
    python examples/attention_rollout_benchmark_mimic4_demo.py --synthetic

Folds are by patient: for each, a small PyHealth Transformer is trained from scratch, the epoch chosen on a validation
fold, and the test fold evaluated by `rollout.evaluate_cohort`; the folds' rows together are one evaluation. PyHealth's
own AttentionRollout and CheferRelevance stand beside ours, and a random ranking beside all. The outcome is rare, so a
patient counts as predicted positive from the share of positives in training on, not from 0.5.

`--metric pyhealth` gives the numbers of PyHealth's `evaluate_attribution` on the same batches, padding counted.

Needs the cohort extra. PyHealth's own progress goes to stderr.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

import rollout
from rollout.data.mimic import check_mimic_root, mortality_samples
from rollout.data.quiet import quiet_pyhealth
from rollout.data.synthetic import write_synthetic_cohort
from rollout.demo.training import Recipe, Split, auroc, labels_of, train_transformer
from rollout.results.faithfulness import CohortFaithfulness
from rollout.results.ranking import planted_codes
from rollout.results.told import told


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; a folder without MIMIC-IV's tables is refused here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ehr_root", type=Path, help="folder with MIMIC-IV's hosp/ and icu/")
    source.add_argument("--synthetic", action="store_true", help="an invented cohort whose risk codes are known")
    parser.add_argument("--metric", choices=("eraser", "pyhealth"), default="eraser")
    parser.add_argument("--folds", type=int, default=5, help="1/folds of the patients test, as many validate")
    parser.add_argument("--tested", type=int, help="folds tested; default: all, with --synthetic 1")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, help="validation chooses among them")
    parser.add_argument("--patients", type=int, default=3000, help="size of the synthetic cohort")
    parser.add_argument("--picture", type=Path, help="PNG of the curves and differences")
    chosen = parser.parse_args(arguments)
    if chosen.tested is None:
        chosen.tested = 1 if chosen.synthetic else chosen.folds
    for name, low, high in (("folds", 3, 50), ("tested", 1, chosen.folds), ("epochs", 1, 1000), ("patients", 1, 10**6)):
        if not low <= getattr(chosen, name) <= high:
            parser.error(f"--{name} must be in {low}..{high}, got {getattr(chosen, name)}")
    if chosen.ehr_root is not None:
        try:
            check_mimic_root(chosen.ehr_root)
        except ValueError as error:
            parser.error(str(error))
    return chosen


def splits_by_patient(patients: list[str], labels: np.ndarray, folds: int, seed: int = 0) -> Iterator[Split]:
    """Fold k tests, fold k + 1 validates, the rest trains; patients with a positive label are spread evenly."""
    names, owner = np.unique(patients, return_inverse=True)
    positive = np.bincount(owner, labels) > 0
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(np.flatnonzero(positive)), rng.permutation(np.flatnonzero(~positive))])
    fold = np.empty(len(names), dtype=np.int64)
    fold[order] = np.arange(len(names)) % folds
    part = fold[owner]
    for test in range(folds):
        validation = (test + 1) % folds
        yield Split(*(np.flatnonzero(one) for one in
                      ((part != test) & (part != validation), part == validation, part == test)))  # fmt: skip


def methods_of(model: Any) -> dict[str, Any]:
    """What is compared, by name."""
    with quiet_pyhealth():
        from pyhealth.interpret.methods import AttentionRollout, CheferRelevance
    return {
        "rollout (ours)": "rollout",
        "rollout, own path left out": rollout.Method(own_path=False),
        "rollout (PyHealth)": AttentionRollout(model),
        "Chefer (PyHealth)": CheferRelevance(model),
        "frozen gradient": "frozen_gradient",
    }


def together(folders: list[tuple[Path, np.ndarray]]) -> CohortFaithfulness:
    """The evaluations of some folds as one: sample k of a fold is sample `index[k]` of all."""
    frames: dict[str, list[pl.LazyFrame]] = {"faithfulness": [], "predictions": [], "scores": []}
    for folder, index in folders:
        number = pl.col("sample").replace_strict(dict(enumerate(index.tolist())))
        for kind, parts in frames.items():
            parts.append(pl.scan_parquet(folder / kind / "*.parquet").with_columns(number))
    manifest = rollout.open_faithfulness(folders[0][0]).manifest  # of the same methods, in order
    tables = [pl.concat(frames[kind]) for kind in ("predictions", "scores")]
    return CohortFaithfulness(frames["faithfulness"], *tables, manifest=manifest)


def main(arguments: list[str] | None = None) -> None:
    """Load, train, evaluate and print."""
    chosen = parse(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        root = chosen.ehr_root or Path(scratch) / "tables"
        truth = write_synthetic_cohort(root, chosen.patients) if chosen.synthetic else None
        with contextlib.redirect_stdout(sys.stderr), quiet_pyhealth():
            dataset = mortality_samples(root, Path(scratch) / "cache")
        samples = list(dataset)
        patients = [sample["patient_id"] for sample in samples]
        labels = labels_of(samples, next(iter(dataset.output_schema)))
        print(f"{len(samples)} samples of {len(set(patients))} patients, {labels.sum():.0f} positive")
        folders = []
        for number, split in enumerate(list(splits_by_patient(patients, labels, chosen.folds))[: chosen.tested]):
            torch.manual_seed(number)
            model = train_transformer(dataset, samples, split, Recipe(epochs=chosen.epochs), seed=number).model.eval()
            folder = Path(scratch) / f"fold-{number}"
            rollout.evaluate_cohort(
                model, dataset.subset(split.test.tolist()), folder, methods=methods_of(model), metric=chosen.metric,
                threshold=float(labels[split.train].mean()), planted=planted_codes(truth) if truth else None,
            )  # fmt: skip
            folders.append((folder, split.test))
        found = together(folders)
        predictions = found.predictions.select("y_prob", "y_true").collect()
        area = auroc(*(predictions[name].list.first().to_numpy() for name in ("y_true", "y_prob")))
        print(f"AUROC on test patients {area:.3f}\n\n{told(found)}")
        if chosen.picture is not None:
            rollout.plot_faithfulness(found, chosen.picture)


if __name__ == "__main__":
    main()
