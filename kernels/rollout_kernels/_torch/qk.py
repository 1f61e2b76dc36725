"""The fused maps F_l recomputed from queries and keys, in pure torch: tiles of the softmax, never a whole map stored.

Rows of the softmax are independent of each other, so a tile of rows is scored, normalised, weighted and dropped; the
tile stays in cache between the steps. The formula is that of `attention_rollout_qk`.
"""

import math

import torch
from torch import Tensor

from rollout_kernels._problem import QKProblem
from rollout_kernels._torch.fuse import Scratch, fuse_by_function, fuse_heads
from rollout_kernels._torch.tiles import Tile, tiles
from rollout_kernels._torch.values import ValueTerms

CPU_TILE_BYTES = 4 << 20
GPU_TILE_BYTES = 1 << 30


class QKSource:
    """F_l from queries and keys."""

    def __init__(self, problem: QKProblem, scratch: Scratch) -> None:
        self._problem, self._scratch = problem, scratch
        self._values = ValueTerms(problem, scratch)
        fusion = problem.method.head_fusion
        plain = problem.values is None and problem.handed_on is None
        averaged = plain and (isinstance(fusion, Tensor) or fusion == "mean")
        self.rows_sum_to_one = problem.sinks is None and averaged

    def plan(self) -> list[Tile]:
        problem = self._problem
        return tiles(
            problem.batch,
            problem.seq,
            problem.lengths,
            self._budget() // max(q.shape[1] for q in problem.queries),
            whole=problem.method.needs_whole_map or problem.form == "full",
            single=callable(problem.method.head_fusion),
            skippable=problem.device.type == "cpu" and (problem.causal or problem.weights is not None),
        )

    def fused(self, layer: int, tile: Tile) -> tuple[Tensor, float]:
        problem, n = self._problem, tile.width
        rows = tile.rows.stop - tile.rows.start
        per_row = (tile.samples.stop - tile.samples.start) * problem.queries[layer].shape[1] * n
        block = rows if callable(problem.method.head_fusion) else max(1, self._budget() // per_row)
        if block >= rows:
            return self._fuse(layer, tile, self._maps(layer, tile, tile.rows), tile.rows)
        whole = self._scratch.take("whole", tile.samples.stop - tile.samples.start, rows, n)
        factor = 1.0
        for first in range(tile.rows.start, tile.rows.stop, block):
            part = slice(first, min(first + block, tile.rows.stop))
            values, factor = self._fuse(layer, tile, self._maps(layer, tile, part), part)
            whole[:, part.start - tile.rows.start : part.stop - tile.rows.start] = values
        return whole, factor

    def weighted(self, layer: int, tile: Tile, weights: Tensor) -> Tensor:
        problem = self._problem
        method = problem.method
        weighted = method.values is not None or method.gradients is not None
        if method.head_fusion != "mean" or method.discard_ratio or weighted or weights.shape[1] > 1:
            values, factor = self.fused(layer, tile)
            return torch.bmm(weights, values).mul_(factor)
        # One start row: weighting each head's tile reads it once; fusing the heads first would read and write it.
        maps = self._maps(layer, tile, tile.rows)
        samples, heads, rows, n = maps.shape
        per_head = weights.expand(samples, heads, rows).reshape(samples * heads, 1, rows)
        return torch.bmm(per_head, maps.view(samples * heads, rows, n)).view(samples, heads, n).mean(1, keepdim=True)

    def start_rows(self, layer: int) -> tuple[Tensor, float]:
        problem, factor = self._problem, 1.0
        top = torch.empty(problem.batch, 1, problem.seq, dtype=problem.compute_dtype, device=problem.device)
        for samples in self.chunks(layer):
            rows = problem.start_rows[samples]
            maps = self.row_maps(layer, samples, rows)
            if problem.values is not None:
                top[samples] = self._values.fuse(layer, samples, maps, rows)
                continue
            slopes = self._slopes(layer, samples, rows, slice(0, problem.seq))
            top[samples], factor = self._fuse_heads(layer, maps, slopes)
        return top, factor

    def chunks(self, layer: int) -> list[slice]:
        """The batch in pieces whose keys, which may have to be copied, fit in a tile."""
        problem, (_, groups, seq, dim) = self._problem, self._problem.keys[layer].shape
        step = max(1, self._budget() // (seq * max(groups * dim, problem.queries[layer].shape[1])))
        return [slice(first, min(first + step, problem.batch)) for first in range(0, problem.batch, step)]

    def row_maps(self, layer: int, samples: slice, rows: Tensor) -> Tensor:
        """Row `rows[b]` of every head of A_l, [b, H, 1, S], of the samples in the slice; rows long [b]."""
        problem, bias = self._problem, self._bias(layer)
        at = torch.arange(samples.start, samples.stop, device=problem.device), slice(None), rows
        return self._softmax(
            layer,
            samples,
            problem.queries[layer][at].unsqueeze(2),
            rows[:, None],
            slice(0, problem.seq),
            None if problem.logsumexp is None else problem.logsumexp[layer][at].unsqueeze(2),
            None if bias is None else bias[at].unsqueeze(2),
            ragged=True,
        )

    def _budget(self) -> int:
        budget = CPU_TILE_BYTES if self._problem.device.type == "cpu" else GPU_TILE_BYTES
        shared = 1 if self._problem.handed_on is None else 2  # between a tile of maps and one of gradients
        return budget // (shared * self._problem.compute_dtype.itemsize)

    def _bias(self, layer: int) -> Tensor | None:
        return None if self._problem.bias is None else self._problem.bias[layer]

    def _fuse(self, layer: int, tile: Tile, maps: Tensor, rows: slice) -> tuple[Tensor, float]:
        if self._problem.values is not None:
            return self._values.fuse(layer, tile.samples, maps, rows), 1.0
        return self._fuse_heads(layer, maps, self._slopes(layer, tile.samples, rows, slice(0, tile.width)))

    def _fuse_heads(self, layer: int, maps: Tensor, slopes: Tensor | None) -> tuple[Tensor, float]:
        problem = self._problem
        if callable(problem.method.head_fusion):
            return fuse_by_function(maps, slopes, problem.method, problem.compute_dtype), 1.0
        weights = None if problem.head_weights is None else problem.head_weights[layer]
        return fuse_heads(maps, slopes, problem.method, weights, self._scratch)

    def _slopes(self, layer: int, samples: slice, rows: slice | Tensor, columns: slice) -> Tensor | None:
        """The gradient of the maps, dO·Vᵀ [b, H, r, n], of some rows, one slice or one row long [b] of each sample."""
        if self._problem.handed_on is None:
            return None
        values, slopes = self._problem.handed_on[layer]
        dtype, keys = self._problem.compute_dtype, values[samples, :, columns]
        if isinstance(rows, slice):
            taken = slopes[samples, :, rows]
        else:
            at = torch.arange(samples.start, samples.stop, device=rows.device), slice(None), rows
            taken = slopes[at].unsqueeze(2)
        b, heads, count, dim = taken.shape
        groups, n = keys.shape[1], keys.shape[2]
        out = self._scratch.take("slopes", b * groups, heads // groups * count, n)
        left = taken.to(dtype).reshape(b * groups, heads // groups * count, dim)
        torch.bmm(left, keys.to(dtype).reshape(b * groups, n, dim).transpose(1, 2), out=out)
        return out.view(b, heads, count, n)

    def _maps(self, layer: int, tile: Tile, rows: slice) -> Tensor:
        """A_l [b, H, r, n] of the tile's samples and the given rows."""
        problem, bias = self._problem, self._bias(layer)
        samples, columns = tile.samples, slice(0, tile.width)
        return self._softmax(
            layer,
            samples,
            problem.queries[layer][samples, :, rows],
            torch.arange(rows.start, rows.stop, device=problem.device)[None],
            columns,
            None if problem.logsumexp is None else problem.logsumexp[layer][samples, :, rows],
            None if bias is None else bias[samples, :, rows, columns],
            ragged=tile.beyond is not None,
        )

    def _softmax(
        self,
        layer: int,
        samples: slice,
        queries: Tensor,
        positions: Tensor,
        columns: slice,
        logsumexp: Tensor | None,
        bias: Tensor | None,
        *,
        ragged: bool,
    ) -> Tensor:
        """softmax(scale·QKᵀ + mask) [b, H, r, n] of queries [b, H, r, D] at positions [b or 1, r].

        `ragged` says that a row or column may lie past its sample's end.
        """
        scores = self._scores(layer, samples, queries, columns)
        if bias is not None:
            scores.add_(bias)
        slopes = None if self._problem.alibi_slopes is None else self._problem.alibi_slopes[layer]
        if slopes is not None:
            distance = positions.unsqueeze(-1) - torch.arange(columns.start, columns.stop, device=scores.device)
            scores.addcmul_(
                slopes.to(scores.dtype)[:, None, None], distance.abs().unsqueeze(1).to(scores.dtype), value=-1
            )
        allowed = self._allowed(samples, positions, columns, ragged)
        if allowed is not None:
            scores.masked_fill_(~allowed.unsqueeze(1), -math.inf)
        dead = None
        if bias is not None:
            dead = (scores == -math.inf).all(-1, keepdim=True)
        elif allowed is not None:
            dead = ~allowed.any(-1, keepdim=True).unsqueeze(1)
        if logsumexp is None and self._problem.sinks is not None:
            sinks = self._problem.sinks[layer].to(scores.dtype)[:, None]
            logsumexp = torch.logaddexp(scores.logsumexp(-1), sinks)
            logsumexp.masked_fill_(logsumexp == -math.inf, 0.0)  # no key and no sink: the row is 0, not NaN
        if logsumexp is None:
            torch.softmax(scores, -1, out=scores)
        else:
            scores.sub_(logsumexp.unsqueeze(-1)).exp_()
        if self._problem.sinks is not None:  # a row with no key allowed gives all to the sink
            return scores
        # On a GPU asking whether any row is dead would wait for it.
        if dead is not None and (dead.device.type != "cpu" or bool(dead.any())):
            torch.where(dead, self._uniform(samples, columns), scores, out=scores)
        return scores

    def _scores(self, layer: int, samples: slice, queries: Tensor, columns: slice) -> Tensor:
        """scale·QKᵀ [b, H, r, n]; the query heads of a group share one product with their key head."""
        keys, dtype = self._problem.keys[layer][samples, :, columns].to(self._problem.compute_dtype), queries.dtype
        b, heads, rows, dim = queries.shape
        groups, n = keys.shape[1], keys.shape[2]
        scores = self._scratch.take("scores", b * groups, heads // groups * rows, n)
        if dtype != self._problem.compute_dtype:
            queries = queries.to(self._problem.compute_dtype)
        torch.baddbmm(
            scores,
            queries.reshape(b * groups, heads // groups * rows, dim),
            keys.reshape(b * groups, n, dim).transpose(1, 2),
            beta=0,
            alpha=self._problem.scale,
            out=scores,
        )
        if self._problem.softcap is not None:
            scores.div_(self._problem.softcap).tanh_().mul_(self._problem.softcap)
        return scores.view(b, heads, rows, n)

    def _allowed(self, samples: slice, positions: Tensor, columns: slice, ragged: bool) -> Tensor | None:
        """Which key each row may attend, bool [b or 1, r, n]; None when all. Rows past a sample's end attend none."""
        problem = self._problem
        i, j = positions.unsqueeze(-1), torch.arange(columns.start, columns.stop, device=problem.device)
        left, right = problem.window
        conditions = []
        if ragged and problem.lengths is not None:
            ends = problem.lengths[samples, None, None]
            conditions += [j < ends, i < ends]
        if problem.key_mask is not None:
            conditions.append(problem.key_mask[samples, None, columns])
        if problem.query_mask is not None:
            queried = problem.query_mask[samples]
            conditions.append(queried.gather(1, positions.expand(len(queried), -1)).unsqueeze(-1))
        if problem.causal:
            conditions.append(j <= i)
        if left is not None:
            conditions.append(j >= i - left)
        if right is not None:
            conditions.append(j <= i + right)
        allowed = None
        for condition in conditions:
            allowed = condition if allowed is None else allowed & condition
        return allowed

    def _uniform(self, samples: slice, columns: slice) -> Tensor:
        """1/lengths[b] on each sample's keys, 0 beyond, [b or 1, 1, 1, n]: the row of a query with no key allowed."""
        problem = self._problem
        j = torch.arange(columns.start, columns.stop, device=problem.device)
        if problem.lengths is None:
            return torch.full((1, 1, 1, len(j)), 1.0 / problem.seq, dtype=problem.compute_dtype, device=problem.device)
        ends = problem.lengths[samples, None, None, None]
        return torch.where(j < ends, 1.0 / ends.to(problem.compute_dtype), 0.0)
