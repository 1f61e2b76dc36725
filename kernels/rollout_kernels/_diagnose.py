"""Checks of a result: one pass over it; only when it fails is the input searched for the cause."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rollout_kernels._problem import MapsProblem, Problem, QKProblem, start_weights

LOGSUMEXP_TOLERANCE = 0.05


def check_result(problem: Problem, result: Tensor) -> None:
    """Refuse a result that is not finite, and one that shows the log-sum-exp given was not that of the scores.

    Raises:
        ValueError: the message names the argument, layer and sample where the trouble starts.
    """
    if not bool(torch.isfinite(result).all()):
        raise ValueError(_cause(problem, result))
    if isinstance(problem, QKProblem) and problem.logsumexp is not None:
        _check_logsumexp(problem, result)


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
    for argument, tensors in groups.items():
        for kept, tensor in enumerate(tensors or ()):
            if tensor is not None:
                yield argument, problem.first_layer + kept, tensor


def _valid_block(argument: str, sample: Tensor, n: int) -> Tensor:
    """The part of one sample's tensor that belongs to its first n positions."""
    if argument in ("attentions", "gradients", "bias"):
        return sample[:, :n, :n]
    return sample[:, :n]


def _check_logsumexp(problem: QKProblem, result: Tensor) -> None:
    """With head fusions that keep row sums, what comes out must sum to what the start rows put in."""
    method = problem.method
    if isinstance(method.head_fusion, str) and method.head_fusion != "mean":
        return
    if callable(method.head_fusion) or method.discard_ratio or not method.renormalize:
        return
    if problem.form == "full" or not problem.batch:
        return
    weights = start_weights(problem)
    given = weights.abs().sum(-1).clamp(min=1e-30)
    off = ((result.view(weights.shape).sum(-1) - weights.sum(-1)).abs() / given).amax(-1)
    if bool((off > LOGSUMEXP_TOLERANCE).any()):
        b = int(off.argmax())
        raise ValueError(
            f"{problem.name}: logsumexp must be the natural log of sum_j exp(scale·q·k_j + mask); with the one given "
            f"the relevance of sample {b} is off by {float(off[b]):.0%} of what it must sum to"
        )
