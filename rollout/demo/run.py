"""From tables to attributions: the whole path on a synthetic cohort or on real MIMIC-IV tables."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from tqdm import tqdm

from rollout.cohort.evaluation import evaluate_cohort
from rollout.cohort.summary import CohortRun
from rollout.data.collate import pyhealth_collate
from rollout.data.mimic import check_mimic_root, mimic_source
from rollout.data.names import names_for
from rollout.data.quiet import quiet_pyhealth
from rollout.data.samples import prepare_samples
from rollout.data.seal import seal_problem, seal_record
from rollout.data.synthetic import write_synthetic_cohort
from rollout.demo.training import (
    Recipe,
    Sample,
    Split,
    Trained,
    auroc,
    labels_of,
    split_patients,
    train_transformer,
)
from rollout.files import empty_folder, parse_json, usable_path, write_json, write_whole
from rollout.report import write_report
from rollout.results.faithfulness import CohortFaithfulness, open_faithfulness
from rollout.results.layout import CACHE
from rollout.results.plot_faithfulness import plot_faithfulness
from rollout.results.plots import plot_record, plot_top_codes
from rollout.results.ranking import planted_codes, planted_found, rank_codes
from rollout.runfile.evaluate import EVALUATED
from rollout.runfile.file import RUN, VOCABULARY, WEIGHTS, save_model
from rollout.runfile.settings import check_device
from rollout.runfile.start import attribute_run_file

DEMO, ATTRIBUTED, TESTED, WRITER = "demo.json", "attributed", "test_patients.txt", "rollout demo"
WRITTEN = (ATTRIBUTED, EVALUATED, "cohort", CACHE, RUN, WEIGHTS, VOCABULARY, "ranking.csv", "top_codes.png",
           "record.png", "faithfulness.png", "report.html", TESTED, DEMO)  # fmt: skip
"""All that a demo writes; what marks a folder as a demo's own comes last."""
COMPARED = ("rollout", "rollout:own_path=false", "value_norm", "chefer", "chefer_normalised", "frozen_gradient")
"""What is scored; a random ranking always is."""
WARM_UP = 2
TRUTH = "truth.json"


@dataclass
class Race:
    """Our interpreter and PyHealth's on the same batches, in turn: seconds of each, and how far they are apart."""

    samples: int = 0
    ours: float = 0.0
    stock: float = 0.0
    difference: float = 0.0

    @property
    def rates(self) -> tuple[float, float]:
        """Patient records per second of ours and of PyHealth's."""
        return self.samples / self.ours, self.samples / self.stock


@dataclass
class Demo:
    """What a demo run found; `report` prints it."""

    output: Path
    samples: int
    patients: int
    positive: float
    cohort: CohortRun
    trained: Trained
    test_auroc: float
    test_positives: int
    race: Race
    ranking: pl.DataFrame
    names: dict[str, dict[str, str]]
    planted: dict[str, list[str]]
    evaluated: CohortFaithfulness
    seconds: dict[str, float] = field(default_factory=dict)


def run_demo(
    output: str | Path,
    ehr_root: str | Path | None = None,
    *,
    patients: int = 6000,
    seed: int = 0,
    recipe: Recipe | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    workers: int = 1,
    overwrite: bool = False,
) -> Demo:
    """Read a cohort, train PyHealth's Transformer on it, attribute every sample, and write what was found.

    `output` gets `run.toml` with its `weights.pt` and `vocabulary.json`, `attributed/` (what
    `rollout attribute run.toml` writes), `evaluated/` (methods scored on the test patients), `report.html`,
    `test_patients.txt`, `ranking.csv`, `top_codes.png`, `record.png`, `faithfulness.png` and `demo.json`; and `cohort/`
    with the tables when they were made here. The truth of a synthetic cohort is opened after the ranking is made, to
    mark it.

    Args:
        output: New or empty folder.
        ehr_root: MIMIC-IV folder; None: a synthetic cohort.
        patients: Size of the synthetic cohort.
        seed: Of the cohort, the split and the training.
        recipe: Of the model and its training.
        batch_size: Samples in a batch of the race against PyHealth's interpreter.
        device: Where the model runs.
        workers: Processes PyHealth reads tables with.
        overwrite: Whether to replace the files of an earlier demo in `output`.

    Raises:
        ValueError: If an argument is out of range, `output` cannot be used, or `ehr_root` is no MIMIC-IV folder.
    """
    recipe = recipe or Recipe()
    _check_numbers(patients=patients, batch_size=batch_size, workers=workers, epochs=recipe.epochs)
    if seed < 0:
        raise ValueError(f"run_demo: seed must not be negative, got {seed}")
    root = None if ehr_root is None else check_mimic_root(ehr_root)
    where = check_device(device, "run_demo: device")
    if overwrite:
        _remove_earlier(usable_path(output, "output"))
    folder = empty_folder(output, "output")
    wrote = [name for name in WRITTEN if root is None or name != "cohort"]
    _write_mark(folder, {"status": "running"}, wrote)
    clock = _Clock()
    if root is None:
        root = _write_tables(folder / "cohort", patients, seed)
        clock.lap("tables")
    print(f"Reading the tables in {root} with PyHealth")
    source, cache = mimic_source(root, workers=workers), folder / CACHE
    dataset = prepare_samples(source, cache)
    samples: list[Sample] = list(dataset)
    names = names_for(root, dataset.input_processors)
    labels = labels_of(samples, next(iter(dataset.output_schema)))
    split = split_patients([sample["patient_id"] for sample in samples], labels, seed)
    clock.lap("PyHealth samples")
    trained = train_transformer(dataset, samples, split, recipe, device=where, seed=seed)
    clock.lap("training")
    settings = {"output": ATTRIBUTED} if where == "cpu" else {"output": ATTRIBUTED, "device": where}
    run_file = save_model(
        trained.model, dataset, folder, arguments=recipe.arguments, source=source, run=settings, cache=cache
    )
    cohort = attribute_run_file(run_file)
    clock.lap("attribution, written")
    race = _race(samples, trained.model, batch_size)
    clock.lap("attribution, both")
    probability = _probabilities(cohort.out, len(samples))
    ranking, planted = _rank(root, folder, cohort.out)
    plot_top_codes(ranking, names, planted, folder / "top_codes.png")
    _draw_record(folder / "record.png", cohort.out, samples, probability, labels, split, names, planted)
    clock.lap("ranking and pictures")
    evaluated = _evaluate(trained.model, dataset, split.test, planted, folder)
    clock.lap("evaluation")
    write_report(cohort.out, folder / "report.html", evaluation=evaluated)
    clock.lap("report")
    demo = Demo(
        output=folder,
        samples=len(samples),
        patients=len({sample["patient_id"] for sample in samples}),
        positive=float(labels.mean()),
        cohort=cohort,
        trained=trained,
        test_auroc=auroc(labels[split.test], probability[split.test]),
        test_positives=int(labels[split.test].sum()),
        race=race,
        ranking=ranking,
        names=names,
        planted=planted,
        evaluated=open_faithfulness(evaluated),
        seconds=clock.laps,
    )
    _write_figures(demo, seed, wrote)
    return demo


def _write_tables(root: Path, patients: int, seed: int) -> Path:
    print(f"Writing a synthetic cohort of {patients} patients (seed {seed})")
    write_synthetic_cohort(root, patients, seed)
    return root


def _rank(root: Path, folder: Path, attributed: Path) -> tuple[pl.DataFrame, dict[str, list[str]]]:
    """The ranking of codes, written down; only then the codes that were planted, if the tables are synthetic."""
    ranking = rank_codes(pl.read_parquet(attributed / "attributions" / "*.parquet"))
    ranking.write_csv(folder / "ranking.csv")
    truth = root / TRUTH
    return ranking, planted_codes(json.loads(truth.read_text())) if truth.is_file() else {}


def _draw_record(
    path: Path,
    attributed: Path,
    samples: Sequence[Sample],
    probability: np.ndarray,
    labels: np.ndarray,
    split: Split,
    names: dict[str, dict[str, str]],
    planted: dict[str, list[str]],
) -> None:
    """Draw the record of a telling sample."""
    rows = pl.read_parquet(attributed / "attributions" / "*.parquet")
    shown = _telling_sample(rows, probability, labels, split)
    caption = _caption(samples[shown], shown, probability, labels)
    plot_record(rows.filter(pl.col("sample") == shown), names, planted, caption, path)


def _evaluate(model: Any, dataset: Any, test: np.ndarray, planted: dict[str, list[str]], folder: Path) -> Path:
    """Score a few methods on the test patients, and draw it."""
    tested = dataset.subset(test.tolist())
    patients = dict.fromkeys(tested[number]["patient_id"] for number in range(len(tested)))
    write_whole(folder / TESTED, "\n".join([*patients, ""]).encode())
    run = evaluate_cohort(model, tested, folder / EVALUATED, methods=COMPARED, planted=planted or None)
    found = open_faithfulness(run.out)
    plot_faithfulness(found, folder / "faithfulness.png")
    return run.out


def _race(samples: Sequence[Sample], model: Any, batch_size: int) -> Race:
    """Attribute every sample with both interpreters, batch by batch in turn, the first to go changing."""
    with quiet_pyhealth():
        from pyhealth.interpret.methods import AttentionRollout as StockRollout

        from rollout.pyhealth import AttentionRollout

    pair, race = (AttentionRollout(model), StockRollout(model)), Race()
    for start in range(0, min(WARM_UP * batch_size, len(samples)), batch_size):
        batch = pyhealth_collate(samples[start : start + batch_size])
        for interpreter in pair:
            interpreter.attribute(**batch)
    starts = range(0, len(samples), batch_size)
    for number, start in enumerate(tqdm(starts, desc="compare", unit="batch")):
        chosen = samples[start : start + batch_size]
        ours, theirs = _raced(race, pair, pyhealth_collate(chosen), number)
        race.samples += len(chosen)
        race.difference = max(race.difference, *(_distance(ours[key], theirs[key]) for key in ours))
    return race


def _raced(race: Race, pair: tuple[Any, Any], batch: dict[str, Any], number: int) -> tuple[Any, Any]:
    """Run both on one batch; add their seconds to the race."""
    results: list[Any] = [None, None]
    for which in (0, 1) if number % 2 == 0 else (1, 0):
        _synchronize()
        begun = time.perf_counter()
        results[which] = pair[which].attribute(**batch)
        _synchronize()
        spent = time.perf_counter() - begun
        if which == 0:
            race.ours += spent
        else:
            race.stock += spent
    return results[0], results[1]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.detach() - right.detach()).abs().max()) if left.numel() else 0.0


def _probabilities(attributed: Path, samples: int) -> np.ndarray:
    """The predicted probability of each sample, float32 [samples]; nan where a sample failed."""
    table = pl.read_parquet(attributed / "predictions" / "*.parquet", columns=["sample", "y_prob"])
    result = np.full(samples, np.nan, dtype=np.float32)
    result[table["sample"].to_numpy()] = table["y_prob"].list.first().to_numpy()
    return result


def _telling_sample(rows: pl.DataFrame, probability: np.ndarray, labels: np.ndarray, split: Split) -> int:
    """The sample to draw: the test patient with a positive label and the highest prediction, if records are readable.

    Readable is 12 to 150 entries in all; without such a one, the sample with the highest prediction.
    """
    sizes = np.zeros(len(probability), dtype=np.int64)
    counted = rows.group_by("sample").len()
    sizes[counted["sample"].to_numpy()] = counted["len"].to_numpy()
    in_test = np.isin(np.arange(len(probability)), split.test)
    for wanted in (in_test & (labels > 0.5), labels > 0.5, in_test):
        fit = np.flatnonzero(wanted & (sizes >= 12) & (sizes <= 150))
        if len(fit):
            return int(fit[np.argmax(probability[fit])])
    return int(np.argmax(probability))


def _caption(sample: Sample, number: int, probability: np.ndarray, labels: np.ndarray) -> str:
    outcome = "died" if labels[number] > 0.5 else "survived"
    return (
        f"Patient {sample['patient_id']}, admission {sample['visit_id']}: relevance of each code\n"
        f"predicted risk of death in the next admission {probability[number]:.0%}; {outcome}"
    )


def _write_figures(demo: Demo, seed: int, wrote: Sequence[str]) -> None:
    found = planted_found(demo.ranking, demo.planted)
    ours, stock = demo.race.rates
    figures = {
        "status": "complete",
        "seed": seed,
        "samples": demo.samples,
        "tokens": demo.cohort.tokens,
        "test_auroc": demo.test_auroc,
        "epoch": demo.trained.epoch,
        "validation_auroc": demo.trained.validation_auroc,
        "patients_per_second": {"ours": round(ours, 1), "pyhealth": round(stock, 1)},
        "largest_difference": demo.race.difference,
        "planted_in_top_k": {key: {"found": hit, "k": k} for key, (hit, k) in found.items()},
        "evaluated": demo.evaluated.summary().to_dicts(),
        "seconds": demo.seconds,
    }
    _write_mark(demo.output, figures, wrote)


def _write_mark(folder: Path, figures: Mapping[str, Any], wrote: Sequence[str]) -> None:
    """What lets a later demo replace this one: what was written, under this user's seal."""
    record, _ = seal_record({"written_by": WRITER, "wrote": list(wrote), **figures})
    write_json(record, folder / DEMO)


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Note the seconds since the last lap."""
        now = time.perf_counter()
        self.laps[name], self.last = round(now - self.last, 2), now


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"run_demo: {name} must be at least 1, got {value}")


def _remove_earlier(folder: Path) -> None:
    """Remove what an earlier demo of this user wrote there, finished or not, and nothing else."""
    try:
        record = parse_json((folder / DEMO).read_bytes())
    except (OSError, ValueError):
        return
    if not isinstance(record, dict) or record.get("written_by") != WRITER or seal_problem(record) is not None:
        return
    for name in WRITTEN:  # the mark last
        path = folder / name
        if name not in record["wrote"] or path.is_symlink():
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
