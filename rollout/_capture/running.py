"""Which module is running: read off the call stack, so that no module has to be touched."""

import sys
from collections.abc import Container
from traceback import walk_tb
from types import FrameType

from torch import nn

__all__ = ["raising_module", "running_module"]


def running_module(known: Container[nn.Module]) -> nn.Module | None:
    """The innermost module among `known` whose method is running in this thread, or None."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = _owner(frame, known)
        if owner is not None:
            return owner
        frame = frame.f_back
    return None


def raising_module(known: Container[nn.Module], error: BaseException) -> nn.Module | None:
    """The innermost module among `known` whose method an error came through, or None."""
    found = (_owner(frame, known) for frame, _ in walk_tb(error.__traceback__))
    return next((owner for owner in reversed(list(found)) if owner is not None), None)


def _owner(frame: FrameType, known: Container[nn.Module]) -> nn.Module | None:
    code = frame.f_code
    owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return owner if isinstance(owner, nn.Module) and owner in known else None
