"""The compiled library and torch's pool of threads, each loaded once, or why they cannot be."""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

_POOL = "torch_parallel_for"  # libtorch's stable C interface, since 2.10
_POOL_LIBRARIES = ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll")


class Layer(ctypes.Structure):
    """`layer_t` of `rows.c`."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("end", ctypes.c_void_p), ("weights", ctypes.c_void_p),
        ("stride_batch", ctypes.c_int64), ("stride_head", ctypes.c_int64), ("stride_row", ctypes.c_int64),
        ("heads", ctypes.c_int64), ("type", ctypes.c_int64), ("attention", ctypes.c_float),
    )  # fmt: skip


class Job(ctypes.Structure):
    """`job_t` of `rows.c`."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        *((name, ctypes.c_void_p) for name in ("lengths", "start", "rows", "result", "sums", "scaled", "scratch")),
        *((name, ctypes.c_int64) for name in ("row", "batch", "depth", "seq", "padded", "starts", "chunks")),
        *((name, ctypes.c_int64) for name in ("scratch_floats", "fusion", "renormalize", "together")),
        ("residual", ctypes.c_float),
    )


def unusable() -> str | None:
    """Why nothing can be computed with the library here; None when it can."""
    return _load()[1]


def run(job: Job, workers: int) -> None:
    """Do a job on so many threads of torch's pool.

    Raises:
        RuntimeError: the pool failed.
    """
    call = _load()[0]
    assert call is not None
    failed = call(ctypes.byref(job), workers)
    if failed:
        raise RuntimeError(f"attention_rollout: torch's pool of threads failed, {_POOL} gave {failed}")


@cache
def _load() -> tuple[Callable[..., int] | None, str | None]:
    """The call, or why there is none."""
    built = [path for suffix in EXTENSION_SUFFIXES if (path := Path(__file__).with_name(f"_rows{suffix}")).is_file()]
    if not built:
        return None, "it was not compiled when this package was installed"
    try:
        library = ctypes.CDLL(str(built[0]))
    except OSError as error:
        return None, f"its library cannot be loaded ({error})"
    layout = 1000 * ctypes.sizeof(Layer) + ctypes.sizeof(Job)
    library.rollout_rows_layout.restype = ctypes.c_int64
    if library.rollout_rows_layout() != layout:
        return None, "its library was compiled from another version of this package: install it again"
    pool = _find_pool()
    if pool is None:
        return None, f"torch {torch.__version__} exports no {_POOL}"
    library.rollout_rows.argtypes = (ctypes.POINTER(Job), ctypes.c_int64, ctypes.c_void_p)
    library.rollout_rows.restype = ctypes.c_int32
    return lambda job, workers: library.rollout_rows(job, workers, pool), None


def _find_pool() -> int | None:
    """The address of torch's parallel loop: with another one a second pool of threads would fight the first."""
    for name in _POOL_LIBRARIES:
        path = Path(torch.__file__).with_name("lib") / name
        try:
            return ctypes.cast(getattr(ctypes.CDLL(str(path)), _POOL), ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
