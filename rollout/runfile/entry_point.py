"""Functions of the user's that the command line calls by name: `package.module:function`."""

import os
import re
import sys
from importlib import import_module
from typing import Any

__all__ = ["call_entry", "find_entry"]


def find_entry(entry: str, option: str = "--entry") -> Any:
    """Return the function that `package.module:function` names; the current folder can be imported from.

    Args:
        entry: `package.module:function`.
        option: What the command line calls it, for messages.

    Raises:
        ValueError: If the text, the module or the function is not there.
        RuntimeError: If the module cannot be imported.
    """
    if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", entry):
        raise ValueError(f"{option} must be package.module:function, got {entry!r}")
    module_name, name = entry.split(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = import_module(module_name)
    except Exception as error:
        lacking = error.name if isinstance(error, ModuleNotFoundError) else None
        if lacking is None or not f"{module_name}.".startswith(f"{lacking}."):
            raise RuntimeError(f"{option} {entry}: importing it raised {type(error).__name__}: {error}") from error
        raise ValueError(f"{option} {entry}: there is no module {lacking} to import from {os.getcwd()}") from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ValueError(f"{option} {entry}: {module_name} has no function {name}")
    return found


def call_entry(function: Any, entry: str, option: str = "--entry") -> Any:
    """Return what a function gives that `find_entry` found.

    Raises:
        RuntimeError: If it raises.
    """
    try:
        return function()
    except Exception as error:
        raise RuntimeError(f"{option} {entry} raised {type(error).__name__}: {error}") from error
