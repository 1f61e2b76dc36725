"""Three models on MIMIC-IV tables, each left with a run file for the command line.

    python examples/mimic4_run_files.py --ehr_root <MIMIC-IV folder> --output <folder>
    rollout attribute <folder>/mortality/run.toml
    rollout attribute <folder>/length_of_stay/run.toml
    rollout attribute <folder>/in_hospital_mortality/run.toml

A PyHealth Transformer is trained for a few seconds on each of three tasks: death in the next admission (codes), length
of stay in ten classes (codes), and death in this admission (a time series of lab values). That is enough for a model to
attribute with, not for one to learn from. `save_model` writes its weights, the vocabulary it was trained with and the
run file; `rollout attribute` reads the same prepared samples, continues where it is stopped, and takes `--output`,
`--method` and more.

Needs the pyhealth and cohort extras and the table `labevents`; about two minutes on the 100 patients of the MIMIC-IV
demo, most of it PyHealth reading the tables. PyHealth's own progress goes to stderr.
"""

import argparse
from pathlib import Path

from rollout.data.mimic import CODE_TABLES, check_mimic_root, mimic_source
from rollout.demo.training import Recipe, labels_of, split_patients, train_transformer
from rollout.files import empty_folder
from rollout.runfile import CACHE, prepare_samples, save_model

TASKS = {
    "mortality": ("MortalityPredictionMIMIC4", CODE_TABLES, {}),
    "length_of_stay": ("LengthOfStayPredictionMIMIC4", CODE_TABLES, {}),
    "in_hospital_mortality": ("InHospitalMortalityMIMIC4", ("labevents",), {"equal_lengths": True}),
}
"""PyHealth's Transformer does not mask the padding of a time series: in batches of equal lengths there is none."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ehr_root", type=Path, required=True, help="folder with MIMIC-IV's hosp/ and icu/")
    parser.add_argument("--output", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--task", choices=TASKS, nargs="+", default=list(TASKS), help="default: all three")
    parser.add_argument("--epochs", type=int, default=2)
    chosen = parser.parse_args()
    try:
        if chosen.epochs < 1:
            raise ValueError(f"--epochs must be at least 1, got {chosen.epochs}")
        check_mimic_root(chosen.ehr_root, (*CODE_TABLES, "labevents"))
        output = empty_folder(chosen.output, "--output")
    except ValueError as error:
        parser.error(str(error))
    for name in chosen.task:
        leave_run_file(output / name, chosen.ehr_root, *TASKS[name], chosen.epochs)


def leave_run_file(
    folder: Path, ehr_root: Path, task: str, tables: tuple[str, ...], run: dict[str, bool], epochs: int
) -> None:
    """Train a model for a task, and write it with its run file."""
    source = mimic_source(ehr_root, task, tables)
    dataset = prepare_samples(source, folder / CACHE)
    samples = list(dataset)
    labels = labels_of(samples, next(iter(dataset.output_schema)))
    split = split_patients([sample["patient_id"] for sample in samples], labels)
    recipe = Recipe(epochs=epochs, embedding_dim=32)
    model = train_transformer(dataset, samples, split, recipe, progress=False).model
    path = save_model(model, dataset, folder, arguments=recipe.arguments, source=source, run=run, cache=folder / CACHE)
    print(f"{task}: {len(samples)} samples of {len(dataset.patient_to_index)} patients, features "
          f"{', '.join(dataset.input_schema)}\n  rollout attribute {path}")  # fmt: skip


if __name__ == "__main__":
    main()
