"""Seeing the calls of a module for a while: a stand-in for `nn.Module._call_impl` on the instance.

It sits in the attribute that torch.compile uses for the same purpose, which torch leaves out when it copies or pickles
a module. So a copy made meanwhile is a plain one. Every thread that runs the module meets the stand-in: what it calls
must ask for itself whether this thread is capturing, and pass the call through when it is not.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Around = Callable[..., Any]
"""`around(module, call, *args, **kwargs)`: stands in for `call(*args, **kwargs)`, which it calls itself."""

_SLOT = "_compiled_call_impl"
_lock = threading.Lock()
_patches: dict[int, "_Patch"] = {}


class _Patch:
    """The stand-in for one module's call, shared by every capture that is open on it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.users: list[Around] = []
        vars(module)[_SLOT] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call: Callable[..., Any] = self.module._call_impl
        for around in dict.fromkeys(self.users):
            call = functools.partial(around, self.module, call)
        return call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return _none, ()

    def remove(self) -> None:
        if vars(self.module).get(_SLOT) is self:
            del vars(self.module)[_SLOT]


def _none() -> None:
    """What a patch is in a pickle."""


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has replaced the module's call."""
    compiled = getattr(module, _SLOT, None)
    return compiled is not None and not isinstance(compiled, _Patch)


def foreign_forward(module: nn.Module) -> Any:
    """The `forward` that someone put on the instance, or None."""
    return vars(module).get("forward")


@contextmanager
def around_call(modules: dict[nn.Module, Around]) -> Iterator[None]:
    """Have each module's calls go through its function for the duration of the block.

    One function serves a module once, however many captures asked for it. The instances are as before when the last of
    them has left, whatever happened in between.
    """
    with _lock:
        for module, around in modules.items():
            patch = _patches.get(id(module))
            if patch is None:
                patch = _patches[id(module)] = _Patch(module)
            patch.users.append(around)
    try:
        yield
    finally:
        with _lock:
            for module, around in modules.items():
                patch = _patches[id(module)]
                patch.users.remove(around)
                if not patch.users:
                    del _patches[id(module)]
                    patch.remove()
