"""Backends, and why one cannot serve a call."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rollout_kernels import _native, reference
from rollout_kernels._problem import MapsProblem, Problem, QKProblem
from rollout_kernels._torch import chain
from rollout_kernels._torch.own_path import leave_out

BACKENDS = ("auto", "triton", "native", "torch", "reference")
READ_VALUES = ("triton", "torch", "reference")


class BackendError(ValueError):
    """No backend, or not the one asked for, can serve the call; the message lists every reason."""


@dataclass(frozen=True)
class Backend:
    """One way to compute. `refusals` gives the reasons why it cannot serve a problem; none means it can."""

    name: str
    refusals: Callable[[Problem], list[str]]
    run: Callable[[Problem], Tensor]


def _never_refuses(problem: Problem) -> list[str]:
    return []


def _run_reference(problem: Problem) -> Tensor:
    return reference.rollout(problem).to(problem.compute_dtype)


def _triton_refusals(problem: Problem) -> list[str]:
    try:
        from rollout_kernels import _triton
    except ImportError as error:
        return [f"Triton cannot be imported ({error})"]
    if isinstance(problem, QKProblem):
        return _triton.refusals_qk(problem)
    assert isinstance(problem, MapsProblem)
    return _triton.refusals_maps(problem)


def _run_triton(problem: Problem) -> Tensor:
    from rollout_kernels import _triton

    if isinstance(problem, QKProblem):
        return _triton.full_from_qk(problem) if problem.form == "full" else _triton.rows_from_qk(problem)
    assert isinstance(problem, MapsProblem)
    return _triton.full_from_maps(problem) if problem.form == "full" else _triton.rows_from_maps(problem)


def _native_refusals(problem: Problem) -> list[str]:
    if isinstance(problem, MapsProblem):
        return _native.refusals_maps(problem)
    return ["it computes from stored maps only"]


def _run_native(problem: Problem) -> Tensor:
    assert isinstance(problem, MapsProblem)
    return _native.rows_from_maps(problem)


def _value_refusals(problem: Problem, backend: str) -> list[str]:
    if problem.values is None or backend in READ_VALUES:
        return []
    return ["it reads no values"]


_TABLE = {
    "triton": Backend("triton", _triton_refusals, _run_triton),
    "native": Backend("native", _native_refusals, _run_native),
    "torch": Backend("torch", _never_refuses, chain.rollout),
    "reference": Backend("reference", _never_refuses, _run_reference),
}


def refusals(problem: Problem, backend: str) -> list[str]:
    """Why a backend cannot serve `problem`; empty when it can."""
    return _TABLE[backend].refusals(problem) + _value_refusals(problem, backend)


def choose(problem: Problem, backend: str) -> Backend:
    """The backend that will serve `problem`: the one named, or for `"auto"` the first that can: of triton and
    torch on a GPU, of native and torch on a CPU.

    Raises:
        ValueError: no backend has that name.
        BackendError: it cannot serve the call; the message gives every reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{problem.name}: backend must be one of {BACKENDS}, got {backend!r}")
    reasons = []
    candidates: tuple[str, ...] = (backend,)
    if backend == "auto":
        # On the CPU only Triton's interpreter could serve, and asking it would import Triton.
        compiled = problem.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"
        candidates = ("native" if compiled else "triton", "torch")
    for name in candidates:
        against = refusals(problem, name)
        if not against:
            return _TABLE[name]
        reasons.append(f"{name}: " + "; ".join(against))
    raise BackendError(f"{problem.name}: backend={backend!r} cannot serve this call: " + " | ".join(reasons))


def run(problem: Problem, backend: str) -> Tensor:
    """The result of `problem` by the backend chosen for it; the oracle leaves the own path out itself."""
    chosen = choose(problem, backend)
    result = chosen.run(problem)
    return result if problem.method.own_path or chosen.name == "reference" else leave_out(problem, result)
