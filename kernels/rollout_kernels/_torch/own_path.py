"""The share that a row keeps for its own position by the one path that never attends, taken out of a result.

Π_l r_l/d_l at the position, r the residual's weight there and d the row sum that divides it: of the whole product it is
known exactly, whoever computed that. A one-hot start needs one row a layer; all rows need their sums.
"""

import torch
from torch import Tensor

from rollout_kernels._problem import Problem
from rollout_kernels._torch.chain import Source, residuals, row_sums, source_of, start_row


def leave_out(problem: Problem, result: Tensor) -> Tensor:
    """`result` [B, S], [B, R, S] or [B, S, S] without the own path, over its sums; a row of nothing else is 0.

    What is left at the position is 0 when rounding alone may have made it.
    """
    shares = _shares(problem)
    if problem.form == "full":
        own = torch.diag_embed(shares)
    elif problem.form == "row":
        own = torch.zeros_like(result).view(problem.batch, 1, problem.seq)
        own.scatter_(2, problem.start_rows.view(-1, 1, 1), shares.view(-1, 1, 1))
    else:
        assert problem.weights is not None
        own = problem.weights * shares.unsqueeze(1)
    own = own.view_as(result)
    left = result - own
    rounding = 8 * problem.layers * torch.finfo(result.dtype).eps
    left = torch.where(left.abs() <= rounding * own.abs(), 0.0, left)
    sums = left.sum(-1, keepdim=True)
    return left / torch.where(sums == 0, 1.0, sums)


def _shares(problem: Problem) -> Tensor:
    """Π_l r_l/d_l at the start rows, [B], or at every row, [B, S], 0 on padding."""
    source = source_of(problem)
    one_row = problem.form == "row" and not problem.method.needs_whole_map
    shape = (problem.batch,) if one_row else (problem.batch, problem.seq)
    shares = torch.ones(shape, dtype=problem.compute_dtype, device=problem.device)
    for layer in range(problem.layers):
        shares *= _row_shares(problem, source, layer) if one_row else _all_shares(problem, source, layer)
    if one_row:
        return shares
    if problem.lengths is not None:
        shares.masked_fill_(torch.arange(problem.seq, device=problem.device) >= problem.lengths[:, None], 0.0)
    return shares.gather(1, problem.start_rows.view(-1, 1))[:, 0] if problem.form == "row" else shares


def _row_shares(problem: Problem, source: Source, layer: int) -> Tensor:
    row, residual = start_row(problem, source, layer)
    sums = row.sum((1, 2)) + residual[:, 0, 0] if problem.method.renormalize else 1.0
    return residual[:, 0, 0] / sums


def _all_shares(problem: Problem, source: Source, layer: int) -> Tensor:
    method = problem.method
    sums = torch.ones(problem.batch, problem.seq, dtype=problem.compute_dtype, device=problem.device)
    if method.renormalize and source.rows_sum_to_one and not method.discard_ratio:
        sums *= method.residual + method.attention_weight
    elif method.renormalize:
        for tile in source.plan():
            sums[tile.samples, tile.rows] = row_sums(problem, source, layer, tile)[2]
    return residuals(problem, layer) / sums
