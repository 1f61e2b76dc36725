"""The package's own errors, and the one that names the extra a missing package comes with."""

from importlib import import_module
from typing import Any


class CaptureError(ValueError):
    """The model, or what it did, cannot be recorded exactly; the message names the module and the reason."""


class CohortError(RuntimeError):
    """A cohort run that cannot start, or cannot go on; what is written so far stays good."""


def require(module: str, extra: str) -> Any:
    """Import ``module``, or say which extra brings it.

    Raises:
        ImportError: If the module is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise ImportError(
            f"{error.name} is not installed; it comes with an extra: pip install 'attention-rollout[{extra}]'"
        ) from error
