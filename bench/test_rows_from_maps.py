"""One row per sample from stored maps: ours, the naive chain, PyHealth's arithmetic, and one read of the maps."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from bench import providers
from rollout_kernels._torch_maps import CPU_TILE_BYTES

BATCH, HEADS, LAYERS = 32, 8, 4
SEQUENCES = (64, 128, 256, 512)
PROVIDERS = {
    "naive chain": providers.naive_chain,
    "ours": providers.ours,
    "PyHealth's arithmetic": providers.pyhealth_maths,
}


@cache
def maps(seq: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Softmax maps of L layers and the float64 row of position 0."""
    generator = torch.Generator().manual_seed(seq)
    values = [torch.randn(BATCH, HEADS, seq, seq, generator=generator).softmax(-1).to(dtype) for _ in range(LAYERS)]
    return values, providers.oracle(values)


def _bytes_read(seq: int, dtype: torch.dtype) -> int:
    """What a row chain must read: the maps of every layer but the top one, and one row per head of that."""
    return BATCH * HEADS * seq * ((LAYERS - 1) * seq + 1) * dtype.itemsize


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("seq", SEQUENCES)
def test_float32(seq: int, provider: str, measure: Callable[..., None], quick: bool) -> None:
    if quick and seq > 128:
        pytest.skip("left out of the quick run")
    values, reference = maps(seq, torch.float32)
    # PyHealth does not renormalise: on softmax maps that is the same row to rounding.
    measure(
        lambda: PROVIDERS[provider](values),
        reference=reference,
        tolerance=1e-6 if provider == "ours" else 1e-5,
        suite="rows from maps",
        provider=provider,
        shape={"B": BATCH, "H": HEADS, "S": seq, "L": LAYERS},
        dtype="float32",
        bytes=_bytes_read(seq, torch.float32),
    )


@pytest.mark.parametrize("seq", SEQUENCES)
def test_read_limit(seq: int, measure: Callable[..., None], quick: bool) -> None:
    if quick and seq > 128:
        pytest.skip("left out of the quick run")
    values, _ = maps(seq, torch.float32)
    measure(
        lambda: providers.read_limit(values),
        suite="rows from maps",
        provider="one read of the maps",
        shape={"B": BATCH, "H": HEADS, "S": seq, "L": LAYERS},
        dtype="float32",
        bytes=_bytes_read(seq, torch.float32),
    )


@pytest.mark.parametrize("provider", ["naive chain", "ours"])
@pytest.mark.parametrize("seq", [128, 256])
def test_bfloat16(seq: int, provider: str, measure: Callable[..., None], quick: bool) -> None:
    if quick and seq > 128:
        pytest.skip("left out of the quick run")
    values, reference = maps(seq, torch.bfloat16)
    measure(
        lambda: PROVIDERS[provider](values),
        reference=reference,
        tolerance=1e-6 if provider == "ours" else 5e-2,
        suite="rows from bf16 maps",
        provider=provider,
        shape={"B": BATCH, "H": HEADS, "S": seq, "L": LAYERS},
        dtype="bfloat16",
        bytes=_bytes_read(seq, torch.bfloat16),
    )


@pytest.mark.parametrize("layers", [2, 4, 8])
def test_memory_against_layers(layers: int, measure: Callable[..., None], quick: bool) -> None:
    """The extra memory of ours is the same however many layers there are."""
    seq = 128 if quick else 256
    values = maps(seq, torch.float32)[0]
    values = [values[i % LAYERS] for i in range(layers)]
    measure(
        lambda: providers.ours(values),
        reference=providers.oracle(values),
        tolerance=1e-6,
        suite="memory against layers",
        provider="ours",
        shape={"B": BATCH, "H": HEADS, "S": seq, "L": layers},
        dtype="float32",
    )


@pytest.mark.parametrize("provider", ["head by head", "sum(1)"])
@pytest.mark.parametrize("seq", SEQUENCES)
def test_head_sum(seq: int, provider: str, measure: Callable[..., None], quick: bool) -> None:
    """Why heads are added one by one: the first step of a tile alone, over a batch in tiles of the engine's size."""
    if quick and seq > 128:
        pytest.skip("left out of the quick run")
    values = maps(seq, torch.float32)[0][0]
    samples = max(1, CPU_TILE_BYTES // (4 * seq * seq))
    buffer = torch.empty(min(samples, BATCH), seq, seq)

    def run() -> Tensor:
        for chunk in values.split(samples):
            out = buffer[: len(chunk)]
            if provider == "sum(1)":
                torch.sum(chunk, 1, out=out)
                continue
            torch.add(chunk[:, 0], chunk[:, 1], out=out)
            for head in range(2, HEADS):
                out.add_(chunk[:, head])
        return out

    measure(
        run,
        reference=values.split(samples)[-1].double().sum(1),
        tolerance=1e-6,
        suite="head sum",
        provider=provider,
        shape={"B": BATCH, "H": HEADS, "S": seq},
        dtype="float32",
    )
