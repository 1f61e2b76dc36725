"""The folder samples are prepared in: only what is ours and unchanged is opened, and only what is ours is removed."""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rollout.data import seal
from rollout.data.cache import SampleCache

IDENTITY = {"dataset": "D", "dataset_arguments": {"tables": ["a"]}, "task": "T", "task_arguments": {}}
ENTRY = {"path": "x/samples.ld", "dataset_name": "d", "task_name": "t"}


def opened(folder: Path, trusted: bool = False, **identity: Any) -> SampleCache:
    return SampleCache(folder, {**IDENTITY, **identity}, trusted)


def prepare(folder: Path, key: str = "k", name: str = "samples.ld") -> SampleCache:
    """A cache as a preparation leaves it, its files not PyHealth's."""
    cache = opened(folder)
    with cache.lock():
        assert cache.begin() is None
        (cache.made / "x" / name).mkdir(parents=True)
        (cache.made / "x" / name / "schema.pkl").write_bytes(b"pickled")
        (cache.made / "x" / name / "chunk-0-0.bin").write_bytes(b"chunk")
        (cache.made / "x" / "events.parquet").write_bytes(b"events")
        cache.finish(key, {**ENTRY, "path": f"x/{name}"})
    return cache


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_prepared_is_found_again_and_wherever_it_is_moved(tmp_path: Path) -> None:
    cache = prepare(tmp_path / "a")
    assert opened(tmp_path / "a").find("k") == ENTRY
    assert opened(tmp_path / "a").find("other") is None
    shutil.copytree(tmp_path / "a", tmp_path / "copied")
    (tmp_path / "a").rename(tmp_path / "moved")
    for name in ("copied", "moved"):
        assert opened(tmp_path / name).find("k") == ENTRY
    assert set(cache.record["files"]) == {"x/samples.ld/schema.pkl", "x/samples.ld/chunk-0-0.bin", "x/events.parquet"}


def plant(path: Path) -> None:
    path.write_bytes(b"hostile")


def link(path: Path) -> None:
    target = path.parent.parent / "target"
    path.rename(target)
    path.symlink_to(target)


def edit(**changes: Any) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    ("name", "attack"),
    [
        ("x/samples.ld/schema.pkl", plant),
        ("x/samples.ld/chunk-0-0.bin", plant),
        ("x/samples.ld/chunk-0-0.bin", os.unlink),
        ("x/samples.ld/index.json", plant),
        ("x/samples.ld/schema.pkl", link),
        ("x/samples.ld", link),
        ("x/samples.ld", shutil.rmtree),
        (".", link),
    ],
)
def test_files_that_differ_from_the_record_are_refused_trusted_or_not(
    name: str, attack: Callable[[Path], None], trusted: bool, tmp_path: Path
) -> None:
    cache = prepare(tmp_path / "a")
    attack(cache.made / name if name != "." else cache.made)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"are not as they were prepared: |must be a file or a folder, not a link"):
        opened(tmp_path / "a", trusted).find("k")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["x/events.parquet", "x/task.ld/index.json", "x/more.parquet"])
def test_what_other_samples_would_be_made_from_is_checked_before_it_is_used(name: str, tmp_path: Path) -> None:
    cache = prepare(tmp_path / "a")
    (cache.made / name).parent.mkdir(exist_ok=True)
    (cache.made / name).write_bytes(b"hostile")
    assert opened(tmp_path / "a").find("k") == ENTRY  # these files play no part in it
    again = opened(tmp_path / "a")
    with again.lock(), pytest.raises(ValueError, match=f"are not as they were prepared: {name} in pyhealth-"):
        again.begin()
    assert (cache.made / name).read_bytes() == b"hostile"


def other_key(_: Path) -> None:
    seal.key_file().write_text("ab" * 32)


def no_key(_: Path) -> None:
    seal.key_file().unlink()


def open_key(_: Path) -> None:
    seal.key_file().chmod(0o644)


def damaged_key(_: Path) -> None:
    seal.key_file().write_text("short")


def linked_key(_: Path) -> None:
    path = seal.key_file()
    path.rename(path.with_name("other"))
    path.symlink_to("other")


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (edit(seal=None), "it has no seal"),
        (edit(seal="é"), "it has no seal"),
        (edit(seal="0" * 64), "its seal was not set with your key"),
        (edit(files={}), "its seal was not set with your key"),
        (edit(samples={"k": {**ENTRY, "path": "../../etc"}}), "its seal was not set with your key"),
        (other_key, "its seal was not set with your key"),
        (no_key, r"there is no key of yours to check its seal with \(.*No such file"),
        (
            open_key,
            r"there is no key of yours .*must be a file of yours that nobody else can read or write \(chmod 600\)",
        ),
        (damaged_key, r"there is no key of yours .* is damaged; delete it, and a new key is made"),
        (linked_key, "there is no key of yours"),
    ],
)
def test_a_record_that_this_user_did_not_seal_is_refused(
    attack: Callable[[Path], None], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    cache = prepare(tmp_path / "a")
    attack(tmp_path / "a" / "prepared.json")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"not known to be prepared by you, .*: {reason}.*--trust-cache"):
        opened(tmp_path / "a")
    assert contents(tmp_path) == before
    assert cache.made.is_dir()


def test_a_trusted_cache_is_opened_but_never_becomes_ours(tmp_path: Path) -> None:
    cache = prepare(tmp_path / "a")
    edit(seal="0" * 64)(tmp_path / "a" / "prepared.json")
    assert opened(tmp_path / "a", trusted=True).find("k") == ENTRY
    more = opened(tmp_path / "a", trusted=True)
    with more.lock():
        assert more.begin() is None
        (cache.made / "x" / "more.ld").mkdir()
        (cache.made / "x" / "more.ld" / "schema.pkl").touch()
        more.finish("k2", {**ENTRY, "path": "x/more.ld"})
    assert opened(tmp_path / "a", trusted=True).find("k2")
    with pytest.raises(ValueError, match="it has no seal"):
        opened(tmp_path / "a")


def test_without_a_place_for_a_key_only_this_process_opens_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    cache = opened(tmp_path / "a")
    with cache.lock():
        assert "Not a directory" in str(cache.begin())
        (cache.made / "schema.pkl").touch()
        cache.finish("k", {**ENTRY, "path": "."} | {"path": "x"})
    monkeypatch.setattr(seal, "_of_this_process", b"another process")
    with pytest.raises(ValueError, match=r"there is no key of yours to check its seal with \(.*Not a directory"):
        opened(tmp_path / "a")


def test_without_a_home_folder_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: object) -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_STATE_HOME", "relative/paths/do/not/count")
    monkeypatch.setattr(Path, "home", nobody)
    assert seal.seal_record({"a": 1})[1] == "there is no home folder"
    assert seal.seal_problem(seal.seal_record({"a": 1})[0]) is None


def test_the_key_is_made_once_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: seal._read_or_make_key(), range(64)))
    assert len(keys) == 1
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert file == tmp_path / "attention-rollout" / "cache.key"
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(file.read_text().strip()) == 64


@pytest.mark.parametrize(
    "name", ["pyhealth/setup.py", "run.toml", "pyhealth-0123456789abcdef/mine", ".lock", "prepared.json"]
)
def test_a_folder_that_holds_other_things_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / "a" / name).parent.mkdir(parents=True)
    (tmp_path / "a" / name).write_text("mine")
    before = contents(tmp_path)
    for folder in (tmp_path / "a", link_to(tmp_path / "a")):
        for trusted in (False, True):
            with pytest.raises(
                ValueError, match=r"must be a new or empty folder, or one prepared before|is damaged or no"
            ):
                opened(folder, trusted)
    assert contents(tmp_path) == before


def link_to(folder: Path) -> Path:
    linked = folder.with_name("linked")
    linked.symlink_to(folder)
    return linked


@pytest.mark.parametrize("name", [".lock", "prepared.json"])
def test_links_in_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    cache = prepare(tmp_path / "a")
    mine = tmp_path / "mine"
    (tmp_path / "a" / name).rename(mine)
    (tmp_path / "a" / name).symlink_to(mine)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="must not be a link"):
        opened(tmp_path / "a")
    assert contents(tmp_path) == before
    assert cache.made.is_dir()


def test_a_preparation_cut_short_is_removed_and_nothing_beside_it(tmp_path: Path) -> None:
    cache = opened(tmp_path / "a")
    with cache.lock():
        cache.begin()
        (cache.made / "half").write_bytes(b"half")
    (tmp_path / "a" / "pyhealth").mkdir()
    (tmp_path / "a" / "pyhealth" / "setup.py").write_text("mine")
    again = opened(tmp_path / "a")
    with again.lock():
        again.begin()
    assert not cache.made.exists()
    assert again.made.is_dir()
    assert (tmp_path / "a" / "pyhealth" / "setup.py").read_text() == "mine"


def test_an_unfinished_folder_that_is_not_ours_or_a_link_is_not_removed(tmp_path: Path) -> None:
    cache = opened(tmp_path / "a")
    with cache.lock():
        cache.begin()
    (cache.made / "thesis.tex").write_text("mine")
    sealed = (tmp_path / "a" / "prepared.json").read_text()
    edit(seal="0" * 64)(tmp_path / "a" / "prepared.json")
    shipped = opened(tmp_path / "a", trusted=True)
    with shipped.lock(), pytest.raises(ValueError, match="was not made by you, or is a link, so it is not removed"):
        shipped.begin()
    (tmp_path / "a" / "prepared.json").write_text(sealed)
    link(cache.made)
    linked = opened(tmp_path / "a")
    with linked.lock(), pytest.raises(ValueError, match="was not made by you, or is a link, so it is not removed"):
        linked.begin()
    assert (cache.made / "thesis.tex").read_text() == "mine"


def test_further_samples_cut_short_leave_the_first_as_they_are(tmp_path: Path) -> None:
    prepare(tmp_path / "a")
    more = opened(tmp_path / "a")
    with more.lock():
        more.begin()
        (more.made / "x" / "more.ld").mkdir()
        (more.made / "x" / "more.ld" / "schema.pkl").write_bytes(b"half")
    assert opened(tmp_path / "a").find("k") == ENTRY
    prepare(tmp_path / "a", "k2", "again.ld")
    assert not (more.made / "x" / "more.ld" / "schema.pkl").exists()
    assert opened(tmp_path / "a").find("k") == ENTRY
    assert opened(tmp_path / "a").find("k2") == {**ENTRY, "path": "x/again.ld"}


def test_what_is_there_is_read_while_another_process_prepares(tmp_path: Path) -> None:
    prepare(tmp_path / "a")
    other = opened(tmp_path / "a")
    with other.lock():
        other.begin()
        assert opened(tmp_path / "a").find("k") == ENTRY
        with pytest.raises(ValueError, match="another process is preparing samples"), opened(tmp_path / "a").lock():
            pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 1}, "must have schema_version 2, got 1"),
        ({"task": "U"}, "holds samples of another run: task is 'U' there, 'T' now"),
        ({"made": "../mine"}, "is damaged: made is not as rollout writes it"),
        ({"files": []}, "is damaged: files is not as rollout writes it"),
        ({"samples": {"k": {}}}, "is damaged: its samples lack 'path'"),
        ({"samples": {"k": 3}}, "is damaged: its samples lack"),
    ],
)
def test_a_record_that_says_nonsense_is_refused_trusted_or_not(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    prepare(tmp_path / "a")
    edit(**changes)(tmp_path / "a" / "prepared.json")
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "a", trusted=True).find("k")
