"""Mutated vocabularies, with the digest of what they say: read as they stand, or refused in one line."""

import hashlib
import json
import random
from contextlib import suppress
from pathlib import Path

import pytest

from rollout.data.vocabulary import read_vocabulary, write_vocabulary
from tests.support.bounds import bounded, refused
from tests.support.mutations import json_of, mutate_json, mutate_text
from tests.support.processors import CASES, dataset, fitted

SEEDS = 100
INPUTS = [
    case for case in CASES if case not in ("binary", "multiclass", "multiclass_numbers", "multilabel", "regression")
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.json"
    return write_vocabulary(dataset(**{case: fitted(case) for case in INPUTS}), path, "ab" * 32).read_bytes()


def mutated(draw: random.Random, whole: bytes) -> bytes:
    if draw.random() < 0.2:
        return mutate_text(draw, whole)
    content = json.loads(whole)
    if draw.random() < 0.7:  # deep down, where the numbers are
        state = content["inputs"][draw.choice(INPUTS)]["state"]
        key = draw.choice(list(state) or ["x"])
        state[key] = mutate_json(draw, state.get(key))
    else:
        content = mutate_json(draw, content)
    if isinstance(content, dict) and "sha256" in content:
        said = {key: value for key, value in content.items() if key not in ("sha256", "weights_sha256")}
        content["sha256"] = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return json_of(content)


def end(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    try:
        with bounded():
            vocabulary = read_vocabulary(path)
            inputs, outputs = vocabulary.build()
    except ValueError as error:
        refused(error)
        return "refused"
    said = json.loads(content)
    assert vocabulary.described() == {key: said[key] for key in ("schema_version", "inputs", "outputs")}
    assert (list(inputs), list(outputs)) == (list(said["inputs"]), list(said["outputs"]))
    with bounded():
        for case, processor in inputs.items():
            with suppress(Exception):  # PyHealth's own, which preparing samples tells
                processor.process(CASES.get(case, CASES["sequence"])[2])
    return "read"


def test_a_mutated_vocabulary_is_read_as_it_stands_or_refused_in_one_line(whole: bytes, tmp_path: Path) -> None:
    ends = []
    for seed in range(SEEDS):
        try:
            ends.append(end(tmp_path / "v.json", mutated(random.Random(seed), whole)))
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert ends.count("read") >= SEEDS // 12
    assert ends.count("refused") >= SEEDS // 3
