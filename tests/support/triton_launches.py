"""The compile-time arguments of every kernel under a launch of the tables, in the forms the compile lane looks at."""

from typing import Any

import torch

from rollout_kernels._triton import inputs, launch
from rollout_kernels._triton.qk_columns import columns_kernel
from rollout_kernels._triton.qk_logsumexp import logsumexp_kernel
from rollout_kernels._triton.qk_matrix import qk_matrix_kernel
from rollout_kernels._triton.qk_row_sums import row_sums_kernel
from rollout_kernels._triton.rows_resident import rows_resident_kernel
from rollout_kernels._triton.rows_split import rows_split_kernel

TABLES = {80: "sm_80", 89: "default", 90: "sm_90", 100: "sm_100", 120: "default"}  # compute capability -> its table
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAP_KERNELS = {"resident": rows_resident_kernel, "split": rows_split_kernel}
SCORE_KERNELS = {"logsumexp": logsumexp_kernel, "columns": columns_kernel, "gradients": columns_kernel}
GRADIENTS = {"FUSION": 1, "GRADIENTS": 2, "NORMALIZE": True, "HAS_DEAD": True}
FUSED_KERNELS: dict[str, tuple[Any, dict[str, object]]] = {  # those of the launch "fused", with flags of their own
    "logsumexp": (logsumexp_kernel, {}),
    "weighted columns": (columns_kernel, {"FUSION": 3, "HAS_DEAD": True, "HAS_SUMS": False}),
    "columns": (columns_kernel, {"FUSION": 1, "HAS_DEAD": True, "HAS_SUMS": True}),
    "row sums": (row_sums_kernel, {"FUSION": 1, "HAS_DEAD": True}),
    "matrix": (
        qk_matrix_kernel, {"FUSION": 1, "HAS_DEAD": True, "HAS_SUMS": True, "IDENTITY": False, "OUT_VEC": 4},
    ),
    "columns by norms": (columns_kernel, {"FUSION": 4, "HAS_DEAD": True, "HAS_SUMS": True}),
    "row sums by norms": (row_sums_kernel, {"FUSION": 4, "HAS_DEAD": True}),
    "matrix by norms": (
        qk_matrix_kernel, {"FUSION": 4, "HAS_DEAD": True, "HAS_SUMS": True, "IDENTITY": False, "OUT_VEC": 4},
    ),
    "columns by gradients": (columns_kernel, {**GRADIENTS, "HAS_SUMS": True}),
    "row sums by gradients": (row_sums_kernel, {**GRADIENTS, "RENORMALIZE": True}),
    "matrix by gradients": (qk_matrix_kernel, {**GRADIENTS, "HAS_SUMS": True, "IDENTITY": False, "OUT_VEC": 4}),
}  # fmt: skip
MAP_FORMS = {  # the heaviest: max fusion, renormalised, ragged, a free top layer; then gradients, then the lightest
    "max": {"ONE_HOT": True, "HAS_LENGTHS": True, "RENORMALIZE": True, "FUSION": 1, "GRADIENTS": 0},
    "gradients": {"ONE_HOT": False, "HAS_LENGTHS": True, "RENORMALIZE": False, "FUSION": 0, "GRADIENTS": 1},
    "weights": {"ONE_HOT": False, "HAS_LENGTHS": True, "RENORMALIZE": True, "FUSION": 3, "GRADIENTS": 0},
    "plain": {"ONE_HOT": True, "HAS_LENGTHS": False, "RENORMALIZE": False, "FUSION": 0, "GRADIENTS": 0},
}
QK_FORMS = {
    "plain": {"HAS_LENGTHS": False, "HAS_KEY_MASK": False, "HAS_LEFT": False, "HAS_RIGHT": False},
    "causal": {"HAS_LENGTHS": True, "HAS_KEY_MASK": False, "HAS_LEFT": False, "HAS_RIGHT": True},
    "all masks": {"HAS_LENGTHS": True, "HAS_KEY_MASK": True, "HAS_LEFT": True, "HAS_RIGHT": True},
}


NO_BIAS = {
    "HAS_BIAS": False, "BIAS_DTYPE": inputs.DTYPES[torch.float32], "BIAS_UNIT": True, "HAS_SLOPES": False,
    "SOFTCAP": 0.0, "HAS_SINKS": False, "GRADIENTS": 0, "NORMALIZE": False, "RENORMALIZE": True,
}  # fmt: skip


def map_constants(
    form: str, dtype: torch.dtype, config: launch.RowsLaunch, vector: int = 0, pairs: bool = False
) -> dict[str, object]:
    """Of `MAP_KERNELS`, for maps read `vector` elements at a time; 0: 16 bytes."""
    triton_type = inputs.DTYPES[dtype]
    layout = {"DTYPE": triton_type, "GRAD_DTYPE": triton_type, "UNIT_COLUMN": True}
    return {**MAP_FORMS[form], **layout, **config.blocks, "VEC": vector or 16 // dtype.itemsize, "PAIRS": pairs}


def score_constants(
    kernel: str, form: str, dtype: torch.dtype, head_dimension: int, config: launch.ScoresLaunch
) -> dict[str, object]:
    """Of `SCORE_KERNELS` without a bias; head weights and rows that attend to no key come with "all masks"."""
    chosen: dict[str, object] = {"ONE_HOT": True}
    if kernel != "logsumexp":
        all_masks = form == "all masks"
        chosen = {"FUSION": 3 if all_masks else 0, "HAS_DEAD": all_masks, "HAS_SUMS": False}
    if kernel == "gradients":
        chosen |= {"GRADIENTS": 1, "HAS_SUMS": True, "NORMALIZE": True}
    return {
        **QK_FORMS[form], **NO_BIAS, **chosen, **config.blocks,
        "DTYPE": inputs.DTYPES[dtype], "VEC": 16 // dtype.itemsize, "ALIGNED": True, "UPCAST": False,
        "PRECISION": config.precision if dtype == torch.float32 else "ieee", "D": head_dimension,
        "D_V": head_dimension,
    }  # fmt: skip


def fused_constants(
    kernel: str, dtype: torch.dtype, head_dimension: int, config: launch.ScoresLaunch
) -> dict[str, object]:
    """Of `FUSED_KERNELS` in the heaviest form: every mask, a bias, slopes, a soft cap, sinks, rows that attend to no
    key, and the maximum over heads unless the kernel adds heads up."""
    constants = score_constants("logsumexp", "all masks", dtype, head_dimension, config)
    heaviest = {"HAS_BIAS": True, "HAS_SLOPES": True, "SOFTCAP": 50.0, "HAS_SINKS": True}
    return {**constants, **heaviest, **FUSED_KERNELS[kernel][1]}


def product_constants(config: launch.ProductLaunch) -> dict[str, object]:
    """Of the product of the full chain, ragged."""
    return {"HAS_LENGTHS": True, "PRECISION": "bf16x6", "OUT_VEC": 4, **config.blocks}
