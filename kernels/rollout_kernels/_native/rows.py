"""A problem as the compiled kernel takes it: addresses, strides and scratch memory."""

import ctypes

import torch
from torch import Tensor

from rollout_kernels._native import library
from rollout_kernels._native.library import Job, Layer
from rollout_kernels._problem import MapsProblem, shape_result

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FUSIONS = {"mean": 0, "max": 1, "min": 2, "weights": 3}
MOST_STARTS = 32
"""Start rows of a sample; of more, the torch backend's matrix products are faster."""

# As in `rows.c`, which adds up a sample's rows in so many chunks.
LANES, BLOCK, BLOCK_FLOATS, CHUNKS, SHORTEST_CHUNK = 16, 8, 4096, 8, 64

_ENTRIES_PER_WORKER = 1 << 15  # of maps: with less to do, waking a thread takes longer than it saves
_SAMPLES_PER_WORKER = 8  # from so many on, threads share samples; of fewer, the chunks of each layer


def refusals_maps(problem: MapsProblem) -> list[str]:
    """Why the kernel cannot serve a problem; empty when it can."""
    method, found = problem.method, []
    if reason := library.unusable():
        found.append(reason)
    if problem.device.type != "cpu":
        found.append(f"tensors are on {problem.device}, not on the CPU")
    if problem.form == "full":
        found.append("query=None asks for the full matrix, and it computes rows")
    elif problem.weights is not None and problem.weights.shape[1] > MOST_STARTS:
        found.append(f"{problem.weights.shape[1]} start rows a sample are more than {MOST_STARTS}")
    if problem.gradients is not None:
        found.append("the method is weighted by gradients")
    if method.normalize_attention:
        found.append("normalize_attention divides rows before the residual is added")
    if method.discard_ratio:
        found.append(f"discard_ratio={method.discard_ratio} needs whole maps")
    if callable(method.head_fusion):
        found.append("head_fusion is a function")
    return found + _refuse_tensors(problem.maps)


def _refuse_tensors(maps: tuple[Tensor, ...]) -> list[str]:
    found = set()
    for tensor in maps:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            found.add("maps are no plain dense tensors")
        elif tensor.dtype not in TYPES:
            found.add(f"maps are {tensor.dtype}, not float32, bfloat16 or float16")
        elif tensor.stride(3) != 1 and tensor.size(3) > 1:
            found.add("the columns of a map do not lie next to each other (stride(-1) must be 1)")
        elif tensor.is_neg():
            found.add("a map is a view of negated memory")
    return sorted(found)


def rows_from_maps(problem: MapsProblem) -> Tensor:
    """The rows [B, S] or [B, R, S], float32, 0 on padding."""
    batch, seq = problem.batch, problem.seq
    starts = 1 if problem.weights is None else problem.weights.shape[1]
    result = torch.empty(batch, starts, seq)
    if result.numel():
        _run(problem, starts, result)
    return shape_result(problem, result)


def _run(problem: MapsProblem, starts: int, result: Tensor) -> None:
    method, batch, seq = problem.method, problem.batch, problem.seq
    padded = -(-seq // LANES) * LANES
    chunks = min(CHUNKS, -(-seq // SHORTEST_CHUNK))
    entries = sum(tensor.shape[1] for tensor in problem.maps) * batch * seq * seq
    workers = max(1, min(torch.get_num_threads(), batch * chunks, entries // _ENTRIES_PER_WORKER))
    scratch_floats = max(padded, BLOCK_FLOATS) + BLOCK * starts
    scaled, sums = 2 * batch * starts * padded, 2 * batch * chunks * starts * padded
    memory = torch.empty(scaled + sums + workers * scratch_floats)
    first = memory.data_ptr()
    # Named, so that they live until the call returns.
    rows = problem.rows.contiguous() if isinstance(problem.rows, Tensor) else None
    weights = None if problem.weights is None else problem.weights.contiguous()
    lengths = None if problem.lengths is None else problem.lengths.contiguous()
    heads = None if problem.head_weights is None else [each.float() for each in problem.head_weights]
    job = Job(
        layers=_layers(problem, heads),
        lengths=_address(lengths), start=_address(weights), rows=_address(rows), result=_address(result),
        scaled=first, sums=first + 4 * scaled, scratch=first + 4 * (scaled + sums),
        row=problem.rows if isinstance(problem.rows, int) else 0, batch=batch, depth=problem.layers, seq=seq,
        padded=padded, starts=starts, chunks=chunks, scratch_floats=scratch_floats,
        fusion=FUSIONS["weights" if heads else str(method.head_fusion)], renormalize=method.renormalize,
        together=chunks == 1 or batch >= _SAMPLES_PER_WORKER * workers,
        residual=method.residual,
    )  # fmt: skip
    library.run(job, workers)


def _layers(problem: MapsProblem, heads: list[Tensor] | None) -> ctypes.Array[Layer]:
    table = (Layer * problem.layers)()
    mean = problem.method.head_fusion == "mean"
    for i, tensor in enumerate(problem.maps):
        storage = tensor.untyped_storage()
        batch, head, row, _ = tensor.stride()
        factor = 1.0 / tensor.shape[1] if mean else 1.0
        table[i] = Layer(
            data=tensor.data_ptr(), end=storage.data_ptr() + storage.nbytes(),
            weights=None if heads is None else heads[i].data_ptr(),
            stride_batch=batch, stride_head=head, stride_row=row, heads=tensor.shape[1], type=TYPES[tensor.dtype],
            attention=problem.method.attention_weight * factor,
        )  # fmt: skip
    return table


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
