"""Optional dependencies: imported where needed, and named with their extra when they are missing."""

from importlib import import_module
from typing import Any


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
