"""Triton's interpreter under a schedule: the programs of every launch take turns at each access to memory.

Any kernel, as it stands: accesses are seen where the interpreter makes them. Left out: what a real device adds to that,
its caches apart from `memory_model`, and the compiler.
"""

import ctypes
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import triton
from triton.runtime import interpreter

from tests.support import memory_model
from tests.support.memory_model import Event
from tests.support.schedules import Scheduler

# The interpreter's methods that touch memory, and the arguments that are read here, in their places.
HOOKS = {
    "create_masked_load": ("ptrs", "mask", "other"),
    "create_masked_store": ("ptrs", "value", "mask"),
    "create_atomic_rmw": ("rmwOp", "ptr", "val", "mask", "sem"),
    "create_atomic_cas": ("ptr", "cmp", "val", "sem"),
    "create_barrier": (),
}
UNCACHED = re.compile(r"\b(cg|cv)\b", re.IGNORECASE)


@dataclass
class Launch:
    """One launch: its kernel, programs, log, and the tensors it was handed, by name."""

    kernel: str
    tensors: dict[str, Any]
    programs: int = 0
    events: list[Event] = field(default_factory=list)

    def describe(self, address: int) -> str:
        """An address as an element of the tensor it lies in."""
        for name, tensor in self.tensors.items():
            first = tensor.data_ptr()
            if first <= address < first + tensor.numel() * tensor.element_size():
                return f"{name}[{(address - first) // tensor.element_size()}]"
        return f"{address:#x}, memory that no argument holds"


@contextmanager
def schedule(seed: int, resident: int | None = None) -> Iterator[list[Launch]]:
    """Runs every launch within under a schedule of its own, drawn from `seed`, and checks its log.

    Args:
        seed: of all that is drawn.
        resident: how many programs run at once; None: all.

    Yields:
        The launches, as they are made.

    Raises:
        Race, StaleRead, Deadlock: from the call that launched the kernel.
        RuntimeError: this Triton's interpreter is not as it is known here.
    """
    _check_interpreter()
    launches: list[Launch] = []
    hooks = _Hooks()
    execute = interpreter.GridExecutor.__call__

    def run(executor: Any, *args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(executor.arg_names, args, strict=False)), **kwargs}
        tensors = {name: value for name, value in given.items() if hasattr(value, "data_ptr") and value.numel()}
        launch = Launch(executor.fn.__name__, tensors)
        launches.append(launch)
        executor.fn = programs = _Programs(executor.fn, hooks, launch, resident, seed + 1_000_003 * len(launches))
        try:
            with mock.patch.object(interpreter, "_patch_lang", _once_a_module(interpreter._patch_lang)):
                execute(executor, *args, **kwargs)
        except interpreter.InterpreterError:
            raise programs.fault or RuntimeError("raised outside any program") from None

    with (
        mock.patch.multiple(interpreter.InterpreterBuilder, **hooks.methods(), create=True),
        mock.patch.object(interpreter.GridExecutor, "__call__", run),
    ):
        yield launches


def _once_a_module(patch_language: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The interpreter puts its own functions into a module's `tl` for the launch, and again at each call of a device
    function, which takes two fifths of its time: once is enough."""
    done: set[int] = set()

    def patch(function: Any) -> Any:
        if id(function.__globals__) in done:
            return interpreter._LangPatchScope()  # nothing to restore
        done.add(id(function.__globals__))
        return patch_language(function)

    return patch


def _check_interpreter() -> None:
    builder = interpreter.InterpreterBuilder
    moved = [name for name, wanted in HOOKS.items() if not _takes(builder, name, wanted)]
    atomics = {name for name in dir(builder) if name.startswith("create_atomic")}
    if moved or not hasattr(builder, "set_grid_idx") or atomics - set(HOOKS) - _Hooks.REFUSED:
        raise RuntimeError(
            f"the interpreter of Triton {triton.__version__} is not as tests/support knows it: look at {moved}, "
            f"set_grid_idx and {sorted(atomics - set(HOOKS) - _Hooks.REFUSED)}"
        )


def _takes(builder: type, name: str, wanted: tuple[str, ...]) -> bool:
    if not hasattr(builder, name):
        return False
    return tuple(inspect.signature(getattr(builder, name)).parameters)[1 : 1 + len(wanted)] == wanted


class _Programs:
    """Stands in for a kernel: called for the first place in the grid it runs every program, for the others nothing."""

    def __init__(self, kernel: Any, hooks: "_Hooks", launch: Launch, resident: int | None, seed: int) -> None:
        self.kernel, self.hooks, self.launch, self.resident, self.seed = kernel, hooks, launch, resident, seed
        # What the interpreter asks of a kernel.
        self.__name__, self.__globals__, self.__signature__ = (
            kernel.__name__,
            kernel.__globals__,
            inspect.signature(kernel),
        )
        self.fault: BaseException | None = None

    def __call__(self, **arguments: Any) -> None:
        builder = interpreter.interpreter_builder
        if builder.grid_idx != (0, 0, 0):
            return
        grid = list(itertools.product(*map(range, builder.grid_dim)))
        scheduler = Scheduler(len(grid), self.resident, self.seed, lambda number: builder.set_grid_idx(*grid[number]))
        self.launch.programs, self.launch.events = len(grid), scheduler.events
        self.hooks.scheduler = scheduler
        try:
            scheduler.run(lambda: self.kernel(**arguments))
            memory_model.check(scheduler.events, len(grid), self.launch.describe)
        except BaseException as fault:
            self.fault = fault
            raise
        finally:
            self.hooks.scheduler = None
            builder.set_grid_idx(0, 0, 0)
        if not any(event.kind != "barrier" for event in scheduler.events):
            self.fault = RuntimeError(f"{self.__name__} touched no memory that tests/support saw")
            raise self.fault


class _Hooks:
    """The interpreter's accesses to memory, each an event and a place where turns change."""

    REFUSED = frozenset({"create_atomic_load", "create_atomic_store", "create_atomic_poll"})  # of Triton 3.9

    def __init__(self) -> None:
        self.scheduler: Scheduler | None = None
        self.original = {name: getattr(interpreter.InterpreterBuilder, name) for name in HOOKS}

    def methods(self) -> dict[str, Callable[..., Any]]:
        """Methods of `InterpreterBuilder` by name, those of this Triton that it lacks left out."""
        own = {name: self._method(getattr(self, name.removeprefix("create_"))) for name in HOOKS}
        refused = {name: self._refuse(name) for name in self.REFUSED if hasattr(interpreter.InterpreterBuilder, name)}
        if hasattr(interpreter.InterpreterBuilder, "get_cache_policy"):  # 3.9: says nothing of the policy asked for
            own["get_cache_policy"] = lambda builder, modifier, eviction: (modifier, eviction)
        return own | refused

    def _method(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda builder, *args, **kwargs: hook(builder, *args, **kwargs)

    def _refuse(self, name: str) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"{name} is not in the memory model of tests/support")

        return refuse

    def masked_load(self, builder: Any, ptrs: Any, mask: Any, other: Any, *policy: Any, **named: Any) -> Any:
        given = (*policy, *named.values())
        volatile = bool(named.get("is_volatile", policy[-1] if policy else False))
        uncached = volatile or any(UNCACHED.search(str(each).replace("_", " ")) for each in given)
        scheduler = self._turn()
        event = self._event(scheduler, "load", ptrs, mask.data, cached=not uncached)
        if volatile:
            scheduler.asked(("load", event.addresses.tobytes()))
        return self.original["create_masked_load"](builder, ptrs, mask, other, *policy, **named)

    def masked_store(self, builder: Any, ptrs: Any, value: Any, mask: Any, *policy: Any, **named: Any) -> Any:
        scheduler = self._turn()
        self._event(scheduler, "store", ptrs, mask.data)
        scheduler.wrote()
        return self.original["create_masked_store"](builder, ptrs, value, mask, *policy, **named)

    def atomic_rmw(self, builder: Any, op: Any, ptr: Any, val: Any, mask: Any, sem: Any, *scope: Any) -> Any:
        make = self.original["create_atomic_rmw"]
        return self._atomic(ptr, mask.data, sem, lambda: make(builder, op, ptr, val, mask, sem, *scope))

    def atomic_cas(self, builder: Any, ptr: Any, cmp: Any, val: Any, sem: Any, *scope: Any) -> Any:
        make = self.original["create_atomic_cas"]
        return self._atomic(ptr, np.True_, sem, lambda: make(builder, ptr, cmp, val, sem, *scope))

    def barrier(self, builder: Any) -> Any:
        scheduler = self._turn()
        scheduler.events.append(Event(scheduler.current, "barrier", where=_line()))
        return self.original["create_barrier"](builder)

    def _turn(self) -> Scheduler:
        assert self.scheduler is not None, "a kernel's access outside a launch"
        self.scheduler.switch()
        return self.scheduler

    def _event(self, scheduler: Scheduler, kind: Any, pointers: Any, mask: Any, **known: bool) -> Event:
        addresses = np.asarray(pointers.data)
        addresses = addresses[np.broadcast_to(mask, addresses.shape).astype(bool)].astype(np.int64)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        event = Event(scheduler.current, kind, addresses, size, where=_line(), **known)
        scheduler.events.append(event)
        return event

    def _atomic(self, pointers: Any, mask: Any, sem: Any, make: Callable[[], Any]) -> Any:
        scheduler = self._turn()
        acquire, release = ("ACQUIRE" in str(sem), "RELEASE" in str(sem))
        event = self._event(scheduler, "atomic", pointers, mask, acquire=acquire, release=release)
        before = _memory(event)
        result = make()
        if _memory(event) != before:
            scheduler.wrote()
        else:
            scheduler.asked(("atomic", event.addresses.tobytes()))
        return result


def _memory(event: Event) -> list[bytes]:
    return [ctypes.string_at(address, event.size) for address in event.addresses.tolist()]


def _line() -> str:
    """The line of the kernel, or of a function it calls, that is being interpreted."""
    frame = sys._getframe(1)
    own, package = str(Path(__file__).parent), str(Path(triton.__file__).parent)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((own, package)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
