"""Seconds by stage, where someone asked for them: `with timed("chain"):` costs next to nothing otherwise."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Watch(threading.local):
    """Of this thread: where the seconds go, and those spent in stages within the present one."""

    seconds: dict[str, float] | None = None
    inside = 0.0


_watch = _Watch()


@contextmanager
def stopwatch(seconds: dict[str, float]) -> Iterator[None]:
    """Within, in this thread, every `timed` stage adds its seconds to `seconds`."""
    before, _watch.seconds = _watch.seconds, seconds
    try:
        yield
    finally:
        _watch.seconds = before


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """A stage. Its seconds count for it alone, not for the stage around it; it waits for the GPU when it is watched."""
    seconds = _watch.seconds
    if seconds is None:
        yield
        return
    outer, _watch.inside = _watch.inside, 0.0
    _wait_for_gpu()
    begun = time.perf_counter()
    try:
        yield
    finally:
        _wait_for_gpu()
        spent = time.perf_counter() - begun
        seconds[stage] = seconds.get(stage, 0.0) + spent - _watch.inside
        _watch.inside = outer + spent


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
