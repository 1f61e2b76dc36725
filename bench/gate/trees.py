"""The two revisions that the gate runs, side by side in a temporary folder that is gone afterwards."""

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("rollout", "kernels")
BUILD = ("pyproject.toml", "README.md", "LICENSE")  # what compiling the native kernel reads


class RevisionError(ValueError):
    """A revision that cannot be compared; the message says why, in one line."""


class Tree(NamedTuple):
    """The packages of one revision: where they lie, and what to call it."""

    root: Path
    label: str


@contextmanager
def trees(repository: Path, base: str, head: str) -> Iterator[dict[str, Tree]]:
    """{"base": …, "head": …} under one temporary folder, removed on success, failure, Ctrl-C and SIGTERM.

    Args:
        repository: a checkout of the repository that knows the revisions.
        base: a revision, as git understands it.
        head: a revision; or a folder with a checkout ("." is one): its files as they are now, changes not yet committed
            and new files included, ignored files not, so that edits made during the run do not reach it.

    Raises:
        RevisionError: a revision is not known, or has no `rollout` package.
    """
    commits = {"base": _commit(repository, base)}
    from_folder = (Path(head) / "rollout" / "__init__.py").is_file()
    if not from_folder:
        commits["head"] = _commit(repository, head)
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory(prefix="rollout-compare-", ignore_cleanup_errors=True) as folder:
            made = {name: _extract(repository, Path(folder) / name, commit) for name, commit in commits.items()}
            if from_folder:
                made["head"] = _copy(Path(head), Path(folder) / "head")
            for tree in made.values():
                if not (tree.root / "rollout" / "__init__.py").is_file():
                    raise RevisionError(f"{tree.label} has no package rollout: there is nothing to compare with")
                compile_native(tree.root)
            yield made
    finally:
        signal.signal(signal.SIGTERM, previous)


def compile_native(root: Path) -> None:
    """What the revision compiles when it is installed; where that fails it works without, here as there."""
    if list(root.glob("kernels/*/*/*.c")):
        command = [sys.executable, "-c", "from setuptools import setup; setup()", "build_ext", "--inplace"]
        subprocess.run(command, cwd=root, capture_output=True, check=False)


def _git(folder: Path, *arguments: str, check: bool = True) -> bytes:
    """What git prints."""
    # Set by git for the hooks it runs, these would point it at another repository.
    environment = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, env=environment, check=False)
    except FileNotFoundError:
        raise RevisionError("git is not installed; both revisions are taken from the repository with it") from None
    if check and done.returncode:
        said = done.stderr.decode(errors="replace").strip() or "no message"
        raise RevisionError(f"git {arguments[0]} failed: {said.splitlines()[-1]}")
    return done.stdout


def _commit(repository: Path, revision: str) -> str:
    """The full name of the commit."""
    options = ("--verify", "--quiet", "--end-of-options")
    found = _git(repository, "rev-parse", *options, f"{revision}^{{commit}}", check=False).decode()
    if not found:
        raise RevisionError(
            f"{revision!r} is no revision of {repository}; give a commit, a tag or a branch that `git rev-parse` knows "
            f"(a shallow clone lacks older ones: git fetch --unshallow)"
        )
    return found.strip()


def _extract(repository: Path, folder: Path, commit: str) -> Tree:
    """The packages as they were committed."""
    there = _git(repository, "ls-tree", "--name-only", commit, "--", *PACKAGES, *BUILD).decode().split()
    folder.mkdir()
    if there:
        with tarfile.open(fileobj=io.BytesIO(_git(repository, "archive", commit, "--", *there))) as archive:
            archive.extractall(folder, filter="data")
    return Tree(folder, f"{commit[:10]} ({_git(repository, 'log', '-1', '--format=%s', commit).decode().strip()})")


def _copy(checkout: Path, folder: Path) -> Tree:
    """The packages as they lie in a checkout."""
    kinds = ("-z", "--cached", "--others", "--exclude-standard")
    listed = _git(checkout, "ls-files", *kinds, "--", *PACKAGES, *BUILD).decode()
    for name in filter(None, listed.split("\0")):
        if (checkout / name).is_file():  # a file removed but not yet from the index is listed too
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(checkout / name, folder / name)
    changed = _git(checkout, "status", "--porcelain", "--", *PACKAGES)
    commit = _git(checkout, "rev-parse", "--short=10", "HEAD").decode().strip()
    return Tree(folder, f"{checkout.resolve()} at {commit}{' with changes' if changed else ''}")
