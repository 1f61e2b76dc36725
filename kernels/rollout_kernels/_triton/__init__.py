"""The GPU kernels, behind four functions and the reasons why they cannot serve a call."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from rollout_kernels._problem import MapsProblem, Problem, QKProblem, shape_result
from rollout_kernels._triton import inputs, launch, qk_inputs
from rollout_kernels._triton.discard import without_discard
from rollout_kernels._triton.full_chain import full_chain
from rollout_kernels._triton.fuse_heads import fuse_heads
from rollout_kernels._triton.qk_columns import columns
from rollout_kernels._triton.qk_logsumexp import logsumexp
from rollout_kernels._triton.qk_matrix import qk_matrix
from rollout_kernels._triton.qk_row_sums import row_sums
from rollout_kernels._triton.rows_resident import rows_resident
from rollout_kernels._triton.rows_split import rows_split

__all__ = ["full_from_maps", "full_from_qk", "refusals_maps", "refusals_qk", "rows_from_maps", "rows_from_qk"]

NO_NORMALIZE = "normalize_attention divides rows before the residual is added"
HEAD_DIMENSIONS = (16, 32, 64, 128)
CANNOT = (CompilationError, OutOfResources, PTXASError, RuntimeError)  # what compiling for a device may raise
PASS_FAILED = "PassManager::run failed"  # as a compiler's pass does, in a RuntimeError; others are not ours to catch


def refusals_maps(problem: Problem) -> list[str]:
    """Why the kernels cannot compute this problem; empty when they can."""
    assert isinstance(problem, MapsProblem)
    reasons = launch.target(problem.device).refusals()
    for name, group in (("maps", problem.maps), ("gradients", problem.gradients or ())):
        reasons += _dtype_refusals(name, group)
    if problem.compute_dtype == torch.float64 and not any("float64" in reason for reason in reasons):
        reasons.append("the result is wanted in float64")
    if callable(problem.method.head_fusion):
        reasons.append("head_fusion is a Python function")
    if problem.method.normalize_attention:
        reasons.append(NO_NORMALIZE)
    if problem.values is not None:
        reasons.append("values are read beside queries and keys only")
    if problem.seq > launch.MAX_ROW:
        reasons.append(f"S = {problem.seq} is beyond the {launch.MAX_ROW} columns of a row held on chip")
    return reasons


def _dtype_refusals(name: str, tensors: Sequence[Tensor]) -> list[str]:
    found = {tensor.dtype for tensor in tensors}
    if len(found) <= 1 and found <= inputs.DTYPES.keys():
        return []
    dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in found)
    if len(dtypes) > 1:
        return [f"{name} have different dtypes ({', '.join(dtypes)})"]
    return [f"{name} are {dtypes[0]}, not float32, bfloat16 or float16"]


def refusals_qk(problem: QKProblem) -> list[str]:
    """Why the kernels cannot compute this problem; empty when they can."""
    reasons = launch.target(problem.device).refusals()
    given = {"queries": problem.queries, "keys": problem.keys}
    if problem.handed_on is not None:
        values, gradients = zip(*problem.handed_on, strict=True)
        given |= {"values": values, "output gradients": gradients}
    *names, last = given
    reasons += _dtype_refusals(f"{', '.join(names)} and {last}", [t for group in given.values() for t in group])
    for name, group in given.items():
        if len({t.shape for t in group}) > 1:
            reasons.append(f"layers differ in the shape of their {name}")
    wanted = ", ".join(map(str, HEAD_DIMENSIONS))
    for owner, name in (("head dimension", "queries"), ("head dimension of values", "values")):
        size = given[name][0].shape[-1] if name in given else HEAD_DIMENSIONS[0]
        if size not in HEAD_DIMENSIONS:
            reasons.append(f"{owner} {size} is not one of {wanted}")
    if any(t.stride(-1) != 1 for t in (*problem.queries, *problem.keys)):
        reasons.append("queries or keys are not contiguous along the head dimension")
    biases = sorted({str(bias.dtype).removeprefix("torch.") for bias in problem.bias or () if bias is not None})
    if len(biases) > 1:
        reasons.append(f"layers differ in the dtype of their bias ({', '.join(biases)})")
    elif biases == ["float64"]:
        reasons.append("bias is float64, not float32, bfloat16 or float16")
    if callable(problem.method.head_fusion):
        reasons.append("head_fusion is a Python function")
    if problem.method.values == "sum_then_norm":
        reasons.append("the norm of a sum over heads is not supported")
    if problem.method.discard_ratio > 0:
        reasons.append("discard_ratio needs the order of a whole map, and from Q and K no map is held")
    return reasons


def rows_from_maps(problem: Problem, split: bool | None = None) -> Tensor:
    """Start rows times R from maps, [B, S] or [B, R, S] float32: every layer in one launch, after a
    first pass over the maps when entries are to be discarded.

    Args:
        problem: one that `refusals_maps` has nothing against, in row form.
        split: whether to split samples over programs; None leaves it to `launch.splits`. The bits are the same.
    """
    assert isinstance(problem, MapsProblem)
    if problem.method.discard_ratio > 0:
        problem = without_discard(problem)
    arguments = inputs.map_inputs(problem)
    if arguments.out.numel() == 0:
        return shape_result(problem, arguments.out)
    target = launch.target(problem.device)
    config = inputs.launch_of(problem, arguments, target.table)
    if split is None:
        chains = problem.batch * arguments.out.shape[1]
        split = launch.splits(chains, problem.seq, target.table, target.processors)
    with _on(problem.device):
        if split:
            _with_fallback(rows_split, rows_resident, arguments, config)
        else:
            rows_resident(arguments, config)
    return shape_result(problem, arguments.out)


def full_from_maps(problem: Problem) -> Tensor:
    """The whole matrix R of every sample from maps, [B, S, S] float32: R ← M_l·R from the bottom layer up.

    Three matrices [B, S, S] are held beside the result. Products are float32-accurate.
    """
    assert isinstance(problem, MapsProblem)
    if problem.method.discard_ratio > 0:
        problem = without_discard(problem)
    batch, seq, device = problem.batch, problem.seq, problem.device
    out = torch.empty(batch, seq, seq, dtype=torch.float32, device=device)
    if out.numel() == 0:
        return out
    arguments = inputs.map_inputs(problem)
    name = launch.target(device).table
    write = partial(fuse_heads, arguments, inputs.launch_of(problem, arguments, name))
    precision = "ieee" if launch.interpreting() else "bf16x6"
    with _on(device):
        full_chain(write, problem.layers, problem.lengths, out, launch.product_launch(name), precision)
    return out


def rows_from_qk(problem: QKProblem) -> Tensor:
    """Start rows times R from queries and keys, [B, S] or [B, R, S] float32: one launch for the log-sum-exp unless it
    was given, one for the row sums where a fusion other than a mean, or any with sinks or gradients, is normalised or
    renormalised, one for every layer of the chain.

    Args:
        problem: one that `refusals_qk` has nothing against.
    """
    arguments = qk_inputs.qk_inputs(problem, launch.interpreting())
    problem = arguments.problem
    if arguments.out.numel() == 0:
        return shape_result(problem, arguments.out)
    with _on(problem.device):
        sums = _row_statistics(problem, arguments)
        added = "columns" if problem.handed_on is None else "gradients"
        columns(arguments, _scores_launch("fused" if qk_inputs.fuses_first(problem) else added, problem), sums)
    return shape_result(problem, arguments.out)


def full_from_qk(problem: QKProblem) -> Tensor:
    """The whole matrix R of every sample from queries and keys, [B, S, S] float32: the heads of a layer are fused
    inside the tile, so that M_l is the one matrix written for it.

    Beside the result at most three matrices [B, S, S] are held, and float32 [L, B, H, S] for the log-sum-exp (twice
    with a bias). Products are float32-accurate.

    Args:
        problem: one that `refusals_qk` has nothing against, in the form of the full matrix.
    """
    arguments = qk_inputs.qk_inputs(problem, launch.interpreting())
    problem = arguments.problem
    if arguments.out.numel() == 0:
        return arguments.out
    precision = "ieee" if launch.interpreting() else "bf16x6"
    product = launch.product_launch(launch.target(problem.device).table)
    with _on(problem.device):
        sums = _row_statistics(problem, arguments)
        write = partial(qk_matrix, arguments, sums, _scores_launch("fused", problem))
        full_chain(write, problem.layers, problem.lengths, arguments.out, product, precision)
    return arguments.out


def _row_statistics(problem: QKProblem, arguments: qk_inputs.QKInputs) -> Tensor | None:
    """Fills the log-sum-exp of every layer's rows unless it was given, and what divides rows of M_l."""
    if arguments.lse is not None:
        logsumexp(arguments, _scores_launch("logsumexp", problem))
    if qk_inputs.needs_row_sums(problem):
        return row_sums(arguments, _scores_launch("fused", problem))
    return None


def _scores_launch(kernel: str, problem: QKProblem) -> launch.ScoresLaunch:
    queries = problem.queries[0]
    size = queries.shape[-1] if kernel == "logsumexp" else qk_inputs.widest_head(problem)
    name = launch.target(problem.device).table
    capped = problem.softcap is not None or problem.sinks is not None
    return launch.scores_launch(kernel, queries.dtype, size, name, problem.has_bias, capped)


def cannot_compile(error: Exception) -> bool:
    """Whether an error that is one of `CANNOT` says that a kernel cannot be compiled for a device, or held by it."""
    return type(error) is not RuntimeError or PASS_FAILED in str(error)


def _with_fallback(first: Callable[..., None], then: Callable[..., None], *arguments: object) -> None:
    """Runs `first`; when this device cannot compile or hold it, says so and runs `then`."""
    try:
        first(*arguments)
    except CANNOT as error:
        if not cannot_compile(error):
            raise
        warnings.warn(
            f"rollout_kernels: {first.__name__} cannot run on this device "
            f"({type(error).__name__}: {error}); {then.__name__} takes its place",
            RuntimeWarning,
            stacklevel=3,
        )
        then(*arguments)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
