"""`rollout doctor`: what this machine has, which backend serves which call and why, and a check against the oracle."""

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile

import torch
from torch import Tensor

from rollout.method import METHODS
from rollout_kernels import Method, _native, ops, reference
from rollout_kernels._dispatch import choose, refusals, run
from rollout_kernels._problem import Problem

PACKAGES = ("attention-rollout", "torch", "triton", "numpy", "pyhealth", "transformers")
MAPS_BOUND, QK_BOUND = 1e-6, 3e-6  # max|err| / max|ref| against float64, for inputs as they are rounded


@dataclass(frozen=True)
class Case:
    """One call to check: what it is, and the problem it makes."""

    name: str
    problem: Problem
    bound: float


def cases(device: torch.device) -> Iterator[Case]:
    """Calls of every kind, small enough to check in seconds: maps and Q,K, rows and full, ragged and not."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([197, 64, 1, 130], device=device)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        maps = [random(4, 4, 197, 197).softmax(-1).to(dtype) for _ in range(3)]
        for label, query, valid, method in (
            ("row", 0, None, Method()),
            ("row, ragged, max fusion", -1, lengths, Method(head_fusion="max")),
            ("row, ragged, discard", 0, lengths, Method(head_fusion="max", discard_ratio=0.5)),
            ("full, ragged", None, lengths, Method()),
        ):
            problem: Problem = ops.maps_problem(maps, query=query, lengths=valid, method=method)
            yield Case(f"maps {kind} S=197: {label}", problem, MAPS_BOUND)
        queries, keys = ([random(4, h, 256, 64, dtype=dtype) for _ in range(3)] for h in (4, 2))
        for label, causal, query in (("row", False, 0), ("row, causal", True, -1), ("full", False, None)):
            problem = ops.qk_problem(queries, keys, query=query, causal=causal)
            yield Case(f"Q,K {kind} S=256 D=64, 2 heads a key head: {label}", problem, QK_BOUND)
        values, gradients = ([random(4, h, 256, 64, dtype=dtype) for _ in range(3)] for h in (2, 4))
        problem = ops.qk_problem(
            queries, keys, query=0, values=values, output_gradients=gradients, method=METHODS["chefer"]
        )
        yield Case(f"Q,K,V {kind} S=256 D=64 and gradients at the output: row, chefer", problem, QK_BOUND)


def lines(device: str | None = None) -> Iterator[tuple[str, bool]]:
    """The report line by line, each with whether it is good.

    Raises:
        ValueError: the device cannot be used here; the message says why.
    """
    chosen = _device(device)
    yield f"{_device_name(chosen)}, {torch.get_num_threads()} CPU threads, Python {platform.python_version()}", True
    yield ", ".join(f"{name} {_version(name)}" for name in PACKAGES), True
    yield f"compiled rows from stored maps, on a CPU: {_native.unusable() or 'built, and they can be called'}", True
    for case in cases(chosen):
        backend = choose(case.problem, "auto").name
        with torch.no_grad():
            result, truth = run(case.problem, backend).double(), reference.rollout(case.problem)
        error = float((result - truth).abs().max() / truth.abs().max())
        good = error <= _bound(case, backend)
        yield (
            f"{'ok ' if good else 'BAD'} {error:.0e}  {case.name}: {backend}{_passed_over(case.problem, backend)}",
            good,
        )


def _passed_over(problem: Problem, backend: str) -> str:
    """The faster backends that do not serve a problem, and why."""
    faster = takewhile(lambda name: name != backend, ("triton", "native"))
    reasons = [f"not {name}: {'; '.join(refusals(problem, name))}" for name in faster]
    return f"   ({' | '.join(reasons)})" if reasons else ""


def _bound(case: Case, backend: str) -> float:
    """Half-precision Q,K on tensor cores round w·p as well as what they were given."""
    dtypes = {tensor.dtype for tensor in getattr(case.problem, "queries", ())}
    return 1e-2 if backend == "triton" and torch.bfloat16 in dtypes else case.bound


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"doctor: device must be one that torch can use here, got {name!r}: {error}") from None
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
