"""The published algorithms as their papers state them: one sample at a time, the full product, every layer's map kept.

Written for this bench from the papers' formulas. Each takes L maps [B, H, S, S], input side first, and gives the full
product of every sample, [B, S, S]; the row a user wants is taken from that afterwards.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def abnar_zuidema(maps: Sequence[Tensor]) -> Tensor:
    """Joint attention in NumPy: from every layer to the input, all of them kept.

    Abnar & Zuidema 2020, arXiv:2005.00928, section 3 and equation 1: Ã(l) = A(l)·Ã(l−1), A(l) = ½W + ½I, heads averaged
    and rows renormalised. NumPy's identity is float64, and the sum with it too.
    """
    stacked = [attention.cpu().numpy() for attention in maps]
    rows = []
    for b in range(len(maps[0])):
        raw = np.stack([attention[b].mean(axis=0) for attention in stacked])
        mixed = 0.5 * raw + 0.5 * np.eye(raw.shape[-1])
        mixed /= mixed.sum(axis=-1, keepdims=True)
        joint = np.zeros_like(mixed)
        joint[0] = mixed[0]
        for layer in range(1, len(mixed)):
            joint[layer] = mixed[layer] @ joint[layer - 1]
        rows.append(joint[-1])
    return torch.from_numpy(np.stack(rows)).to(maps[0].device)


def chefer_rollout(maps: Sequence[Tensor]) -> Tensor:
    """The rollout baseline of Chefer, Gur & Wolf 2021 (CVPR), arXiv:2012.09838: rownorm(I + mean_h A)."""
    products = []
    for b in range(len(maps[0])):
        matrices = [
            attention[b].mean(0) + torch.eye(attention.shape[-1], device=attention.device) for attention in maps
        ]
        first, *others = (matrix / matrix.sum(-1, keepdim=True) for matrix in matrices)
        for matrix in others:
            first = matrix @ first
        products.append(first)
    return torch.stack(products)


def gildenblat_discard(maps: Sequence[Tensor], ratio: float = 0.9) -> Tensor:
    """Discard rollout of Gildenblat 2020 (Exploring Explainability for Vision Transformers), max fusion.

    The lowest 90 % of a layer's fused map become 0, entry [0, 0] spared, then ½(A + I) with rows renormalised. The
    article divides by the row sums; its published code lacks a `keepdim` there, which this does not repeat.
    """
    products = []
    for b in range(len(maps[0])):
        eye = torch.eye(maps[0].shape[-1], device=maps[0].device)
        product = eye
        for attention in maps:
            fused = attention[b].amax(0)
            flat = fused.view(-1)
            lowest = flat.topk(int(flat.numel() * ratio), largest=False).indices
            flat[lowest[lowest != 0]] = 0.0
            matrix = (fused + eye) / 2
            product = (matrix / matrix.sum(-1, keepdim=True)) @ product
        products.append(product)
    return torch.stack(products)


def chefer_gradients(maps: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Self-attention relevance of Chefer, Gur & Wolf 2021 (ICCV), arXiv:2103.15679, equations 5 and 6.

    R ← R + mean_h max(A∘∇A, 0)·R from the input up; the gradients of the maps are given.
    """
    products = []
    for b in range(len(maps[0])):
        relevance = torch.eye(maps[0].shape[-1], device=maps[0].device)
        for attention, gradient in zip(maps, gradients, strict=True):
            relevance = relevance + (gradient[b] * attention[b]).clamp(min=0).mean(0) @ relevance
        products.append(relevance)
    return torch.stack(products)


def pyhealth_maths(maps: Sequence[Tensor]) -> Tensor:
    """PyHealth 2.1's arithmetic, the whole batch at once: ½(mean_h A + I), not renormalised, from the identity up."""
    eye = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device)
    product = eye.expand(len(maps[0]), -1, -1)
    for attention in maps:
        product = torch.bmm(0.5 * (attention.mean(1) + eye), product)
    return product
