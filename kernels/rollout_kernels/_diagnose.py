"""Checks of a result: one pass over it; only when it fails is the input searched for the cause."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rollout_kernels._problem import MapsProblem, Problem, QKProblem
from rollout_kernels._torch.fuse import Scratch
from rollout_kernels._torch.qk import QKSource

LOGSUMEXP_TOLERANCE = 0.05


def check_result(problem: Problem, result: Tensor) -> None:
    """Refuse a result that is not finite, and one made with a log-sum-exp that is not that of the scores.

    Raises:
        ValueError: the message names the argument, layer and sample where the trouble starts.
    """
    # What is not finite makes the sum so; a sum that overflowed is no fault of the result.
    if not math.isfinite(float(result.sum())) and not bool(torch.isfinite(result).all()):
        raise ValueError(_cause(problem, result))
    if isinstance(problem, QKProblem) and problem.logsumexp is not None:
        _check_logsumexp(problem)


def _cause(problem: Problem, result: Tensor) -> str:
    for argument, layer, tensor in _inputs(problem):
        for b in range(problem.batch):
            n = problem.seq if problem.lengths is None else int(problem.lengths[b])
            block = _valid_block(argument, tensor[b], n)
            # −inf is how a bias masks a key, and the log-sum-exp of a row with no key allowed.
            bad = (block.isnan() | (block == torch.inf)) if argument in ("bias", "logsumexp") else ~block.isfinite()
            if bool(bad.any()):
                where = bad.nonzero()[0].tolist()
                value = float(block[tuple(where)])
                return (
                    f"{problem.name}: {argument}[{layer}] must be finite, got {value} in layer {layer}, sample {b}, "
                    f"at {where}; layers count from the input side"
                )
    for kept, vectors in enumerate(problem.values or ()):
        if not bool(vectors.output_weights.isfinite().all()):
            return f"{problem.name}: output_weights[{problem.first_layer + kept}] must be finite, got NaN or Inf"
    b = int((~torch.isfinite(result)).flatten(1).any(1).nonzero()[0])
    return (
        f"{problem.name}: the result for sample {b} is not finite although every input is: with renormalisation a row "
        f"of residual·I + attention·F sums to 0, otherwise the product overflows {result.dtype}"
    )


def _inputs(problem: Problem) -> Iterator[tuple[str, int, Tensor]]:
    if isinstance(problem, MapsProblem):
        groups = {"attentions": problem.maps, "gradients": problem.gradients}
    else:
        assert isinstance(problem, QKProblem)
        groups = {
            "queries": problem.queries,
            "keys": problem.keys,
            "bias": problem.bias,  # type: ignore[dict-item]
            "logsumexp": problem.logsumexp,
        }
    for field in ("values", "inputs") if problem.values else ():
        groups[field] = tuple(getattr(layer, field) for layer in problem.values or ())
    for argument, tensors in groups.items():
        for kept, tensor in enumerate(tensors or ()):
            if tensor is not None:
                yield argument, problem.first_layer + kept, tensor


def _valid_block(argument: str, sample: Tensor, n: int) -> Tensor:
    """The part of one sample's tensor that belongs to its first n positions."""
    if argument in ("attentions", "gradients", "bias"):
        return sample[:, :n, :n]
    if argument == "inputs":
        return sample[:n]
    return sample[:, :n]


def _check_logsumexp(problem: QKProblem) -> None:
    """The middle row of every sample, head and layer must sum to 1: 1/S of the work, whatever backend and method."""
    source = QKSource(problem, Scratch(problem.compute_dtype, problem.device))
    middle = torch.full((problem.batch,), problem.seq // 2, device=problem.device)
    if problem.lengths is not None:
        middle = problem.lengths // 2
    off = torch.zeros(problem.layers, problem.batch, device=problem.device)
    for layer in range(problem.layers):
        for samples in source.chunks(layer):
            sums = source.row_maps(layer, samples, middle[samples]).sum(-1)
            off[layer, samples] = (sums - 1).abs().amax((1, 2)).float()
    if bool((off > LOGSUMEXP_TOLERANCE).any()):
        layer, b = (off > LOGSUMEXP_TOLERANCE).nonzero()[0].tolist()
        raise ValueError(
            f"{problem.name}: logsumexp[{problem.first_layer + layer}] must be the natural log of "
            f"sum_j exp(scale·q·k_j + mask), with the mask of this call; with the one given, row {int(middle[b])} of "
            f"the softmax of sample {b} sums to 1 only within {float(off[layer, b]):.0%}"
        )
