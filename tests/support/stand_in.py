"""A stand-in for a GPU and its driver: the host path of the Triton kernels on a machine with no card.

    with stand_in.device("sm_90") as card:
        rollout.attention_rollout(maps, query=0, backend="triton", validate=False)
    assert card.kernels == ["prepare_kernel", "rows_split_kernel"]

Triton binds and specialises, and compiles for the target if asked to, as on a card; the launch itself is written down
and not made, so results hold whatever was in memory. Tensors are in the memory of the CPU and count as the device's,
but for those that `host` names and what is computed from them.

How long a call takes on the host, in µs: `python -m tests.support.stand_in`.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver as active

import rollout
from rollout_kernels._triton import launch, run

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PROCESSORS = 132
# What reads a value of the device on the host, by the names of the ATen operations under it.
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2", "item"}
READS = {"tolist", "numpy", "cpu", "__array__"}  # the same, of methods with no operation under them
FROM_HOST = {"tensor", "as_tensor", "asarray", "from_numpy", "frombuffer"}  # fill memory of the host
ALLOCATIONS = {"empty", "empty_strided", "empty_like", "detach"}  # no kernel runs
_numbers = count()


@dataclass
class Launch:
    """One launch: the kernel's name, its grid, and its arguments by name."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]


@dataclass
class Card:
    """What happened on the stand-in.

    Attributes:
        launched: of kernels of Triton, in order, the last 256, as they came; `launches` makes them readable.
        compiled: (name, handle) of each kernel that was made ready: one variant each.
        operations: names of ATen operations that would have run a kernel on the device.
        waits: what made the host wait for the device.
        copies: what copied from pageable memory of the host to the device.
        making_on_host: whether a call that names no device is being made.
    """

    launched: deque[tuple[Any, tuple[int, int, int], tuple[Any, ...]]] = field(
        default_factory=lambda: deque(maxlen=256)
    )
    compiled: list[str] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    making_on_host: bool = False

    @property
    def launches(self) -> list[Launch]:
        """The launches, in order."""
        return [
            Launch(
                function.fn.__name__, grid, dict(zip(function.arg_names, rest[-len(function.arg_names) :], strict=True))
            )
            for function, grid, rest in self.launched
        ]

    @property
    def kernels(self) -> list[str]:
        """The names of the kernels launched."""
        return [each.kernel for each in self.launches]

    def variants(self, kernel: str) -> int:
        """How many variants of a kernel have been compiled and made ready."""
        return self.compiled.count(kernel)

    def clear(self) -> None:
        """Forgets what happened; variants stay."""
        for each in (self.launched, self.operations, self.waits, self.copies):
            each.clear()


class _Driver:
    """What Triton asks of a driver between a call of a kernel and its launch."""

    def __init__(self, card: Card, target: GPUTarget) -> None:
        self.card, self.target, self.utils = card, target, self
        self.device = f"stand-in {next(_numbers)}"  # Triton keeps compiled kernels by device
        self.functions: set[Any] = set()
        self.compile = triton.compiler.compile

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        function, record = source.fn, self.card.launched.append
        self.functions.add(function)
        self.card.compiled.append(function.fn.__name__)

        def run(x: int, y: int, z: int, *rest: Any) -> None:
            record((function, (x, y, z), rest))

        return run

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, the most threads

    def forget(self) -> None:
        """Drops what Triton keeps for this device; a kernel with a module would ask the next driver to unload it."""
        for function in self.functions:
            for kernel in function.device_caches.pop(self.device)[0].values():
                kernel.module = None
            function.compile = self.compile

    def get_device_properties(self, _: Any) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, _: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class _Uncompiled:
    """Stands for a compiled kernel where nobody asks what the compiler makes of it."""

    function, packed_metadata, module = 0, None, None

    def __init__(self, run: Callable[..., None]) -> None:
        self.run = run

    def launch_metadata(self, *_: Any) -> None:
        return None

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments: self.run(*grid, 0, 0, *arguments)


@contextmanager
def device(name: str = "sm_90", processors: int = PROCESSORS, compiles: bool = False) -> Iterator[Card]:
    """A card takes the calls of Triton kernels on tensors of the CPU; everything is as before at the end.

    Args:
        name: of `TARGETS`.
        processors: how many the card has.
        compiles: whether kernels are compiled too, in seconds each, and launched by Triton's own objects. Otherwise a
            call goes as far as the choice of the variant and of the compiler's options.
    """
    card = Card()
    driver = _Driver(card, TARGETS[name])

    def uncompiled(source: Any, **_: Any) -> _Uncompiled:
        return _Uncompiled(driver.launcher_cls(source, None))

    table = name if name.startswith("sm_") else "default"
    facts = launch.Target(table, processors)
    before = active._active
    active.set_active(driver)
    try:
        with (
            patch.object(launch, "target", lambda _: facts),
            patch.object(launch, "rocm", lambda: driver.target.backend == "hip"),
            patch.object(triton.compiler, "compile", driver.compile if compiles else uncompiled),
            patch.dict(run._variants),
        ):
            yield card
    finally:
        driver.forget()
        active._active = before


def host(tensor: Tensor) -> Tensor:
    """Names a tensor that is in the host's memory, not the device's."""
    tensor.on_host = True  # type: ignore[attr-defined]
    return tensor


def is_host(tensor: Tensor) -> bool:
    return getattr(tensor, "on_host", False)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


@contextmanager
def watch(card: Card) -> Iterator[None]:
    """Counts operations of torch: those of the device, waits for it, and copies to it from pageable memory."""
    with _Calls(card), _Operations(card):
        yield


class _Calls(TorchFunctionMode):
    """Sees calls as they are written: which ask for a device, and which read values with no operation."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        given = [*args, *kwargs.values()]
        tensors = list(_tensors(given))
        asked = any(isinstance(value, torch.device) for value in given)
        if name in READS and not is_host(args[0]):
            self.card.waits.append(name)
        from_host = (name in FROM_HOST and not tensors) or (bool(tensors) and all(map(is_host, tensors)))
        if from_host and (asked or name == "cuda"):
            self.card.copies.append(name)
        self.card.making_on_host = not tensors and not asked  # torch.zeros(3): nobody said where
        result = function(*args, **kwargs)
        if isinstance(result, Tensor) and (self.card.making_on_host or (from_host and not asked)):
            host(result)
        self.card.making_on_host = False
        return result


class _Operations(TorchDispatchMode):
    """Sees operations, those inside a call too: which would run on the device, and which wait for it."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.__name__.split(".")[0], kwargs or {}
        tensors = list(_tensors([*args, *kwargs.values()]))
        on_host = all(map(is_host, tensors)) if tensors else self.card.making_on_host
        result = function(*args, **kwargs)
        if on_host:
            for tensor in _tensors([result]):
                host(tensor)
            return result
        if any(is_host(tensor) and tensor.dim() for tensor in tensors):
            self.card.copies.append(name)  # or an error, on a card
        if name in WAITS:
            self.card.waits.append(name)
        if not function.is_view and name not in ALLOCATIONS:
            self.card.operations.append(name)
        return result


@triton.jit
def next_to_nothing(x_ptr, n):
    """A kernel whose launch is Triton's own time, and hardly an argument's."""
    tl.store(x_ptr, n)


def trivial_call() -> Callable[[], object]:
    """The least that a launch takes, to measure others by."""
    x = torch.zeros(4)
    return lambda: next_to_nothing[(1,)](x, 5)


def small_call() -> Callable[[], object]:
    """Rows from maps as a small vision model has them: B = 8, H = 12, S = 197, L = 12."""
    maps = [torch.rand(8, 12, 197, 197) for _ in range(12)]
    return lambda: rollout.attention_rollout(maps, query=0, backend="triton", validate=False)


def small_qk_call() -> Callable[[], object]:
    """Rows from queries and keys: B = 8, H = 12, S = 197, D = 64, L = 4."""
    heads = [torch.rand(8, 12, 197, 64) for _ in range(8)]
    return lambda: rollout.attention_rollout_qk(heads[:4], heads[4:], query=0, backend="triton", validate=False)


def host_times(calls: Sequence[Callable[[], object]], runs: int = 20, times: int = 100) -> list[float]:
    """µs of this thread's processor that each call takes: the least of `runs` means over `times`, in turn."""
    least = [float("inf")] * len(calls)
    for _ in range(runs):
        for i, call in enumerate(calls):
            call()
            begun = time.thread_time()
            for _ in range(times):
                call()
            least[i] = min(least[i], 1e6 * (time.thread_time() - begun) / times)
    return least


def main() -> int:
    """Prints the host's time of a launch of next to nothing and of two calls, in µs."""
    torch.set_num_threads(1)
    with device("sm_90", compiles=True):
        found = host_times([trivial_call(), small_call(), small_qk_call()])
    for name, each in zip(("a launch", "rows from maps", "rows from Q and K"), found, strict=True):
        print(f"{name}: {each:.1f} µs on the host, {each / found[0]:.1f} launches")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
