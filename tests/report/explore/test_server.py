"""The command: an address on the loopback alone, ended by Ctrl-C, nothing written; what it refuses, in one line."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

import pytest

from rollout.cli import main
from rollout.report.explore.server import listen
from tests.support.explored import written

ask = build_opener(ProxyHandler({})).open


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def served(folder: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """The command at work, and the address it printed."""
    command = [sys.executable, "-m", "rollout", "explore", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = [server.stdout.readline() for _ in range(2)] if server.stdout else []
        yield server, lines[1].strip()
    finally:
        server.kill()
        server.communicate()


def listening(process: int) -> set[str]:
    """The local addresses that a process listens on, as /proc tells them."""
    inodes = set()
    for link in Path(f"/proc/{process}/fd").iterdir():
        try:
            found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link))
        except OSError:  # closed meanwhile
            continue
        inodes |= {found.group(1)} if found else set()
    tables = [Path(f"/proc/{process}/net/{name}") for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return {row[1].rpartition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="needs /proc")
def test_it_serves_this_machine_alone_until_interrupted(served: tuple[subprocess.Popen, str], folder: Path) -> None:
    server, address = served
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{32}/", address)
    with ask(address + "record?sample=1") as answer:
        assert b"Patient" in answer.read()
        assert "server" not in {name.lower() for name in answer.headers}
    with pytest.raises(HTTPError, match="403"):
        ask(address.rsplit("/", 2)[0] + "/")
    assert listening(server.pid) == {"0100007F"}
    server.send_signal(signal.SIGINT)
    out, err = server.communicate(timeout=20)
    assert server.returncode == 0, err
    assert address.split("/")[3] not in out + err  # nothing logs the token
    assert err == ""
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["rollout", "explore", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1
    return said


def test_what_it_refuses(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert "got /nowhere: no such folder" in refused(monkeypatch, capsys, "/nowhere")
    assert f"{tmp_path}: it has no manifest.json" in refused(monkeypatch, capsys, tmp_path)
    assert "port must be from 0 (any) to 65535, got 70000" in refused(monkeypatch, capsys, folder, "--port", 70000)
    assert "no such folder" in refused(monkeypatch, capsys, folder, "--beside", tmp_path / "other")
    assert "names must be a JSON file" in refused(monkeypatch, capsys, folder, "--names", tmp_path / "names.json")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port must be one that is free, got {port}" in refused(monkeypatch, capsys, folder, "--port", port)


def test_the_token_is_another_each_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rollout.report.explore import server

    said: list[str] = []
    monkeypatch.setattr(server, "serve", lambda *_: None)
    for _ in range(2):
        server.explore(folder, say=said.append)
    tokens = {line.split("/")[3] for line in said if line.startswith("http")}
    assert len(tokens) == 2


def test_a_socket_on_the_loopback() -> None:
    with listen(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    for port in (True, -1, 65536, "80"):
        with pytest.raises(ValueError, match="port must be from 0"):
            listen(port)  # type: ignore[arg-type]
