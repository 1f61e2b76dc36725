"""F_l of the value-aware methods, in pure torch: norms from small triangles, never a vector for every pair.

‖Σ_h a_h f_h‖ of vectors f_h with f = Rᵀ·Q, Q of orthonormal rows, is ‖aᵀ·Rᵀ‖: an S×S×E tensor of mixed vectors is not
needed, only R, [D, D] a head for the norm of one head's v·W_O^h, [H, H] a key for the norm of a sum over heads. Their
Gram matrices RᵀR would give the same with half the digits.
"""

import torch
from torch import Tensor

from rollout_kernels._problem import Problem
from rollout_kernels._torch.fuse import Scratch

EVERY = slice(None)
KEYS = 64  # transformed in one go: H·E numbers a key and sample, beside what a tile takes


def input_norms(problem: Problem, layer: int, samples: slice = EVERY, rows: slice = EVERY) -> Tensor:
    """The residual's weight at some rows, [b, r], 0 on padding: residual·‖x_i‖, or 0 where F_l has it already."""
    assert problem.values is not None
    inputs = problem.values[layer].inputs[samples, rows].to(problem.compute_dtype)
    if problem.method.values == "sum_then_norm":
        return inputs.new_zeros(inputs.shape[:2])
    return _valid(problem, samples, inputs.norm(dim=-1).mul_(problem.method.residual), rows)


def _valid(problem: Problem, samples: slice, per_position: Tensor, rows: slice = EVERY) -> Tensor:
    """`per_position` […, b, r], in place 0 beyond each sample's end."""
    if problem.lengths is None:
        return per_position
    positions = torch.arange(problem.seq, device=problem.device)[rows]
    return per_position.masked_fill_(positions >= problem.lengths[samples, None], 0.0)


def _repeated(values: Tensor, heads: int) -> Tensor:
    """Values by heads that read them, [b, H, S, D_v]."""
    return values if values.shape[1] == heads else values.repeat_interleave(heads // values.shape[1], 1)


class ValueTerms:
    """What the maps of a layer are weighted by; that of the last samples is kept, which tiles of rows share."""

    def __init__(self, problem: Problem, scratch: Scratch) -> None:
        self._problem, self._scratch = problem, scratch
        self._key: tuple[int, int, int] | None = None
        self._kept = torch.empty(0)
        self._triangles: dict[int, Tensor] = {}

    def fuse(self, layer: int, samples: slice, maps: Tensor, rows: slice | Tensor) -> Tensor:
        """F_l [b, r, n] of the samples, in scratch memory, from maps [b, H, r, n] of a slice of rows, or of row
        `rows[b]` of each sample, long [b]."""
        shape = (maps.shape[0], *maps.shape[2:])
        fused = self._scratch.take("fused", *shape)
        terms = self._terms(layer, samples)[..., : maps.shape[-1]]
        if self._problem.method.values == "norm_then_sum":
            self._mix(maps, terms, 0, fused)
            return fused
        mixed = self._scratch.take("mixed", *shape)
        fused.zero_()
        for c in range(len(terms)):
            self._mix(maps, terms[c], c, mixed)
            fused.addcmul_(mixed, mixed)
        fused.sqrt_()
        self._add_inputs(layer, samples, maps, rows, fused)
        return fused

    def _mix(self, maps: Tensor, weights: Tensor, first: int, out: Tensor) -> None:
        """out[b, i, j] = Σ_{h ≥ first} maps[b, h, i, j]·weights[h, b, j]."""
        for h in range(first, maps.shape[1]):
            head, weight = maps[:, h], weights[h].unsqueeze(1)
            if head.dtype != out.dtype:
                head = self._scratch.take("head", *head.shape).copy_(head)
            torch.mul(head, weight, out=out) if h == first else out.addcmul_(head, weight)

    def _terms(self, layer: int, samples: slice) -> Tensor:
        """Norms [H, b, S], or triangles [min(H, E), H, b, S]; 0 on padding."""
        key = (layer, samples.start, samples.stop)
        if key != self._key:
            self._kept, self._key = self._make_terms(layer, samples), key
        return self._kept

    def _make_terms(self, layer: int, samples: slice) -> Tensor:
        problem = self._problem
        if problem.method.values == "norm_then_sum":
            return self.head_norms(layer, samples).transpose(0, 1)
        assert problem.values is not None
        given = problem.values[layer]
        values, weights = (t.to(problem.compute_dtype) for t in (given.values[samples], given.output_weights))
        parts = [
            torch.linalg.qr((_repeated(part, len(weights)) @ weights).permute(0, 2, 3, 1), mode="r").R
            for part in values.split(KEYS, dim=2)
        ]
        return _valid(problem, samples, torch.cat(parts, 1).permute(2, 3, 0, 1).contiguous())

    def head_norms(self, layer: int, samples: slice) -> Tensor:
        """‖v_hj·W_O^h‖ [b, H, S], 0 on padding."""
        problem = self._problem
        assert problem.values is not None
        values, weights = problem.values[layer].values[samples], problem.values[layer].output_weights
        if layer not in self._triangles:  # [H, min(D_v, E), D_v]: norms that W_O gives, it gives
            self._triangles[layer] = torch.linalg.qr(weights.to(problem.compute_dtype).mT, mode="r").R
        transformed = _repeated(values.to(problem.compute_dtype), len(weights)) @ self._triangles[layer].mT
        norms = transformed.norm(dim=-1)
        return _valid(problem, samples, norms.transpose(0, 1)).transpose(0, 1)

    def _add_inputs(self, layer: int, samples: slice, maps: Tensor, rows: slice | Tensor, fused: Tensor) -> None:
        """Where j = i, the norm with the residual: ‖Σ_h A_hii f_hi + (residual / attention)·x_i‖."""
        problem = self._problem
        assert problem.values is not None
        given, dtype = problem.values[layer], problem.compute_dtype
        if isinstance(rows, Tensor):
            at = torch.arange(len(rows), device=rows.device), slice(None), rows
            values, inputs = given.values[samples][at].unsqueeze(2), given.inputs[samples][at[0], rows].unsqueeze(1)
            index = rows.view(-1, 1, 1)
        else:
            values, inputs = given.values[samples, :, rows], given.inputs[samples, rows]
            index = torch.arange(rows.start, rows.stop, device=maps.device).view(1, -1, 1).expand(len(maps), -1, 1)
        weights = given.output_weights.to(dtype)
        own = maps.gather(3, index.unsqueeze(1).expand(-1, maps.shape[1], -1, -1)).to(dtype)  # [b, H, r, 1]
        mixed = (_repeated(values.to(dtype), len(weights)) * own).transpose(1, 2).flatten(2) @ weights.flatten(0, 1)
        mixed.add_(inputs.to(dtype), alpha=problem.method.residual / problem.method.attention_weight)
        norms = mixed.norm(dim=-1, keepdim=True)
        if problem.lengths is not None:
            norms.masked_fill_(index >= problem.lengths[samples].view(-1, 1, 1), 0.0)
        fused.scatter_(2, index, norms)
