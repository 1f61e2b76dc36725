"""The first pass of a discard ratio: which entries of a fused map go needs the order of the whole map."""

from dataclasses import replace

import torch
from torch import Tensor

from rollout_kernels._problem import MapsProblem
from rollout_kernels._triton import inputs, launch
from rollout_kernels._triton.fuse_heads import fuse_heads

SORT_BYTES = 1 << 30  # what sorting a piece of the batch may take: values and int64 indices, in and out


def without_discard(problem: MapsProblem) -> MapsProblem:
    """The same problem with the discarded maps F_l as its maps, float32 [B, 1, S, S] a layer, 1/H of the maps given."""
    name = launch.target(problem.device).table
    bare = replace(
        problem, rows=None, weights=None,
        method=replace(problem.method, residual=0.0, attention=1.0, renormalize=False),
    )  # fmt: skip
    arguments = inputs.map_inputs(bare)
    fuse = inputs.launch_of(bare, arguments, name)
    maps = []
    for layer in range(problem.layers):
        fused = torch.empty(problem.batch, problem.seq, problem.seq, dtype=torch.float32, device=problem.device)
        if fused.numel():
            fuse_heads(arguments, fuse, layer, fused)
            discard_smallest_(fused, problem.method.discard_ratio, problem.lengths)
        maps.append(fused.unsqueeze(1))
    method = replace(problem.method, head_fusion="mean", gradients=None, discard_ratio=0.0)
    return replace(problem, maps=tuple(maps), gradients=None, head_weights=None, method=method)


def discard_smallest_(fused: Tensor, ratio: float, lengths: Tensor | None) -> None:
    """Sets the ⌊q·n²⌋ smallest entries of each sample's n×n block of `fused` [B, S, S] to 0, in place.

    Ties go by flat index; entry [0, 0] is spared. Nothing is read back from the device.
    """
    seq = fused.shape[-1]
    positions = torch.arange(seq, device=fused.device)
    step = max(1, SORT_BYTES // (24 * seq * seq))
    for first in range(0, len(fused), step):
        part = fused[first : first + step]
        ends = torch.full((len(part),), seq, device=fused.device) if lengths is None else lengths[first : first + step]
        inside = (positions < ends[:, None])[:, :, None] & (positions < ends[:, None])[:, None, :]
        # Past a sample's end nothing counts as small.
        order = part.masked_fill(~inside, torch.inf).flatten(1).sort(stable=True).indices
        count = (ratio * ends.double() * ends.double()).floor()
        goes = torch.zeros_like(order, dtype=torch.bool)
        goes.scatter_(1, order, torch.arange(seq * seq, device=fused.device) < count[:, None])
        goes[:, 0] = False
        part.masked_fill_(goes.view_as(part), 0.0)
