"""What is known of single releases of Triton: the registers that each gives the launches that matter most on sm_90.

No promise: another release may give other numbers, and a kernel may be rewritten. A number that goes up on a release
known here says that a change of ours cost registers. What must hold on any release stands in test_triton_compile.py.
"""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton

from rollout_kernels._triton import launch
from rollout_kernels._triton.matrix_product import matrix_product_kernel
from tests.support.triton_aot import Compiled, compile_kernel, tool
from tests.support.triton_launches import (
    MAP_KERNELS,
    SCORE_KERNELS,
    map_constants,
    product_constants,
    score_constants,
)

pytestmark = pytest.mark.skipif(tool("cuobjdump") is None, reason="cuobjdump is not at hand")


def of_maps(kernel: str) -> Callable[[], Compiled]:
    """S = 512, float32, in the heaviest form."""
    config = launch.rows_launch(512, torch.float32, name="sm_90")
    constants = map_constants("max", torch.float32, config)
    return lambda: compile_kernel(MAP_KERNELS[kernel], constants, 90, config.options)


def of_scores(kernel: str, dtype: torch.dtype, head_dimension: int) -> Callable[[], Compiled]:
    """In the lightest form."""
    config = launch.scores_launch(kernel, dtype, head_dimension, "sm_90")
    constants = score_constants(kernel, "plain", dtype, head_dimension, config)
    return lambda: compile_kernel(SCORE_KERNELS[kernel], constants, 90, config.options)


def of_product() -> Compiled:
    config = launch.product_launch("sm_90")
    return compile_kernel(matrix_product_kernel, product_constants(config), 90, config.options)


KERNELS = {
    "rows_resident": of_maps("resident"),
    "rows_split": of_maps("split"),
    "logsumexp bf16 D64": of_scores("logsumexp", torch.bfloat16, 64),
    "columns bf16 D64": of_scores("columns", torch.bfloat16, 64),
    "columns fp32 D64": of_scores("columns", torch.float32, 64),
    "columns fp32 D128": of_scores("columns", torch.float32, 128),
    "product": of_product,
}
REGISTERS = {  # of KERNELS, in their order
    "3.6.0": (128, 128, 98, 160, 214, 174, 231),
    "3.7.1": (128, 128, 101, 162, 213, 179, 231),
    "3.8.0": (122, 120, 105, 156, 214, 180, 226),
    "3.9.0": (120, 124, 105, 158, 215, 177, 231),
}


@pytest.mark.parametrize(("place", "kernel"), list(enumerate(KERNELS)), ids=list(KERNELS))
def test_registers_are_no_more_than_this_release_gave(place: int, kernel: str) -> None:
    found = KERNELS[kernel]().registers
    if triton.__version__ not in REGISTERS:
        pytest.skip(f"nothing is known of Triton {triton.__version__} yet: it gives {kernel} {found} registers")
    assert found <= REGISTERS[triton.__version__][place]
