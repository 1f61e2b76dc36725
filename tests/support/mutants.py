"""Copies of a module with a fault put in: what a test must catch to be worth having."""

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType


def mutated(module: ModuleType, changes: dict[str, str], folder: Path) -> ModuleType:
    """A copy of `module`, imported from `folder`, with each text replaced.

    Raises:
        ValueError: a text does not stand in the module exactly once; the mutant would be none, or another.
    """
    source = inspect.getsource(module)
    for old, new in changes.items():
        if source.count(old) != 1:
            raise ValueError(f"{module.__name__} has {old!r} {source.count(old)} times, not once")
        source = source.replace(old, new)
    file = folder / f"{module.__name__.rpartition('.')[2]}_mutant.py"
    file.write_text(source)
    name = f"{file.stem}_{folder.name}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made  # Triton looks kernels up by their module
    try:
        spec.loader.exec_module(made)
    finally:
        del sys.modules[name]
    return made
