"""The package's own errors, the one that names the extra a missing package comes with, and an error as one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


class CaptureError(ValueError):
    """The model, or what it did, cannot be recorded exactly; the message names the module and the reason."""


class CohortError(RuntimeError):
    """A cohort run that cannot start, or cannot go on; what is written so far stays good."""


def require(module: str, extra: str) -> Any:
    """Import `module`, or say which extra brings it.

    Raises:
        ImportError: If the module is not installed.
    """
    with brought_by(extra):
        return import_module(module)


@contextmanager
def brought_by(extra: str) -> Iterator[None]:
    """Around imports: a package that is not installed is an error that names the extra.

    Raises:
        ImportError: If what is imported within needs a package that is not there.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or "." in error.name:  # a module that a package, or this one, should have
            raise
        raise ImportError(
            f"{error.name} is not installed; it comes with an extra: pip install 'attention-rollout[{extra}]'"
        ) from error


def one_line(error: BaseException | str, most: int = 2000) -> str:
    """What an error says, on one line a terminal can show: line ends and control characters cannot act there."""
    text = " ".join(str(error).split("\n")) or type(error).__name__
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return text if len(text) <= most else text[: most - 1] + "…"
