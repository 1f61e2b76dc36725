"""The two revisions that the gate runs, side by side in a temporary folder that is gone afterwards."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

PACKAGES = ("rollout", "kernels")


class GateError(RuntimeError):
    """The revisions cannot be compared; the message says why, in one line."""


@contextmanager
def trees(repository: Path, base: str, head: str) -> Iterator[tuple[Path, dict[str, str]]]:
    """A temporary folder with `base/` and `head/`, and what to call them; removed on failure, Ctrl-C and SIGTERM too.

    `base` is a revision that the repository knows, as git understands it. So is `head`; or it is a folder with a
    checkout: its files as they are now, new and changed ones included, ignored ones not. Edits made during the run do
    not reach it.

    Raises:
        GateError: a revision is not known, or has no `rollout` package.
    """
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory(prefix="rollout-compare-", ignore_cleanup_errors=True) as name:
            folder, checkout = Path(name), Path(head)
            is_folder = (checkout / "rollout" / "__init__.py").is_file()
            now = (checkout, "HEAD") if is_folder else (repository, head)
            labels = {"base": _lay_out(repository, base, folder / "base")}
            labels["head"] = _lay_out(*now, folder / "head", changes=is_folder)
            for side in labels:
                compile_native(folder / side)
            yield folder, labels
    finally:
        signal.signal(signal.SIGTERM, previous)


def _lay_out(repository: Path, revision: str, folder: Path, *, changes: bool = False) -> str:
    """Lay out a revision, with the checkout's changes on it or not, its index left alone; what to call that."""
    git = partial(_git, repository)
    try:
        commit = git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    except GateError as error:
        raise GateError(
            f"{revision!r} is no revision of {repository} ({error}); give a commit, a tag or a branch that git knows "
            f"(a shallow clone lacks older ones: git fetch --unshallow)"
        ) from None
    objects = git("rev-parse", "--path-format=absolute", "--git-path", "objects")
    scratch = folder.with_suffix(".git")
    scratch.mkdir()  # where an index lies, and what is added: nothing comes into the repository
    own = {"GIT_INDEX_FILE": f"{scratch}/index", "GIT_OBJECT_DIRECTORY": str(scratch)}
    git = partial(_git, repository, GIT_ALTERNATE_OBJECT_DIRECTORIES=objects, **own)
    git("read-tree", commit)
    if changes:
        git("add", "--update")
        git("add", "--", *(name for name in PACKAGES if (repository / name).exists()))
        changed = git("diff-index", "--cached", commit)
        label = f"{repository.resolve()} at {commit[:10]}{' with changes' if changed else ''}"
    else:
        label = git("log", "-1", "--abbrev=10", "--format=%h (%s)", commit)
    git("checkout-index", "--all", f"--prefix={folder}/")
    if not (folder / "rollout" / "__init__.py").is_file():
        raise GateError(f"{label} has no package rollout: there is nothing to compare with")
    return label


def compile_native(root: Path) -> None:
    """What the revision compiles when it is installed; where that fails it works without, here as there."""
    if list(root.glob("kernels/*/*/*.c")):
        command = [sys.executable, "-c", "from setuptools import setup; setup()", "build_ext", "--inplace"]
        subprocess.run(command, cwd=root, capture_output=True, check=False)


def _git(repository: Path, *arguments: str, **environment: str) -> str:
    """What git prints."""
    # Set by git for the hooks it runs, these would point it at another repository.
    inherited = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}
    command = ["git", "-C", str(repository), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=inherited | environment, check=False)
    if done.returncode:
        said = done.stderr.strip() or "no message"
        raise GateError(f"git {arguments[0]} failed: {said.splitlines()[-1]}")
    return done.stdout.strip()
