"""What the tests of a card do with it; without one the same calls run on the CPU, in Triton's interpreter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

ON_CARD = torch.cuda.is_available()
DEVICE = "cuda" if ON_CARD else "cpu"


def needs_memory(gib: int) -> None:
    """Skips a test where the card has not so many GiB free, or there is none."""
    if not ON_CARD or torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free device memory")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within, an operation for which the host waits for the card is an error."""
    if not ON_CARD:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def side_stream() -> Iterator[None]:
    """Within, work goes to a stream of its own, after what was given to the current one, which does not wait for it."""
    if not ON_CARD:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield


def finish() -> None:
    """Waits for all streams."""
    if ON_CARD:
        torch.cuda.synchronize()


def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`run` as a CUDA graph. Each call replays it on what its inputs hold then, into one and the same result."""
    with side_stream():
        run()  # compiled before it is captured
    finish()
    if not ON_CARD:
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return lambda: (graph.replay(), result)[1]
