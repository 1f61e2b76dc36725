"""A bundle somebody sends: nothing in it is unpickled, nothing of the user's is deleted, whatever its run file says."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.cli import main
from rollout.data import seal
from rollout.results.layout import CACHE
from rollout.runfile import prepare_samples, read_run_file, save_model
from rollout.runfile.start import attribute_run_file


class Planted:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def cli(arguments: list[object], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["rollout", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0), capsys.readouterr().err


def schemas(bundle: Path) -> list[Path]:
    return [path for path in bundle.rglob("schema.pkl") if "attributed" not in path.parts]


def replaced_schema(bundle: Path) -> None:
    """The attack: a cache as it was prepared, but for what PyHealth unpickles first."""
    for path in schemas(bundle):
        path.write_bytes(pickle.dumps(Planted(bundle / "planted")))


def schema_with_its_record(bundle: Path) -> None:
    """The same with a record that has the digest of the hostile file, and its writer's seal."""
    replaced_schema(bundle)
    place = bundle / "samples" / "prepared.json"
    record = json.loads(place.read_text())
    for path in schemas(bundle):
        name = path.relative_to(bundle / "samples" / record["made"]).as_posix()
        content = path.read_bytes()
        record["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(bundle.parent / "somebody else"))
        place.write_text(json.dumps(seal.seal_record(record)[0]))


def replaced_samples(bundle: Path) -> None:
    """PyHealth unpickles each sample too."""
    for path in bundle.rglob("samples_*.ld/chunk-*.bin"):
        content = path.read_bytes()
        path.write_bytes(content.replace(b"patient_id", b"patient_iD"))


@pytest.mark.parametrize("attack", [replaced_schema, schema_with_its_record, replaced_samples])
@pytest.mark.parametrize("where", ["samples", CACHE])
def test_a_shipped_cache_is_not_unpickled(
    attack: Callable[[Path], None], where: str, tables: dict[str, Any], copy: Path,
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    attack(copy)
    shutil.rmtree(copy / "attributed")
    if where == CACHE:
        (copy / "attributed").mkdir()
        (copy / "samples").rename(copy / "attributed" / CACHE)
        del tables["dataset"]["cache"]
    (copy / "run.json").write_text(json.dumps(tables))
    status, err = cli(["attribute", copy / "run.json"], capsys, monkeypatch)
    assert status == 2
    assert "are not known to be prepared by you" in err or "are not as they were prepared" in err
    assert err.count("\n") == 1
    assert not (copy / "planted").exists()
    assert not (copy / "attributed" / "manifest.json").exists()


@pytest.mark.parametrize("table", ["dataset", "run", "model"])
def test_no_run_file_can_say_that_it_is_to_be_trusted(table: str, tables: dict[str, Any], copy: Path) -> None:
    schema_with_its_record(copy)
    for key in ("trust_cache", "trust-cache"):
        (copy / "run.json").write_text(json.dumps({**tables, table: {**tables[table], key: True}}))
        with pytest.raises(ValueError, match=rf"\[{table}\] has no key '{key}'"):
            attribute_run_file(copy / "run.json", progress=False)
    assert not (copy / "planted").exists()


def test_a_cache_that_is_trusted_on_purpose_is_opened(
    trained: dict[str, Any], copy: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(copy.parent / "a new user"))
    status, err = cli(["attribute", copy / "run.toml", "--output", copy / "out"], capsys, monkeypatch)
    assert (status, err.count("\n")) == (2, 1)
    assert "there is no key of yours to check its seal with" in err
    status, _ = cli(["attribute", copy / "run.toml", "--output", copy / "out", "--trust-cache"], capsys, monkeypatch)
    assert status == 0
    written, theirs = (folder / "attributions" for folder in (copy / "out", trained["folder"] / "attributed"))
    assert [path.read_bytes() for path in sorted(written.iterdir())] == [
        path.read_bytes() for path in sorted(theirs.iterdir())
    ]
    with pytest.raises(ValueError, match="are not known to be prepared by you"):  # it was trusted for once
        prepare_samples(read_run_file(copy / "run.toml").source, copy / "samples")


def test_a_checkout_beside_a_run_file_is_left_alone(
    tables: dict[str, Any], copy: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "pyhealth").mkdir()
    (copy / "pyhealth" / "setup.py").write_text("mine")
    for said in (".", "linked", "cohort"):
        (copy / "linked").unlink(missing_ok=True)
        (copy / "linked").symlink_to(copy)
        tables["dataset"]["cache"] = said
        (copy / "run.json").write_text(json.dumps(tables))
        status, err = cli(["attribute", copy / "run.json", "--output", copy / "out"], capsys, monkeypatch)
        assert (status, err.count("\n")) == (2, 1)
        assert "a cache of samples must be a new or empty folder, or one prepared before" in err
    assert (copy / "pyhealth" / "setup.py").read_text() == "mine"
    assert not (copy / "prepared.json").exists()


def test_a_cache_in_the_output_is_no_link_to_elsewhere(tables: dict[str, Any], copy: Path) -> None:
    (copy / "mine").mkdir()
    (copy / "out").mkdir()
    (copy / "out" / CACHE).symlink_to(copy / "mine")
    del tables["dataset"]["cache"]
    (copy / "run.json").write_text(json.dumps(tables))
    with pytest.raises(ValueError, match=r"\.pyhealth-cache must not be a link"):
        attribute_run_file(copy / "run.json", copy / "out", progress=False)
    assert list((copy / "mine").iterdir()) == []


@contextmanager
def unpickled() -> Iterator[list[str]]:
    """Every class and function that unpickling looks up, while it lasts."""
    found: list[str] = []
    active = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class" and active:
            found.append(".".join(map(str, arguments)))

    sys.addaudithook(hook)  # for the life of the process; it does nothing once it is not active
    try:
        yield found
    finally:
        active.clear()


def test_nothing_but_the_cache_and_the_weights_is_unpickled(copy: Path) -> None:
    with unpickled() as found:
        attribute_run_file(copy / "run.toml", copy / "out", progress=False)
    roots = {name.split(".")[0] for name in found}
    assert "pyhealth" in roots  # the cache's processors, so the hook sees what there is
    assert roots <= {"pyhealth", "collections", "datetime", "numpy", "torch", "builtins"}
    assert not any(name.startswith("builtins.") and name.split(".")[1] not in ("dict", "set") for name in found)


def test_a_vocabulary_of_another_model_is_refused(trained: dict[str, Any], copy: Path) -> None:
    model, dataset = trained["model"], trained["dataset"]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with torch.no_grad():
            model.fc.weight.add_(1)
        save_model(model, dataset, copy / "other")
    finally:
        model.load_state_dict(state)
    run = read_run_file(copy / "run.toml")
    run.load(copy / "out")
    shutil.copy(copy / "other" / "vocabulary.json", copy / "vocabulary.json")
    with pytest.raises(ValueError, match=r"\[model\] vocabulary was written with other weights than .*weights\.pt"):
        read_run_file(copy / "run.toml").load(copy / "out")
    shutil.copy(copy / "other" / "weights.pt", copy / "weights.pt")
    read_run_file(copy / "run.toml").load(copy / "out")
    torch.save({**torch.load(copy / "weights.pt", weights_only=True)}, copy / "weights.pt")  # saved anew, the same
    read_run_file(copy / "run.toml").load(copy / "out")


def test_a_vocabulary_with_its_codes_permuted_is_refused(copy: Path) -> None:
    path = copy / "vocabulary.json"
    content = json.loads(path.read_text())
    codes = content["inputs"]["conditions"]["state"]["code_vocab"]
    codes[5], codes[6] = codes[6], codes[5]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"vocabulary\.json was changed since it was written"):
        attribute_run_file(copy / "run.toml", copy / "out", progress=False)
    assert not (copy / "out").exists()


GUARDLESS = """
from rollout.data.mimic import mimic_source
from rollout.runfile import prepare_samples
prepare_samples(mimic_source({cohort!r}), "cache")
"""


def test_a_missing_main_guard_is_named(
    trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyhealth.datasets import MIMIC4Dataset

    def unguarded(*_: Any, **__: Any) -> None:
        raise RuntimeError("Nanny failed to start.")

    monkeypatch.setattr(MIMIC4Dataset, "set_task", unguarded)
    source = read_run_file(trained["path"]).source
    with pytest.raises(ValueError, match=r'Nanny failed to start\. In a script, .* under `if __name__ == "__main__":`'):
        prepare_samples(source, tmp_path / "cache")


def test_samples_that_cannot_be_marked_as_ones_own_are_said_to_be_so(
    trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyhealth.datasets import MIMIC4Dataset

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no further")

    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(MIMIC4Dataset, "set_task", fail)
    source = read_run_file(trained["path"]).source
    with (
        pytest.warns(
            UserWarning, match=r"cannot be marked as yours \(.*Not a directory.*set XDG_STATE_HOME to a folder"
        ),
        pytest.raises(ValueError, match="no further"),
    ):
        prepare_samples(source, tmp_path / "cache")


@pytest.mark.slow
def test_a_missing_main_guard_is_named_where_it_is_missing(trained: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(GUARDLESS.format(cohort=str(trained["folder"] / "cohort")))
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert 'In a script, the call must stand under `if __name__ == "__main__":`' in done.stderr.splitlines()[-1]
