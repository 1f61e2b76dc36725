"""The full matrix R ← M_l·R, layer after layer, whatever the layers' matrices are made of."""

from collections.abc import Callable

import torch
from torch import Tensor

from rollout_kernels._triton.launch import ProductLaunch
from rollout_kernels._triton.matrix_product import matrix_product

WriteLayer = Callable[[int, Tensor, Tensor | None], None]
"""(layer, out [B, S, S], residual [B, S] or None): fills `out` with M_l, or with M_l less diag(residual)."""


def full_chain(
    write_layer: WriteLayer, layers: int, lengths: Tensor | None, out: Tensor, launch: ProductLaunch, precision: str
) -> None:
    """Fills `out` [B, S, S] float32 with M_L · … · M_1.

    At most three matrices [B, S, S] are held beside it. Products are float32-accurate.
    """
    batch, seq, _ = out.shape
    if layers == 1:
        write_layer(0, out, None)
        return
    padded = -(-seq // 4) * 4  # rows that start on 16 bytes
    fused, result, *more = (
        torch.empty(batch, seq, padded, dtype=torch.float32, device=out.device)[..., :seq]
        for _ in range(min(layers, 3))
    )
    spare = more[0] if more else out
    residual = torch.empty(batch, seq, dtype=torch.float32, device=out.device)
    write_layer(0, result, None)
    for layer in range(1, layers):
        write_layer(layer, fused, residual)
        target = out if layer == layers - 1 else spare
        matrix_product(fused, residual, result, lengths, target, launch, precision)
        result, spare = target, result
