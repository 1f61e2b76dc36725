"""Mutated run files: read as they stand, or refused in one line."""

import random
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.files import parse_json
from rollout.runfile import RunFile, read_run_file
from rollout.runfile.toml import write_toml
from tests.support.bounds import bounded, refused
from tests.support.mutations import json_of, mutate_json, mutate_text, mutate_toml

SEEDS = 200


@pytest.fixture(scope="module")
def bundle(trained: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(trained["folder"], tmp_path_factory.mktemp("fuzz") / "bundle")


def mutated_run_file(draw: random.Random, folder: Path) -> Path:
    """A run file of the folder with something changed, as TOML or JSON, in its values or in its text."""
    tables = tomllib.loads((folder / "run.toml").read_text())
    toml, json_ = folder / "fuzz.toml", folder / "fuzz.json"
    how = draw.random()
    if how < 0.15:
        json_.write_bytes(mutate_text(draw, json_of(tables)))
        return json_
    if how < 0.4:
        toml.write_bytes(mutate_toml(draw, (folder / "run.toml").read_bytes()))
        return toml
    for _ in range(draw.choice((1, 1, 2))):
        tables = mutate_json(draw, tables)
    try:
        return write_toml(tables, toml)
    except (ValueError, AttributeError, RecursionError):  # it has no form in TOML, or is nested too deep to be written
        json_.write_bytes(json_of(tables))
        return json_


def as_it_stands(run: RunFile, path: Path) -> None:
    """A run file that was read says what stands in it."""
    text = path.read_bytes().decode("utf-8-sig")
    tables = parse_json(text) if path.suffix == ".json" else tomllib.loads(text)
    model, dataset, task, settings = (tables.get(name, {}) for name in ("model", "dataset", "task", "run"))
    assert run.model == model["class"] == "Transformer"
    assert run.arguments == model.get("arguments", {})
    assert run.weights == path.parent / model["weights"]
    assert (run.vocabulary is None) == (model["vocabulary"] == "refit")
    assert (run.source.dataset, run.source.task) == (dataset["class"], task["class"])
    assert run.source.root == path.parent / dataset["root"]
    assert run.source.workers == dataset.get("workers", 1)
    assert run.source.dataset_arguments == dataset.get("arguments", {})
    assert run.source.task_arguments == task.get("arguments", {})
    assert run.cache == (path.parent / dataset["cache"] if "cache" in dataset else None)
    assert run.output == (path.parent / settings["output"] if "output" in settings else None)
    assert run.settings == {key: value for key, value in settings.items() if key != "output"}


def load(run: RunFile, trained: dict[str, Any], tmp_path: Path) -> None:
    """Where the samples are prepared already, model and samples are those of the training, or refused."""
    prepared = read_run_file(trained["path"])
    if (run.source, run.vocabulary) != (prepared.source, prepared.vocabulary) or run.cache is None:
        return
    try:
        model, dataset = run.load(tmp_path)
    except ValueError as error:
        refused(error)
        return
    assert len(dataset) == len(trained["dataset"])
    state = trained["model"].state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def run_file(draw: random.Random, bundle: Path, trained: dict[str, Any], tmp_path: Path) -> str:
    path = mutated_run_file(draw, bundle)
    before = sorted(bundle.rglob("*"))
    try:
        with bounded():
            run = read_run_file(path)
    except ValueError as error:
        refused(error)
        return "refused"
    finally:
        assert sorted(bundle.rglob("*")) == before
    as_it_stands(run, path)
    with bounded():
        load(run, trained, tmp_path)
    return "read"


def end(seed: int, bundle: Path, trained: dict[str, Any], tmp_path: Path) -> str:
    """What comes of the file of a seed: `read` or `refused`."""
    draw = random.Random(seed)
    try:
        return run_file(draw, bundle, trained, tmp_path)
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise


def test_a_mutated_file_is_read_as_it_stands_or_refused_in_one_line(
    trained: dict[str, Any], bundle: Path, tmp_path: Path
) -> None:
    ends = [end(seed, bundle, trained, tmp_path) for seed in range(SEEDS)]
    assert ends.count("read") >= SEEDS // 12
    assert ends.count("refused") >= SEEDS // 3
