"""The rounding of tensor cores: the helper that imitates it, and what it says of the full matrix."""

import pytest
import torch

from tests.support.cases import generator
from tests.support.tensor_cores import DEPTH, multiply_add, product_bf16x6, thirds

BOUND = 1e-6  # max|err| / max|ref| of the full matrix from maps on a card, as in test_triton_gpu.py
ULP = 2.0**-23  # of 1


def add_to_one(*terms: float, sign: float = 1.0) -> float:
    row = torch.zeros(1, DEPTH)
    row[0, : len(terms)] = sign * torch.tensor(terms)
    return sign * float(multiply_add(row, torch.ones(DEPTH, 1), torch.full((1, 1), sign)))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("terms", "wanted"),
    [
        ([0.75 * ULP], 1.0),  # to nearest it would be 1 + ULP
        ([ULP / 4] * 8, 1.0 + 2 * ULP),  # two bits below the last are kept until all is added
        ([ULP / 8] * 8, 1.0),  # a third is not: each term is cut before
        ([-0.75 * ULP], 1.0 - ULP),
        ([-ULP / 8], 1.0),
    ],
)
def test_terms_and_sums_are_cut_towards_zero(terms: list[float], wanted: float, sign: float) -> None:
    assert add_to_one(*terms, sign=sign) == wanted


def test_small_integers_are_multiplied_exactly() -> None:
    left = torch.randint(-8, 8, (5, 48), generator=generator(0)).float()
    right = torch.randint(-8, 8, (48, 7), generator=generator(1)).float()
    assert torch.equal(product_bf16x6(left, right, 32), left @ right)


def test_three_thirds_make_a_float32() -> None:
    values = torch.randn(1000, generator=generator(2))
    parts = thirds(values)
    assert all(torch.equal(part, part.bfloat16().float()) for part in parts)
    assert torch.equal(parts[0].double() + parts[1].double() + parts[2].double(), values.double())


def chain_error(identity: str, products: int, seq: int = 256, columns: int = 4) -> float:
    """max|err| / max|ref| of M·…·M, M = ½I + ½F of mean heads, by rounded products: of some columns, for each is made
    of the same column before."""
    source = generator(3)
    maps = [torch.randn(8, seq, seq, generator=source).mul(2).softmax(-1).mean(0) for _ in range(products + 1)]
    eye = torch.eye(seq)
    got = ((eye + maps[0]) / 2)[:, :columns]
    wanted = got.double()
    for fused in maps[1:]:
        wanted = ((eye + fused.double()) / 2) @ wanted
        got = (
            product_bf16x6((eye + fused) / 2, got, 32)
            if identity == "inside"
            else product_bf16x6(fused / 2, got, 32) + got / 2
        )
    return float((got.double() - wanted).abs().max() / wanted.abs().max())


def test_the_identity_belongs_outside_the_product() -> None:
    """Three products at S = 256: inside, every step of every sum cuts the residual's share."""
    outside, inside = chain_error("outside", 3), chain_error("inside", 3)
    print(f"\nmax|err| / max|ref|, identity outside {outside:.2g}, inside {inside:.2g}")
    assert outside < BOUND / 4
    assert inside > BOUND
