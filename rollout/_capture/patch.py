"""Seeing the calls of a module's `forward` for a while: a replacement on the instance, removed at the last exit.

Every thread that runs the module meets the replacement, so what it calls must ask for itself whether this thread is
capturing, and pass the call through when it is not.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Around = Callable[..., Any]
"""`around(module, forward, *args, **kwargs)`: stands in for `forward(*args, **kwargs)`, which it calls itself."""

_lock = threading.Lock()
_patches: dict[int, "_Patch"] = {}


class _Patch:
    """The replacement of one module's `forward`, shared by every capture that is open on it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.users: list[Around] = []
        self.own = vars(module).get("forward")
        original = module.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = original
            for around in dict.fromkeys(self.users):
                call = functools.partial(around, module, call)
            return call(*args, **kwargs)

        self.forward = forward
        module.forward = forward

    def remove(self) -> None:
        # When someone else replaced it meanwhile, theirs calls ours, which passes through.
        if vars(self.module).get("forward") is self.forward:
            if self.own is None:
                del self.module.forward
            else:
                self.module.forward = self.own
        del self.module, self.forward  # the cycle would keep the model alive


def foreign_forward(module: nn.Module) -> Any:
    """The `forward` that someone other than `around_forward` put on the instance, or None."""
    with _lock:
        patch, forward = _patches.get(id(module)), vars(module).get("forward")
        return patch.own if patch is not None and forward is patch.forward else forward


@contextmanager
def around_forward(modules: dict[nn.Module, Around]) -> Iterator[None]:
    """Have each module's `forward` go through its function for the duration of the block.

    One function serves a module once, however many captures asked for it. The attribute `forward` of the instances is
    as before when the last of them has left, whatever happened in between.
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
