"""What a function of the caller's is: a digest of its code, and what it holds, as far as both can be known.

Followed are functions, methods, partials, classes and callable objects: what they were given by default, what they
close over, the module's globals they name, and what of the caller's own modules they name. The code of installed
packages is not looked at; their versions stand in the manifest. What is looked up while it runs (`getattr`, an
attribute of an argument, a plug-in) cannot be known.
"""

import functools
import hashlib
import site
import sys
import sysconfig
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

import rollout_kernels
from rollout.cohort.digest import digest_of, is_plain, shown


class Described(NamedTuple):
    """What is known of some functions.

    Attributes:
        code: Digest of the code that is the caller's own; None if none of it is. It is of one version of Python.
        state: Name → a plain value, or a digest: globals, what is closed over, defaults, attributes.
    """

    code: str | None
    state: dict[str, Any]


def python_version() -> str:
    """The version of Python that code is compiled for: digests of code compare within one."""
    return f"{sys.implementation.cache_tag}{'-O' * sys.flags.optimize}"


def name_of(function: Any) -> str:
    """`module.name` of a function, or of the class of a callable object."""
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}.{kind.__qualname__}"


_OF_TORCH = frozenset(vars(nn.Module()))


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Numbers, strings and flags that a module holds, private ones too, and tuples and lists of them."""
    return {key: value for key, value in vars(module).copy().items() if key not in _OF_TORCH and is_plain(value)}


def describe(values: Iterable[Any], name: str, known: Collection[Any] = ()) -> Described:
    """Describe functions and classes, and what they reach.

    Args:
        values: What to begin with.
        name: First part of the names of what they hold.
        known: Objects that are described elsewhere, such as the model, and are not entered.
    """
    walk = _Walk(known)
    for value in values:
        walk.add(name, value)
    return walk.run()


class _Walk:
    """Objects to look at, one by one; each is entered once."""

    def __init__(self, known: Collection[Any]) -> None:
        self._kept = list(known)  # alive as long as their ids are compared
        self._seen = {id(one) for one in known}
        self._waiting: deque[tuple[str, Any]] = deque()
        self._code: list[str] = []
        self._state: dict[str, Any] = {}

    def run(self) -> Described:
        while self._waiting:
            self._enter(*self._waiting.popleft())
        code = hashlib.sha256("\n".join(self._code).encode()).hexdigest() if self._code else None
        return Described(code, self._state)

    def add(self, name: str, value: Any) -> None:
        """Look at a value now, if it is plain, or later."""
        if is_plain(value):
            self._state.setdefault(name, shown(value))
        elif isinstance(value, Tensor | np.ndarray):
            self._state.setdefault(name, f"sha256:{digest_of(value)[:16]}")
        elif id(value) not in self._seen:
            self._seen.add(id(value))
            self._kept.append(value)
            self._waiting.append((name, value))

    def _enter(self, name: str, value: Any) -> None:
        if isinstance(value, FunctionType):
            self._function(name, value)
        elif isinstance(value, MethodType):
            self.add(name, value.__func__)
            self.add(name, value.__self__)
        elif isinstance(value, functools.partial):
            for key, item in enumerate((value.func, *value.args)):
                self.add(name if key == 0 else f"{name}.{key}", item)
            self._mapping(name, value.keywords)
        elif isinstance(value, staticmethod | classmethod):
            self.add(name, value.__func__)
        elif isinstance(value, property):
            for function in (value.fget, value.fset):
                self.add(name, function)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, nn.Module):
            self._state[name] = f"sha256:{digest_of(dict(value.state_dict()))[:16]}"
            for prefix, module in value.named_modules():
                self.add(name, type(module))
                self._mapping(f"{name}.{prefix}".rstrip("."), settings_of(module))
        elif isinstance(value, Mapping | list | tuple | set | frozenset):
            self._container(name, value)
        elif hasattr(value, "__wrapped__"):
            self.add(name, value.__wrapped__)
        elif not isinstance(value, ModuleType) and not _is_installed(_file_of(type(value))):
            self.add(name, type(value))
            self._mapping(name, getattr(value, "__dict__", {}))

    def _function(self, name: str, function: FunctionType) -> None:
        code = function.__code__
        given = function.__defaults__ or ()
        arguments = code.co_varnames[: code.co_argcount]
        self._mapping(name, dict(zip(arguments[len(arguments) - len(given) :], given, strict=True)))
        self._mapping(name, function.__kwdefaults__ or {})
        held = dict(function.__dict__)
        if "__wrapped__" in held:
            self.add(name, held.pop("__wrapped__"))
        self._mapping(name, held)
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                self.add(f"{name}.{variable}", cell.cell_contents)
            except ValueError:  # not bound yet
                continue
        if not _is_installed(code.co_filename):
            self._code.append(digest_of(_described_code(code)))
            self._names(name, function.__globals__, _names_in(code))

    def _names(self, name: str, scope: Mapping[str, Any], names: list[str]) -> None:
        """What the code names of its module, and of modules of the caller's that it names."""
        for key in names:
            if key.startswith("__") or key not in scope:
                continue
            value = scope[key]
            if not isinstance(value, ModuleType):
                self.add(f"{name}.{key}", value)
            elif value is not sys.modules.get(scope.get("__name__", "")) and not _is_installed(_file_of(value)):
                self._names(f"{name}.{key}", vars(value), [other for other in names if other != key])

    def _class(self, kind: type) -> None:
        name = name_of(kind)
        for base in kind.__mro__:
            if _is_installed(_file_of(base)):
                continue
            self._code.append(digest_of(["class", base.__qualname__]))
            for key, value in sorted(vars(base).items()):
                code = isinstance(value, FunctionType | staticmethod | classmethod | property)
                if code or not key.startswith("__"):
                    self.add(f"{name}.{key}", value)

    def _mapping(self, name: str, values: Mapping[str, Any]) -> None:
        for key, value in sorted(dict(values).items()):
            self.add(f"{name}.{key}", value)

    def _container(self, name: str, values: Any) -> None:
        """One state for the whole, and the code of the functions in it."""
        items = list(values.values()) if isinstance(values, Mapping) else list(values)
        self._state[name] = f"sha256:{digest_of(values)[:16]}"
        if isinstance(values, set | frozenset):
            items.sort(key=repr)
        for item in items:
            if callable(item):
                self.add(name, item)


def _described_code(code: CodeType) -> list[Any]:
    """What a code object does, without where it stands."""
    constants = [_described_code(one) if isinstance(one, CodeType) else one for one in code.co_consts]
    variables = [code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars]
    counts = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags]
    return [code.co_code, code.co_exceptiontable, constants, variables, counts]


def _names_in(code: CodeType) -> list[str]:
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names += _names_in(constant)
    return list(dict.fromkeys(names))


def _file_of(value: type | ModuleType) -> str:
    """The file a class or module is from; of built-in ones, a name that no file has."""
    name = value.__name__ if isinstance(value, ModuleType) else value.__module__
    module = value if isinstance(value, ModuleType) else sys.modules.get(name)
    builtin = name.partition(".")[0] in sys.stdlib_module_names or name == "builtins"
    return getattr(module, "__file__", None) or ("<frozen>" if builtin else "<made here>")


@functools.cache
def _is_installed(file: str) -> bool:
    """Whether a file is Python's, an installed package's, or ours."""
    return file.startswith("<frozen") or any(Path(file).is_relative_to(folder) for folder in _installed_folders())


@functools.cache
def _installed_folders() -> list[Path]:
    paths = [sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    paths += [*site.getsitepackages(), site.getusersitepackages()]
    paths += [str(Path(__file__).parents[1]), str(Path(str(rollout_kernels.__file__)).parent)]
    return [Path(path) for path in paths] + [Path(path).resolve() for path in paths]
