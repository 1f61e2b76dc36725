"""The server: on this machine's own address only, until it is interrupted."""

import secrets
import socket
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import uvicorn
from polars.exceptions import PolarsError

from rollout.report.explore.app import Explorer
from rollout.report.text import shown
from rollout.results.attributions import CohortAttributions

LOOPBACK = "127.0.0.1"
MESSAGE = 1000


def explore(
    path: str | Path,
    beside: str | Path | None = None,
    port: int = 0,
    names: str | Path | Mapping[str, Mapping[str, str]] | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the page of a cohort run on 127.0.0.1 until interrupted; nothing is written anywhere.

    Args:
        path: Folder of the run (`out` of `attribute_cohort`).
        beside: Folder of another run of the same samples, to be shown beside it.
        port: 0: any that is free.
        names: Names of codes, `{feature: {code: name}}` or a JSON file of them, before those of the folder.
        say: Told the address, which holds a token that is made anew each time, and what is read before.

    Raises:
        ValueError: If a folder is no sound run of attributions, `beside` is of other samples, or the port is not free.
    """
    with listen(port) as listener:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*is not complete.*")
                cohort = CohortAttributions(path, names)
                other = None if beside is None else CohortAttributions(beside, names)
            say(f"{shown(cohort.path)}: reading {cohort.samples:,} samples")
            explorer = Explorer(cohort, other)
        except (ValueError, PolarsError) as error:  # what it quotes may be of any length, and on any number of lines
            raise ValueError(shown(" ".join(str(error).split()), MESSAGE)) from error
        token = secrets.token_urlsafe(24)
        say(f"http://{LOOPBACK}:{listener.getsockname()[1]}/{token}/")
        say("Open this address on this machine; whoever has it can read the cohort. Ctrl-C ends it.")
        serve(explorer, token, listener)


def listen(port: int) -> socket.socket:
    """A socket on the loopback address.

    Raises:
        ValueError: If the port is none, is in use, or may not be had.
    """
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 65536:
        raise ValueError(f"port must be from 0 (any) to 65535, got {port!r}")
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen()  # whoever asks from now on waits, and is not sent away
    except OSError as error:
        listener.close()
        raise ValueError(f"port must be one that is free, got {port}: {error.strerror}") from error
    return listener


def serve(explorer: Explorer, token: str, listener: socket.socket) -> None:
    """Answer until interrupted; addresses, which hold the token, are logged nowhere."""
    config = uvicorn.Config(
        explorer.app(token),
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run(sockets=[listener])
