"""The folder of a run: what is damaged is found and redone or refused, and nothing is half-written."""

import errno
import json
import re
import shutil

import pytest

from rollout.cohort import CohortError, store
from rollout.cohort.store import Store
from rollout.results.attributions import CohortAttributions
from rollout.results.manifest import Manifest
from tests.support.toy_cohort import Records, assert_same, attribute, rows
from tests.support.written_run import edit


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("cohort") / "whole"
    attribute(out)
    return out


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the unbroken run, to be damaged."""
    return shutil.copytree(whole, tmp_path / "copy")


@pytest.mark.parametrize(
    "path", ["attributions/part-00001.parquet", "predictions/part-00003.parquet", "parts/part-00002.json"]
)
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_part_is_done_again(copy, whole, path: str, damage: str) -> None:
    file = copy / path
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :])
    run = attribute(copy)
    assert (run.kept, run.done) == (4, 20)
    assert_same(copy, whole)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema_version": 2}', b"\xff\xfe", b"null"])
def test_a_damaged_manifest_is_made_anew_from_the_parts(copy, whole, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    (copy / "parts" / "part-00004.json").unlink()
    run = attribute(copy)
    assert (run.kept, run.done) == (4, 10)
    assert_same(copy, whole)
    manifest = json.loads((copy / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert "manifest was damaged" in manifest["notes"][0]


def test_a_damaged_manifest_does_not_let_another_run_in(copy) -> None:
    (copy / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"is damaged.*written by a run of another model, method, dataset or plan"):
        attribute(copy, method="pyhealth")


def test_a_manifest_of_another_version_is_refused(copy) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(ValueError, match="schema_version must be 2, got 99"):
        attribute(copy)


def test_leftovers_without_a_record_are_removed(copy, whole) -> None:
    shutil.copy(copy / "attributions/part-00000.parquet", copy / "attributions/part-00007.parquet")
    (copy / "attributions/.part-00001.parquet.99.partial").write_bytes(b"half")
    (copy / ".manifest.json.99.partial").write_bytes(b"half")
    (copy / "failures").mkdir()
    shutil.copy(copy / "attributions/part-00000.parquet", copy / "failures/part-00002.parquet")
    (copy / "attributions/notes.txt").write_text("mine")
    attribute(copy)
    assert_same(copy, whole)
    assert not list(copy.rglob("*.partial"))
    assert (copy / "attributions/notes.txt").read_text() == "mine"


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="out must be a new or empty folder"):
        attribute(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_second_process_on_a_folder_is_refused(copy) -> None:
    held = Store(copy, Manifest.read(copy / "manifest.json"), 5, Records(90), resume=True, retry_failures=False)
    try:
        with pytest.raises(CohortError, match="another process is writing to"):
            attribute(copy)
    finally:
        held.close()
    assert attribute(copy).kept == 5


def test_every_moment_a_write_can_fail(whole, tmp_path, monkeypatch) -> None:
    """The n-th file cannot be written, for every n: the run says why, and the next one ends with the same rows."""
    real, count = store.write_whole, 0

    def failing(path, content):
        nonlocal count
        count += 1
        if count == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, content)

    at = 0
    monkeypatch.setattr(store, "write_whole", failing)
    attribute(tmp_path / "counted")
    writes = count
    assert writes == 2 + 5 * 3  # the manifest twice; of each part two files and a record
    for at in range(1, writes + 1):
        out, count = tmp_path / f"full-{at}", 0
        with pytest.raises(CohortError, match=r"the disk is full.*the same call goes on"):
            attribute(out)
        assert not list(out.rglob("*.partial"))
        count = writes
        run = attribute(out)
        assert run.kept >= (at - 2) // 3
        assert_same(out, whole)


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.write_whole(path, b"after")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("file", b"before")]


def test_parts_are_sorted_by_sample_and_feature(whole) -> None:
    found = rows(whole)
    assert found["sample"].is_sorted()
    assert found.equals(found.sort("sample", "feature", "position", maintain_order=True), null_equal=True)


def test_a_record_of_another_run_is_not_taken(copy, whole) -> None:
    path = copy / "parts/part-00001.json"
    edit(path, run="0" * 64)
    assert attribute(copy).done == 20
    assert_same(copy, whole)


def test_another_programs_folder_is_left_alone(tmp_path) -> None:
    """With files of the very names of ours, too."""
    (tmp_path / "manifest.json").write_text('{"name": "my web app"}')
    for name in ("predictions/part-00000.parquet", "parts/part-00007.json", "thesis.tex"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="out must be a new or empty folder"):
        attribute(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("left", [[".rollout.lock", "attributions/"], [".write-probe"], [".rollout.lock", "parts/"]])
def test_a_run_killed_while_its_folder_is_made_goes_on(whole, tmp_path, left: list[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in left:
        (out / name).mkdir() if name.endswith("/") else (out / name).touch()
    attribute(out)
    assert_same(out, whole)


def test_a_sample_unreadable_for_a_while_is_still_known(copy) -> None:
    (copy / "parts/part-00000.json").unlink()
    attribute(copy, dataset=Records(90, {88: "unreadable"}))
    with pytest.raises(ValueError, match=r"samples 88 hold other values"):
        attribute(copy, dataset=Records(90, {88: "nan"}))


OURS = [
    "attributions", "predictions", "failures", "parts", ".workers", ".pyhealth-cache", ".rollout.lock", "manifest.json",
    "code_names.json", "attributions/part-00001.parquet", "predictions/part-00000.parquet", "parts/part-00002.json",
    "failures/part-00000.parquet", ".manifest.json.1.partial", "parts/.part-00001.json.1.partial",
    "attributions/part-00077.parquet",
]  # fmt: skip


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("started", [False, True])
def test_a_link_out_of_the_folder_is_refused_before_anything_is_written(
    whole, tmp_path, name: str, started: bool
) -> None:
    """New or begun, a folder in which something of ours leads elsewhere: to a file, a folder, or nothing."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    if started:
        shutil.copytree(whole, out)
        (out / "parts" / "part-00003.json").unlink()
    link = out / name
    link.parent.mkdir(parents=True, exist_ok=True)
    folder = "." not in name or name in (".workers", ".pyhealth-cache")
    if folder:
        elsewhere.mkdir()
        for kept in ("part-00001.parquet", "part-00001.json", "part-00099.parquet", ".x.partial", "thesis.tex"):
            (elsewhere / kept).write_text("mine")
    else:
        elsewhere.write_text("mine")
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(elsewhere)

    def state() -> dict:
        return {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}

    before = state()
    with pytest.raises(ValueError, match=rf"{re.escape(str(link))} must not be a link \(.* → {elsewhere}\)"):
        attribute(out, workers=2 if name == ".workers" else 1)
    assert state() == before
    elsewhere.unlink() if elsewhere.is_file() else shutil.rmtree(elsewhere)
    with pytest.raises(ValueError, match="must not be a link"):
        attribute(out)
    assert not elsewhere.exists()


def test_a_link_to_the_folder_itself_and_links_of_others_are_left(whole, tmp_path) -> None:
    (tmp_path / "real" / "attributions").mkdir(parents=True)
    (tmp_path / "real" / ".rollout.lock").touch()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "real" / "attributions" / "notes").symlink_to(tmp_path / "mine.txt")
    attribute(tmp_path / "out")
    assert_same(tmp_path / "real", whole)
    assert (tmp_path / "real" / "attributions" / "notes").read_text() == "mine"


def test_paths_that_are_none_are_refused_in_a_line(tmp_path) -> None:
    for path, match in (("~nouser/x", "home directory"), ("x" * 300, "too long"), (tmp_path / "a\0b", "null")):
        with pytest.raises(ValueError, match=rf"out must be a path, got .*{match}") as error:
            attribute(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x[et]*", "a=b?", "~"])
def test_a_folder_of_any_name_is_written_resumed_and_read(whole, tmp_path, name: str) -> None:
    out = tmp_path / name
    attribute(out)
    (out / "parts" / "part-00003.json").unlink()
    assert attribute(out).done == 20
    found = CohortAttributions(out).attributions.collect()
    assert found.equals(rows(whole), null_equal=True)


def test_names_written_before_a_kill_are_taken_and_damaged_ones_made_anew(tmp_path) -> None:
    out, names = tmp_path / "out", {"codes": {"c9": "Heart failure"}}
    attribute(out)
    before = (out / "manifest.json").read_bytes()
    attribute(out, code_names=names)
    assert CohortAttributions(out).names == names
    (out / "manifest.json").write_bytes(before)  # as if killed between the two files
    (out / "parts" / "part-00003.json").unlink()
    attribute(out)
    assert CohortAttributions(out).names == names
    (out / "code_names.json").write_text("{}")
    (out / "parts" / "part-00003.json").unlink()
    attribute(out)
    assert CohortAttributions(out).names == {}
    attribute(out, code_names=names)
    assert CohortAttributions(out).names == names
    with pytest.raises(ValueError, match="code_names must be"):
        attribute(out, code_names={"codes": {"c9": 3}})
