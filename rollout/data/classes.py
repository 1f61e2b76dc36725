"""PyHealth's own models, datasets and tasks by name, and their arguments checked against their signatures."""

import difflib
import inspect
import json
import math
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from rollout.data.quiet import quiet_pyhealth
from rollout.errors import require

_BASES = {
    "model": ("pyhealth.models", "pyhealth.models.base_model", "BaseModel"),
    "dataset": ("pyhealth.datasets", "pyhealth.datasets.base_dataset", "BaseDataset"),
    "task": ("pyhealth.tasks", "pyhealth.tasks.base_task", "BaseTask"),
}
ROOTS = ("root", "ehr_root")
READOUT_METHODS = ("set_attention_hooks", "get_attention_layers", "get_relevance_tensor")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return `; did you mean "…"?`, or a full stop when no name is like it."""
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f'; did you mean "{close[0]}"?' if close else "."


def named_class(kind: str, name: str, where: str) -> Any:
    """Return a class by its name in `pyhealth.models`, `.datasets` or `.tasks`.

    Args:
        kind: `"model"`, `"dataset"` or `"task"`.
        name: As `from pyhealth.models import <name>` has it; nothing else is looked up or imported.
        where: What to call it in an error.

    Raises:
        ValueError: If PyHealth has no such class, or it is of another kind.
    """
    package, home, base_name = _BASES[kind]
    require("pyhealth", "pyhealth")
    with quiet_pyhealth():
        names, base = vars(import_module(package)), getattr(import_module(home), base_name)
    known = {
        key: value
        for key, value in names.items()
        if inspect.isclass(value) and issubclass(value, base) and value is not base
    }
    if name not in known:
        raise ValueError(
            f"{where} must be the name of a {kind} in {package}, got {name!r}{did_you_mean(name, known)} "
            "For a class of your own: rollout attribute --entry package.module:function"
        )
    return known[name]


def pyhealth_config(name: str) -> Path | None:
    """The configuration of a dataset that PyHealth brings, such as `meds_with_hadm.yaml`; None: it has none so called.

    Raises:
        ImportError: PyHealth is not installed.
    """
    with quiet_pyhealth():
        folder = Path(require("pyhealth.datasets", "pyhealth").__path__[0]) / "configs"
    return next((path for path in folder.iterdir() if path.name == name), None)


def check_model_class(model: Any, where: str) -> None:
    """Refuse a model without PyHealth's three attention readout methods.

    Raises:
        ValueError: naming the missing ones.
    """
    missing = [name for name in READOUT_METHODS if not hasattr(model, name)]
    if missing:
        raise ValueError(
            f"{where}: PyHealth's {model.__name__} has no attention readout (it lacks {', '.join(missing)}); "
            "Transformer and StageAttentionNet have, and TransformersModel, TransformerDeID, GPT2 and HALO do without. "
            "For other models there is rollout.capture"
        )


def check_arguments(called: Any, arguments: Mapping[str, Any], given: Iterable[str], where: str) -> None:
    """Check the names of arguments against a class, and their values against its annotations.

    Args:
        called: The class.
        arguments: Those of the run file.
        given: Names that are filled in elsewhere, and so must not be among them.
        where: What to call them in an error.

    Raises:
        ValueError: For a name the class does not take, one filled in elsewhere, a required one that is missing, or a
            value of another type than the class says.
    """
    parameters = dict(inspect.signature(called).parameters)
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    named = {
        name: p
        for name, p in parameters.items()
        if p.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    given = set(given)
    for name in arguments:
        if name in given:
            raise ValueError(f"{where} must not have {name!r}: the run file sets it elsewhere")
        if name not in named and not open_ended:
            allowed = [known for known in named if known not in given]
            raise ValueError(
                f"{where}: {called.__name__} has no argument {name!r}{did_you_mean(name, allowed)} "
                f"It takes {', '.join(allowed) or 'none'}"
            )
    for name, value in arguments.items():
        wanted = named[name].annotation if name in named else inspect.Parameter.empty
        if not _is_finite(value) or not _suits(value, wanted):
            kind = "finite numbers" if not _is_finite(value) else inspect.formatannotation(wanted)
            raise ValueError(f"{where}: {name} of {called.__name__} must be {kind}, got {value!r}")
    for name, parameter in named.items():
        if parameter.default is inspect.Parameter.empty and name not in arguments and name not in given:
            raise ValueError(f"{where}: {called.__name__} needs the argument {name!r}")


def _is_finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _suits(value: Any, annotation: Any) -> bool:
    """Whether a value is of the annotated type, as far as plain values and annotations tell."""
    if isinstance(annotation, str) or annotation is inspect.Parameter.empty:
        return True
    from pydantic import TypeAdapter, ValidationError

    try:
        said = json.dumps(value)
        TypeAdapter(annotation).validate_json(said, strict=True)
    except ValidationError:
        return False
    except Exception:  # no plain value, or no plain annotation
        return True
    return True


def root_argument(dataset: Any, where: str) -> str:
    """Return the name of the argument a dataset class takes its folder by.

    Raises:
        ValueError: If it has none, writes beside its tables, or would keep its cache elsewhere than told.
    """
    parameters = inspect.signature(dataset).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    root = next((name for name in ROOTS if name in parameters), None)
    writes = hasattr(dataset, "prepare_metadata") or "download" in parameters
    if root is None or not ("cache_dir" in parameters or open_ended) or writes:
        raise ValueError(
            f"{where}: {dataset.__name__} does not read a folder of tables with a cache of its own choosing; "
            "prepare it in Python instead: rollout attribute --entry package.module:function"
        )
    return root
