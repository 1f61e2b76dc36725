"""The two revisions that `bench.gate` runs, side by side in a temporary folder that is gone afterwards."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

PACKAGES = ("rollout", "kernels")


class RevisionError(ValueError):
    """A revision that cannot be compared; the message says why, in one line."""


@dataclass(frozen=True)
class Tree:
    """The files of one revision: where they lie, and what to call it."""

    root: Path
    label: str


@contextmanager
def trees(repository: Path, base: str, head: str) -> Iterator[dict[str, Tree]]:
    """{"base": …, "head": …} under one temporary folder, removed on success, failure, Ctrl-C and SIGTERM.

    The base is a git worktree. So is the head, unless it names a folder with a checkout ("." is one): then its files as
    they are now, changes not yet committed and new files included, ignored files not, so that edits made during the run
    do not reach it.

    Args:
        repository: a checkout of the repository that knows the revisions.
        base: a revision, as git understands it.
        head: a folder or a revision.

    Raises:
        RevisionError: a revision is not known, or has no `rollout` package.
    """
    repository = _top(repository)
    commits = {"base": _commit(repository, base)}
    from_folder = (Path(head) / "rollout" / "__init__.py").is_file()
    if not from_folder:
        commits["head"] = _commit(repository, head)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    folder = Path(tempfile.mkdtemp(prefix="rollout-compare-"))
    try:
        made = {name: _worktree(repository, folder / name, commit) for name, commit in commits.items()}
        if from_folder:
            made["head"] = _snapshot(_top(Path(head)), folder / "head")
        for tree in made.values():
            if not (tree.root / "rollout" / "__init__.py").is_file():
                raise RevisionError(f"{tree.label} has no package rollout: there is nothing to compare with")
        yield made
    finally:
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        for name in commits:
            _git(repository, "worktree", "remove", "--force", str(folder / name), check=False)
        shutil.rmtree(folder, ignore_errors=True)
        _git(repository, "worktree", "prune", check=False)
        signal.signal(signal.SIGINT, handlers[signal.SIGINT])
        signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _git(folder: Path, *arguments: str, check: bool = True) -> str:
    """What git prints. Its own session keeps a Ctrl-C from ending it half-way."""
    # Set by git for the hooks it runs, these would point it at another repository.
    environment = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, env=environment)
    except FileNotFoundError:
        raise RevisionError("git is not installed; both revisions are taken from the repository with it") from None
    if check and done.returncode:
        raise RevisionError(f"git {arguments[0]} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return done.stdout


def _top(folder: Path) -> Path:
    return Path(_git(folder, "rev-parse", "--show-toplevel").rstrip("\n"))


def _commit(repository: Path, revision: str) -> str:
    """The full name of the commit."""
    found = _git(
        repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}", check=False
    )
    if not found:
        raise RevisionError(
            f"{revision!r} is no revision of {repository}; give a commit, a tag or a branch that `git rev-parse` knows "
            f"(a shallow clone lacks older ones: git fetch --unshallow)"
        )
    return found.strip()


def _worktree(repository: Path, folder: Path, commit: str) -> Tree:
    _git(repository, "worktree", "add", "--detach", "--quiet", str(folder), commit)
    return Tree(folder, f"{commit[:10]} ({_git(repository, 'log', '-1', '--format=%s', commit).strip()})")


def _snapshot(checkout: Path, folder: Path) -> Tree:
    """A copy of the packages' files as they are in a checkout."""
    listed = _git(checkout, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PACKAGES)
    for name in filter(None, listed.split("\0")):
        if (checkout / name).is_file():  # a file removed but not yet from the index is listed too
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(checkout / name, folder / name)
    changed = _git(checkout, "status", "--porcelain", "--", *PACKAGES)
    commit = _git(checkout, "rev-parse", "--short=10", "HEAD").strip()
    return Tree(folder, f"{checkout} at {commit}{' with changes' if changed else ''}")
