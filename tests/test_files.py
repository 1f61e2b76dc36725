"""Files whole or not at all, paths that can be, and JSON that says one thing."""

import os
from pathlib import Path

import pytest

from rollout.files import PARTIAL, empty_folder, parse_json, usable_path, write_whole


def test_a_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    (tmp_path / f".out.{os.getpid()}{PARTIAL}").symlink_to(mine)  # the name it has until it is whole
    (tmp_path / "out").symlink_to(mine)
    assert write_whole(tmp_path / "out", b"content").read_bytes() == b"content"
    assert mine.read_bytes() == b"mine"
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "out"}
    assert not (tmp_path / "out").is_symlink()


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / f".out.{os.getpid()}{PARTIAL}").write_bytes(b"half")
    assert write_whole(tmp_path / "out", b"whole").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("path", ["~nouser-of-that-name/x", "x" * 300, "x/" * 3000, "nul\0", "\ud800", "loop/x"])
def test_a_path_that_cannot_be_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(ValueError, match=r"^out must be a path, got "):
        usable_path(path, "out")
    with pytest.raises(ValueError, match=r"^out must be a path, got "):
        empty_folder(path, "out")


def test_a_path_that_can_be_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    assert usable_path("~/x", "out") == Path("/somebody/x")
    assert usable_path("nowhere/\n'\"* [x]", "out") == Path("nowhere/\n'\"* [x]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' is there twice"),
        ("[NaN]", "NaN is no number of JSON"),
        ("[-Infinity]", "-Infinity is no number of JSON"),
        ("[" * 200_000, "it is nested too deep"),
        ("{", "Expecting property name"),
    ],
)
def test_json_that_leaves_open_what_it_means_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json_that_says_one_thing_is_read() -> None:
    assert parse_json(b'{"a": [1, 2.5, null, {"b": "\\ud800"}], "c": {"a": true}}') == {
        "a": [1, 2.5, None, {"b": "\ud800"}], "c": {"a": True},
    }  # fmt: skip
