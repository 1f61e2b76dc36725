"""Are attention rollout's explanations faithful? PyHealth's metrics and ours, on the MIMIC-IV demo or a known truth.

    python examples/attention_rollout_benchmark_mimic4_demo.py --ehr_root <folder of the MIMIC-IV demo>
    python examples/attention_rollout_benchmark_mimic4_demo.py --synthetic

A small PyHealth Transformer is trained from scratch for each fold and seed. On the patients it has not seen, random
scores, PyHealth's CheferRelevance and AttentionRollout, and ours are scored by comprehensiveness and sufficiency.
The two rollouts must agree to rounding, or the script exits with status 1.

What makes it a comparison:
- Folds are by patient, so each patient is tested once per seed. The epoch is chosen on a validation fold; the test fold
  has no say. (The vocabulary is that of all patients: a code no training patient has keeps its initial embedding.)
- The outcome is rare, so a patient counts as predicted positive from the share of positives in training on, not 0.5.
- PyHealth's metrics are shown as their defaults stand, and again one sample at a time, where there is no padding to
  reward, with a filter that ignores nobody. What they cannot do is follow the negative class of an unsigned relevance:
  a NEGATIVE sample has its attributions negated, so that the least relevant codes go first. `rollout.evaluate` follows
  the probability of the class that was predicted, and deletes real codes only.
  It also takes codes out where PyHealth blanks them in place: when the first code goes, PyHealth's Transformer, which
  predicts from position 0, reads a blank there, and that moves the probability more than any code does.
- Intervals are bootstrapped by patient, and each method is compared with Random on the same samples.

Needs the pyhealth and cohort extras. PyHealth's own progress goes to stderr.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor
from tqdm import tqdm

import rollout
from rollout.cohort.rows import attribution_table, feature_decoders
from rollout.data.collate import pyhealth_collate
from rollout.data.mimic import check_mimic_root, mortality_samples
from rollout.data.quiet import quiet_pyhealth
from rollout.data.synthetic import write_synthetic_cohort
from rollout.demo.training import Recipe, Split, labels_of, train_transformer
from rollout.evaluate import faithfulness
from rollout.intervals import Interval, bootstrap_auroc, bootstrap_mean
from rollout.results.ranking import planted_codes, planted_found, rank_codes

RANDOM, CHEFER, STOCK, OURS = "Random", "Chefer (PyHealth)", "Rollout (PyHealth)", "Rollout (ours)"
CHEFER_PREDICTED = "Chefer, predicted class"
METRICS = ("comprehensiveness", "sufficiency")
TOLERANCE = 1e-5

Sample = dict[str, Any]
Explainer = Callable[..., dict[str, Tensor]]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; a folder without MIMIC-IV's tables is refused here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ehr_root", type=Path, help="folder with MIMIC-IV's hosp/ and icu/")
    source.add_argument("--synthetic", action="store_true", help="an invented cohort whose risk codes are known")
    parser.add_argument(
        "--task", choices=("mortality", "long_stay"), default="mortality", help="long_stay: over a week"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, help="of split, training and Random; default 3, --synthetic 2")
    parser.add_argument("--folds", type=int, default=5, help="1/folds of the patients test, as many validate")
    parser.add_argument("--splits", type=int, help="folds tested per seed; default: all, with --synthetic 1")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, help="validation chooses among them")
    parser.add_argument("--threads", type=int, default=1, help="batches are small: more gain little")
    parser.add_argument("--patients", type=int, default=8000, help="size of the synthetic cohort")
    parser.add_argument(
        "--pyhealth_samples", type=int, default=120, help="of the first seed, for PyHealth's slow metrics"
    )
    chosen = parser.parse_args(arguments)
    if chosen.seeds is None:
        chosen.seeds = 2 if chosen.synthetic else 3
    if chosen.splits is None:
        chosen.splits = 1 if chosen.synthetic else chosen.folds
    ranges = {"seeds": (1, 100), "folds": (3, 50), "splits": (1, chosen.folds), "epochs": (1, 1000)}
    ranges |= {"threads": (1, 1024), "patients": (1, 10**6), "pyhealth_samples": (0, 10**6)}
    for name, (low, high) in ranges.items():
        if not low <= getattr(chosen, name) <= high:
            parser.error(f"--{name} must be in {low}..{high}, got {getattr(chosen, name)}")
    if chosen.synthetic and chosen.task != "mortality":
        parser.error(f"--task must be mortality with --synthetic, whose codes decide nothing else; got {chosen.task}")
    if chosen.device != "cpu" and not (chosen.device.startswith("cuda") and torch.cuda.is_available()):
        parser.error(f"--device must be cpu, or cuda where torch finds a GPU; got {chosen.device}")
    if chosen.ehr_root is not None:
        try:
            check_mimic_root(chosen.ehr_root)
        except ValueError as error:
            parser.error(str(error))
    return chosen


def load(root: Path, task: str, cache: Path) -> Any:
    """The samples of the task as a PyHealth dataset."""
    with contextlib.redirect_stdout(sys.stderr), quiet_pyhealth():
        if task == "mortality":
            return mortality_samples(root, cache)
        from pyhealth.datasets import MIMIC4EHRDataset
        from pyhealth.tasks import LengthOfStayPredictionMIMIC4

        class LongStay(LengthOfStayPredictionMIMIC4):
            """Whether the stay is longer than a week."""

            task_name = "LongStayMIMIC4"
            output_schema = {"long_stay": "binary"}  # noqa: RUF012

            def __call__(self, patient: Any) -> list[Sample]:
                return [{**sample, "long_stay": int(sample.pop("los") > 7)} for sample in super().__call__(patient)]

        tables = ["diagnoses_icd", "procedures_icd", "prescriptions"]
        return MIMIC4EHRDataset(root=str(root), tables=tables, cache_dir=str(cache)).set_task(LongStay())


def splits_by_patient(patients: list[str], labels: np.ndarray, folds: int, seed: int) -> Iterator[Split]:
    """Fold k tests, fold k + 1 validates, the rest trains; patients with a positive label are spread evenly."""
    names, owner = np.unique(patients, return_inverse=True)
    positive = np.bincount(owner, labels) > 0
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(np.flatnonzero(positive)), rng.permutation(np.flatnonzero(~positive))])
    fold = np.empty(len(names), dtype=np.int64)
    fold[order] = np.arange(len(names)) % folds
    for test in range(folds):
        validation = (test + 1) % folds
        part = fold[owner]
        yield Split(
            np.flatnonzero((part != test) & (part != validation)),
            np.flatnonzero(part == validation),
            np.flatnonzero(part == test),
        )


def explainers(model: Any, threshold: float) -> dict[str, Explainer]:
    """What is compared, by name."""
    from pyhealth.interpret.methods import AttentionRollout, CheferRelevance
    from pyhealth.interpret.methods.baseline import RandomBaseline

    from rollout.pyhealth import AttentionRollout as OurRollout

    return {
        RANDOM: RandomBaseline(model).attribute,
        CHEFER: CheferRelevance(model).attribute,
        CHEFER_PREDICTED: chefer_of_predicted_class(model, threshold),
        STOCK: AttentionRollout(model).attribute,
        OURS: OurRollout(model).attribute,
    }


def chefer_of_predicted_class(model: Any, threshold: float) -> Explainer:
    """Chefer's relevance for the class that is predicted.

    PyHealth's is for the positive class always: a binary model has one logit. The other class's logit is its opposite,
    and so are the gradients.
    """
    from pyhealth.interpret.methods import CheferRelevance

    chefer = CheferRelevance(model)

    def explain(**batch: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            sign = torch.where(model(**batch)["y_prob"] >= threshold, 1.0, -1.0)[:, :, None, None]
        chefer.attribute(**batch)
        relevance = {}
        for key, layers in model.get_attention_layers().items():
            maps, gradients = [layer[0] for layer in layers], [layer[1] * sign for layer in layers]
            relevance[key] = rollout.attention_rollout(maps, gradients=gradients, method="chefer")
        return model.get_relevance_tensor(relevance, **batch)

    return explain


def chunks(samples: list[Sample], size: int) -> Iterator[list[Sample]]:
    """The samples in chunks of like length."""
    ordered = sorted(samples, key=lambda sample: len(sample["drugs"]))
    return (ordered[first : first + size] for first in range(0, len(ordered), size))


class Results:
    """What the test folds gave, one row per sample and model, and the largest difference between the two rollouts."""

    def __init__(self, dataset: Any, keep_rows: bool) -> None:
        self.label = next(iter(dataset.output_schema))
        self.decoders = feature_decoders(dataset) if keep_rows else {}
        self.rows: dict[str, list[Any]] = {}
        self.columns: dict[str, list[Any]] = {name: [] for name in ("patient", "model", "label", "positive", "target")}
        self.scores: dict[tuple[str, str], list[float]] = {}
        self.difference = 0.0

    def add(self, model: Any, number: int, samples: list[Sample], threshold: float) -> None:
        """Explain and score the test samples of a model."""
        methods = explainers(model, threshold)
        for chunk in chunks(samples, 32):
            batch, before = pyhealth_collate(chunk), len(self.columns["model"])
            given = {name: explain(**batch) for name, explain in methods.items()}
            gaps = [(given[OURS][key] - given[STOCK][key]).abs().max() for key in given[STOCK]]
            self.difference = float(torch.stack([*gaps, torch.tensor(self.difference).to(gaps[0])]).max())
            for name, attributions in given.items():
                if self.decoders:
                    table = attribution_table(chunk, range(before, before + len(chunk)), attributions, self.decoders)
                    self.rows.setdefault(name, []).append(pl.from_arrow(table))
                found = faithfulness(model, batch, attributions, threshold=threshold)
                for metric in METRICS:
                    self.scores.setdefault((name, metric), []).extend(getattr(found, metric).tolist())
            positive = torch.where(found.target == 1, found.probability, 1 - found.probability)
            rows = (batch["patient_id"], [number] * len(positive), batch[self.label][:, 0].tolist(), positive.tolist())
            for column, values in zip(self.columns.values(), (*rows, found.target.tolist()), strict=True):
                column.extend(values)

    def interval(self, method: str, metric: str, *, minus: str | None = None, target: int | None = None) -> Interval:
        """The mean of a metric, or of its difference to another method, of the samples predicted to be `target`."""
        value = np.array(self.scores[method, metric])
        if minus is not None:
            value = value - np.array(self.scores[minus, metric])
        chosen = np.flatnonzero([target in (None, t) for t in self.columns["target"]])
        return bootstrap_mean(value[chosen], [self.columns["patient"][i] for i in chosen])

    def auroc(self) -> Interval:
        """AUROC, comparing only samples that the same model scored."""
        columns = self.columns
        return bootstrap_auroc(columns["label"], columns["positive"], columns["patient"], strata=columns["model"])


class PyHealthMetrics:
    """PyHealth's evaluate_attribution, method by method, with the score of each sample kept for the intervals."""

    def __init__(self, batch_size: int, options: dict[str, Any]) -> None:
        self.batch_size = batch_size
        self.options = options
        self.total = 0
        self.scores: dict[tuple[str, str], list[tuple[str, float]]] = {}

    def add(self, model: Any, samples: list[Sample], threshold: float) -> None:
        """Score test samples of a model."""
        if not samples:
            return
        from pyhealth.metrics.interpretability import Evaluator

        self.total += len(samples)
        keep = self.scores

        class Recording(Evaluator):
            name = ""

            def evaluate(self, inputs: dict[str, Any], *arguments: Any, **options: Any) -> dict[str, Any]:
                found = super().evaluate(inputs, *arguments, **options)
                for metric, (score, valid) in found.items():
                    rows = zip(inputs["patient_id"], score.tolist(), valid.tolist(), strict=True)
                    keep.setdefault((self.name, metric), []).extend((p, s) for p, s, v in rows if v)
                return found

        with contextlib.redirect_stdout(io.StringIO()):
            evaluator = Recording(model, **self.options)
            loader = [
                pyhealth_collate(samples[i : i + self.batch_size]) for i in range(0, len(samples), self.batch_size)
            ]
            for name, explain in explainers(model, threshold).items():
                evaluator.name = name
                evaluator.evaluate_attribution(loader, SimpleNamespace(attribute=explain))

    def table(self) -> None:
        """Print mean and interval of each method; nan where PyHealth scored nobody."""
        print(f"{'':<26}{'scored':>10}   {'comprehensiveness':<28}{'sufficiency':<28}")
        for name in dict.fromkeys(name for name, _ in self.scores):
            rows = [self.scores[name, metric] for metric in METRICS]
            texts = [_mean_text([score for _, score in row], [patient for patient, _ in row]) for row in rows]
            print(f"{name:<26}{f'{len(rows[0])}/{self.total}':>10}   {texts[0]:<28}{texts[1]:<28}")


def everybody(probability: Tensor, kind: str) -> Tensor:
    """PyHealth sample filter: each sample counts, and no attribution is negated."""
    return torch.ones_like(probability, dtype=torch.long)


def _mean_text(values: list[float], patients: list[str]) -> str:
    """Mean and interval; the mean alone of fewer than two patients, nan of none."""
    if len(set(patients)) < 2:
        return f"{np.mean(values):+.4f}" if values else "nan"
    return str(bootstrap_mean(values, patients))


def print_planted(results: Results, truth: dict[str, Any]) -> None:
    """How many planted codes each method ranks in the top k of their feature, k being how many were planted there."""
    planted = planted_codes(truth)
    rankings = {name: rank_codes(pl.concat(rows)) for name, rows in results.rows.items()}
    by_lift = pl.col("lift").rank("ordinal", descending=True).over("feature").alias("rank")
    for title, change in (("by rank_codes", []), ("by mean lift", [by_lift])):
        print(f"{title:<26}{'all':>10}" + "".join(f"{feature:>14}" for feature in planted))
        for name, ranking in rankings.items():
            found = planted_found(ranking.with_columns(change), planted)
            hits, places = (sum(column) for column in zip(*found.values(), strict=True))
            cells = [f"{hits} of {places}".rjust(10), *(f"{hit} of {k}".rjust(14) for hit, k in found.values())]
            print(f"{name:<26}" + "".join(cells))


def print_faithfulness(results: Results) -> None:
    """The table of `rollout.evaluate`: each metric, and its difference to Random."""
    methods = list(dict.fromkeys(name for name, _ in results.scores))
    heads = [f"{metric}{end}" for metric in METRICS for end in ("", " - Random")]
    print(f"{'':<26}" + "".join(f"{head:<29}" for head in heads))
    for name in methods:
        cells = [str(results.interval(name, metric, minus=minus)) for metric in METRICS for minus in (None, RANDOM)]
        print(f"{name:<26}" + "".join(f"{cell:<29}" for cell in cells))
    for target, word in ((1, "positive"), (0, "negative")):
        rows = [i for i, t in enumerate(results.columns["target"]) if t == target]
        patients = {results.columns["patient"][i] for i in rows}
        print(f"\n  predicted {word}: {len(rows)} of {len(results.columns['target'])} rows, {len(patients)} patients")
        if len(patients) < 2:
            print("    too few patients for an interval")
            continue
        for name in methods:
            cells = [str(results.interval(name, metric, target=target)) for metric in METRICS]
            print(f"  {name:<24}" + "".join(f"{cell:<58}" for cell in cells))


def agree(difference: float) -> bool:
    """Whether the two rollouts are equal to rounding; NaN is not."""
    return difference <= TOLERANCE


def conclusion(results: Results) -> list[str]:
    """What the intervals allow to say, in words."""
    area = results.auroc()
    lines = [f"The models predict the outcome: AUROC {area.low:.2f} to {area.high:.2f}."]
    if not area.excludes(0.5):
        lines = [
            f"{area.groups} patients do not show that the models predict the outcome: AUROC {area.low:.2f} to "
            f"{area.high:.2f} holds 0.5. How well such models are explained says little about the methods."
        ]
    telling = False
    for method in (CHEFER, CHEFER_PREDICTED, OURS):
        differences = {metric: results.interval(method, metric, minus=RANDOM) for metric in METRICS}
        telling = telling or any(difference.excludes(0.0) for difference in differences.values())
        verdicts = [f"{metric} {_verdict(difference, metric)}" for metric, difference in differences.items()]
        lines.append(f"{method}: {'; '.join(verdicts)}.")
    if not telling:
        lines.append(f"{area.groups} patients are not enough to tell any of these methods from Random.")
    return lines


def _verdict(difference: Interval, metric: str) -> str:
    if not difference.excludes(0.0):
        return f"not told apart from Random's (±{(difference.high - difference.low) / 2:.3f} would not show)"
    better = difference.estimate > 0 if metric == "comprehensiveness" else difference.estimate < 0
    return "better than Random's" if better else "worse than Random's"


def main(arguments: list[str] | None = None) -> int:
    """Load, train, explain, score and print; the exit status."""
    chosen = parse(arguments)
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as scratch:
        root = chosen.ehr_root or Path(scratch) / "tables"
        truth = write_synthetic_cohort(root, chosen.patients) if chosen.synthetic else {}
        dataset = load(root, chosen.task, Path(scratch) / "cache")
        samples = [dataset[i] for i in range(len(dataset))]
    patients = [sample["patient_id"] for sample in samples]
    labels = labels_of(samples, next(iter(dataset.output_schema)))
    print(f"{'Synthetic cohort' if truth else root}, task {chosen.task}")
    print(f"{len(samples)} samples of {len(set(patients))} patients, {labels.sum():.0f} positive")
    recipe = Recipe(epochs=chosen.epochs)
    print(f"PyHealth's Transformer, {recipe}")
    results = Results(dataset, keep_rows=bool(truth))
    pyhealth = (PyHealthMetrics(32, {}), PyHealthMetrics(1, {"sample_filter": everybody}))
    epochs = []
    jobs = [
        (seed, split)
        for seed in range(chosen.seeds)
        for split in list(splits_by_patient(patients, labels, chosen.folds, seed))[: chosen.splits]
    ]
    for number, (seed, split) in enumerate(tqdm(jobs, desc="models", unit="model")):
        trained = train_transformer(dataset, samples, split, recipe, device=chosen.device, seed=number)
        epochs.append(trained.epoch)
        threshold = float(labels[split.train].mean())
        test = [samples[i] for i in split.test]
        torch.manual_seed(number)
        results.add(trained.model, number, test, threshold)
        left = chosen.pyhealth_samples - pyhealth[0].total if seed == 0 else 0
        for metrics in pyhealth:
            metrics.add(trained.model, test[:left], threshold)
    print(f"{len(epochs)} models: {chosen.seeds} seeds, {chosen.splits} of {chosen.folds} folds by patient each")
    print(f"epochs chosen on validation patients: {' '.join(map(str, epochs))}")
    report(results, pyhealth, truth)
    return 0 if agree(results.difference) else 1


def report(results: Results, pyhealth: tuple[PyHealthMetrics, PyHealthMetrics], truth: dict[str, Any]) -> None:
    """Print the tables and what they mean."""
    area = results.auroc()
    print(f"AUROC on test patients {area.estimate:.3f} [{area.low:.3f}, {area.high:.3f}]")
    print(f"All intervals: 95 %, bootstrapped by patient ({area.groups} tested).")
    print("\n1. PyHealth's evaluate_attribution as its defaults stand: batches of 32, P < 0.5 ignored, padding counted")
    pyhealth[0].table()
    print("\n2. PyHealth's evaluate_attribution, one sample at a time, nobody ignored: the drop of P(positive)")
    print("   (codes are blanked in place; a code that stands in a record twice ties, and rounding decides which goes)")
    pyhealth[1].table()
    print("\n3. rollout.evaluate: real codes taken out, the drop of P(predicted class), every seed")
    print("   (comprehensiveness: higher is better; sufficiency: lower is better)")
    print_faithfulness(results)
    if truth:
        print("\n4. Planted codes in the top k of their feature, on test patients")
        print_planted(results, truth)
    print(f"\nLargest difference between PyHealth's rollout and ours: {results.difference:.1e}")
    if not agree(results.difference):
        print(f"FAILED: it must not exceed {TOLERANCE:.0e}")
    print("\nWhat this shows:")
    for line in conclusion(results):
        print(f"- {line}")


if __name__ == "__main__":
    sys.exit(main())
