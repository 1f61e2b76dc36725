"""How tensor cores round, on a CPU: what Triton's interpreter, whose products are float32, cannot show.

A tensor core adds sixteen products and the accumulator at once: every term is cut, towards zero, to a few bits below
the largest exponent among them, and so is the sum. Cutting loses mass where rounding to nearest would not, so an
accumulator that holds a large number loses a little of it in every step.

Source of the model: Fasi, Higham, Mikaitis & Pranesh 2021, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer
Science 7:e330. Products of float32 are formed as Triton forms them under `input_precision="bf16x6"`.
"""

import torch
from torch import Tensor

DEPTH = 16  # products that are added at once
BITS = 24  # of a float32's significand
EXTRA_BITS = 2  # below it, kept while terms are aligned


def multiply_add(left: Tensor, right: Tensor, accumulator: Tensor) -> Tensor:
    """accumulator + left·right of bfloat16 values held as float32, [m, k]·[k, n], k a multiple of `DEPTH`."""
    for first in range(0, left.shape[1], DEPTH):
        part = slice(first, first + DEPTH)
        terms = torch.cat([left[:, None, part] * right[part].T, accumulator[..., None]], 2)  # exact: 8 bits by 8
        exponent = torch.frexp(terms.abs().amax(2)).exponent.clamp(min=-100)
        unit = torch.exp2((exponent - (BITS + EXTRA_BITS)).float())
        # Integers of 26 bits, made towards zero; the sum of seventeen fits in 32.
        total = terms.div_(unit[..., None]).to(torch.int32).sum(2, dtype=torch.int32)
        accumulator = cut(total.double(), BITS).mul_(unit).float()
    return accumulator


def cut(values: Tensor, bits: int) -> Tensor:
    """float64 values with all but the first `bits` bits of each significand dropped."""
    unit = torch.exp2((torch.frexp(values).exponent - bits).double())
    return torch.trunc(values / unit) * unit


def thirds(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 as the sum of three bfloat16, largest first, held as float32."""
    big = values.bfloat16().float()
    middle = (values - big).bfloat16().float()
    return big, middle, (values - big - middle).bfloat16().float()


def dot_bf16x6(left: Tensor, right: Tensor, accumulator: Tensor) -> Tensor:
    """accumulator + left·right of float32 [m, k]·[k, n]: six products of thirds, from the smallest up, then one
    addition that rounds to nearest."""
    (a, b, c), (x, y, z) = thirds(left), thirds(right)
    total = torch.zeros_like(accumulator)
    for one, other in ((b, y), (c, x), (a, z), (b, x), (a, y), (a, x)):
        total = multiply_add(one, other, total)
    return accumulator + total


def product_bf16x6(left: Tensor, right: Tensor, block_k: int) -> Tensor:
    """left·right of float32 matrices, `block_k` of the inner size at a time, as a kernel's loop takes them."""
    accumulator = torch.zeros(left.shape[0], right.shape[1])
    for first in range(0, left.shape[1], block_k):
        part = slice(first, first + block_k)
        accumulator = dot_bf16x6(left[:, part], right[part], accumulator)
    return accumulator
