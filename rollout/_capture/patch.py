"""Seeing the calls of a module for a while: a stand-in on the instance, removed at the last exit.

`around_call` stands in for the whole call, hooks included, in the attribute that torch.compile uses for the same
purpose: torch leaves it out when it copies or pickles a module, so a copy made meanwhile is a plain one.
`around_forward` stands in for `forward` alone, and sees what hooks made of the arguments; it is for the time that a
model runs.

Every thread that runs the module meets the stand-in, so what it calls must ask for itself whether this thread is
capturing, and pass the call through when it is not.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Around = Callable[..., Any]
"""`around(module, call, *args, **kwargs)`: stands in for `call(*args, **kwargs)`, which it calls itself."""

CALL, FORWARD = "_compiled_call_impl", "forward"
_lock = threading.Lock()
_patches: dict[tuple[int, str], "_Patch"] = {}


class _Patch:
    """The stand-in for one module's call or forward, shared by every capture that is open on it."""

    def __init__(self, module: nn.Module, slot: str) -> None:
        self.module, self.slot = module, slot
        self.users: list[Around] = []
        self.own = vars(module).get(slot)
        self.original: Callable[..., Any] = module._call_impl if slot == CALL else module.forward
        self.stand_in: Any = self if slot == CALL else self._as_function()
        vars(module)[slot] = self.stand_in

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.original
        for around in dict.fromkeys(self.users):
            call = functools.partial(around, self.module, call)
        return call(*args, **kwargs)

    def _as_function(self) -> Callable[..., Any]:
        """Some look at the signature of a forward."""

        @functools.wraps(self.original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        return forward

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return _none, ()

    def remove(self) -> None:
        # When someone else replaced it meanwhile, theirs calls ours, which passes through.
        if vars(self.module).get(self.slot) is self.stand_in:
            if self.own is None:
                del vars(self.module)[self.slot]
            else:
                vars(self.module)[self.slot] = self.own
        self.stand_in = None  # the cycle would keep the model alive


def _none() -> None:
    """What a patch is in a pickle."""


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has replaced the module's call."""
    compiled = getattr(module, CALL, None)
    return compiled is not None and not isinstance(compiled, _Patch)


def foreign_forward(module: nn.Module) -> Any:
    """The `forward` that someone other than `around_forward` put on the instance, or None."""
    with _lock:
        patch, forward = _patches.get((id(module), FORWARD)), vars(module).get(FORWARD)
        return patch.own if patch is not None and forward is patch.stand_in else forward


def around_call(modules: dict[nn.Module, Around]) -> Any:
    """Have each module's calls go through its function for the duration of the block.

    One function serves a module once, however many captures asked for it. The instances are as before when the last of
    them has left, whatever happened in between.
    """
    return _around(modules, CALL)


def around_forward(modules: dict[nn.Module, Around]) -> Any:
    """As `around_call`, within the hooks of the modules."""
    return _around(modules, FORWARD)


@contextmanager
def _around(modules: dict[nn.Module, Around], slot: str) -> Iterator[None]:
    with _lock:
        for module, around in modules.items():
            patch = _patches.get((id(module), slot))
            if patch is None:
                patch = _patches[id(module), slot] = _Patch(module, slot)
            patch.users.append(around)
    try:
        yield
    finally:
        with _lock:
            for module, around in modules.items():
                patch = _patches[id(module), slot]
                patch.users.remove(around)
                if not patch.users:
                    del _patches[id(module), slot]
                    patch.remove()
