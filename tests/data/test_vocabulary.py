"""Vocabularies: processors come back from JSON and give the same tensors; those that cannot are refused by name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pyhealth import processors

from rollout.data.vocabulary import read_vocabulary, vocabulary_of, write_vocabulary
from tests.support.processors import CASES, ODD, dataset, fitted


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    return left == right


@pytest.mark.parametrize("case", list(CASES))
def test_a_processor_comes_back_and_gives_the_same_tensors(case: str, tmp_path: Path) -> None:
    before = fitted(case)
    path = write_vocabulary(dataset(feature=before), tmp_path / "vocabulary.json")
    after = read_vocabulary(path).build()[0]["feature"]
    assert type(after) is type(before)
    assert vars(after) == vars(before)
    assert same(after.process(CASES[case][2]), before.process(CASES[case][2]))
    said = json.loads(path.read_bytes())
    assert len(said.pop("sha256")) == 64
    assert read_vocabulary(path).described() == said


def permuted(content: dict[str, Any]) -> dict[str, Any]:
    codes = content["inputs"]["codes"]["state"]["code_vocab"]
    codes[2], codes[3] = codes[3], codes[2]
    return content


def test_a_permuted_vocabulary_is_refused_and_one_from_elsewhere_is_read(tmp_path: Path) -> None:
    path = write_vocabulary(dataset(codes=fitted("sequence")), tmp_path / "v.json", weights="ab")
    content = json.loads(path.read_bytes())
    assert read_vocabulary(path).weights == "ab"
    path.write_text(json.dumps(dict(sorted(content.items())), indent=4))  # laid out anew, it says the same
    assert read_vocabulary(path).weights == "ab"
    path.write_text(json.dumps(permuted(content)))
    with pytest.raises(
        ValueError, match=r"v\.json was changed since it was written: its content is not that of its sha"
    ):
        read_vocabulary(path)
    del content["sha256"], content["weights_sha256"]
    path.write_text(json.dumps(content))
    assert read_vocabulary(path).weights is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema_version": 1, "schema_version": 1}', "the key 'schema_version' is there twice"),
        ('{"schema_version": NaN}', "NaN is no number of JSON"),
        ("[" * 200_000, "it is nested too deep"),
        ('{"a":' * 100_000, "it is nested too deep"),
    ],
)
def test_json_that_says_two_things_or_cannot_be_read_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"vocabulary .* cannot be read: {message}"):
        read_vocabulary(path)


def test_features_and_labels_keep_their_order_and_their_side(tmp_path: Path) -> None:
    path = write_vocabulary(dataset(z=fitted("nested"), a=fitted("sequence")), tmp_path / "v.json")
    inputs, outputs = read_vocabulary(path).build()
    assert list(inputs) == ["z", "a"]
    assert outputs["label"].label_vocab == {False: 0, True: 1}
    assert list(inputs["a"].code_vocab) == ["<pad>", "<unk>", "a", "b", *ODD]
    assert [entry.name for entry in tmp_path.iterdir()] == ["v.json"]


class Renamed(processors.SequenceProcessor):
    """A processor of somebody's own."""


def broken(**state: Any) -> Any:
    processor = fitted("sequence")
    vars(processor).update(state)
    return processor


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (
            processors.ImageProcessor(),
            "feature 'notes' has a pyhealth.processors.image_processor.ImageProcessor, whose",
        ),
        (Renamed(), "Renamed, whose state cannot be saved"),
        (broken(_mapper=object()), "_mapper of feature 'notes' cannot be saved: a code_mapping"),
        (broken(code_vocab={"<pad>": 0, "<unk>": 1, "a": 3}), "ids must be 0, 1, 2, … without gaps"),
        (broken(code_vocab={"<pad>": 0, "<unk>": 1, 77: 2}), "must be all strings or all numbers"),
        (broken(code_vocab={"<pad>": 0, "<unk>": 1, ("a", "b"): 2}), r"must be a string or a number, got \('a', 'b'\)"),
        (broken(extra=1), "must have the attributes code_vocab, _next_index, _mapper, got .*extra"),
        (broken(_next_index=True), "_next_index of feature 'notes' cannot be saved: must be int, got True"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_the_way_out(processor: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        vocabulary_of(dataset(notes=processor))
    assert "rollout attribute --entry package.module:function" in str(caught.value)


def damaged(content: dict[str, Any], keys: str, value: Any) -> dict[str, Any]:
    *above, last = keys.split("/")
    place = content
    for key in above:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return content


STATE = "inputs/codes/state"


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("schema_version", 2, "must have schema_version 1, got 2"),
        ("schema_version", None, "must have schema_version 1, got None"),
        ("outputs", None, "outputs must be an object of processors by feature, got None"),
        ("inputs", {}, "inputs must be an object of processors by feature"),
        ("inputs/codes", ["a"], "inputs.codes must be an object with processor and state"),
        ("inputs/codes/processor", "os.system", "the processor 'os.system'; it must be one of SequenceProcessor,"),
        (f"{STATE}/code_vocab", None, "inputs.codes.state must have code_vocab, _next_index, _mapper; got"),
        (f"{STATE}/code_vocab", {"a": 1}, "code_vocab: must be a list of codes, got dict"),
        (f"{STATE}/code_vocab", ["a", "b"], r"code_vocab: must begin with \['<pad>', '<unk>'\], got \['a', 'b'\]"),
        (f"{STATE}/code_vocab", ["<pad>", "<unk>", "a", "a"], "code_vocab: a code is there twice"),
        (f"{STATE}/code_vocab", ["<pad>", "<unk>", ["a"]], "a code must be a string or a number"),
        (f"{STATE}/_next_index", "4", "_next_index: must be int, got '4'"),
        (f"{STATE}/_mapper", "ICD9CM", "_mapper: a code_mapping is loaded"),
        (
            "inputs/series/state/sampling_rate",
            -1,
            "sampling_rate: must be a number of seconds from 0.001 to 1e.09, got -1",
        ),
        ("inputs/series/state/sampling_rate", 1e-9, "sampling_rate: must be a number of seconds from 0.001"),
        ("inputs/series/state/sampling_rate", 1e300, "sampling_rate: must be a number of seconds from 0.001"),
        ("inputs/codes/processor", ["SequenceProcessor"], r"has the processor \['SequenceProcessor'\]; it must be"),
        ("inputs/deep/state/_max_inner_len", -1, "_max_inner_len: must be from 0 to 2147483647, got -1"),
        ("inputs/deep/state/_max_inner_len", 10**30, "_max_inner_len: must be from 0 to 2147483647"),
        ("inputs/deep/state/_max_inner_len", 2**20, "deep.state must pad a step to at most 1,048,576 codes, got 2,097"),
        ("inputs/vector/state/dtype", "load", "dtype: must be the name of a torch dtype, got 'load'"),
        ("inputs/vector/state/_spatial_dims", [1], r"_spatial_dims: must be a list of true and false, or null, got"),
    ],
)
def test_a_damaged_vocabulary_is_refused_where_it_is_damaged(
    keys: str, value: Any, message: str, tmp_path: Path
) -> None:
    content = vocabulary_of(
        dataset(codes=fitted("sequence"), series=fitted("timeseries"), vector=fitted("tensor"), deep=fitted("deep"))
    ).described()
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps(damaged(content, keys, value)))
    with pytest.raises(ValueError, match=message) as caught:
        read_vocabulary(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[]", None])
def test_what_is_no_vocabulary_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"vocabulary .*vocabulary\.json (cannot be read|must have schema_version)"):
        read_vocabulary(path)


def test_reading_does_not_import_pyhealth(tmp_path: Path) -> None:
    path = write_vocabulary(dataset(codes=fitted("sequence")), tmp_path / "v.json")
    code = "import sys; from rollout.data.vocabulary import read_vocabulary as r; print(len(r(sys.argv[1]).inputs), " \
        "'pyhealth' in sys.modules)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]
