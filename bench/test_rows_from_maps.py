"""One row per sample from stored maps: ours, the naive chain, the published peers, and one read of the maps."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from bench.machine import host
from bench.providers import chains, oracle
from bench.providers.chains import MAPS, NAIVE, OURS, READ, Shape
from rollout_kernels._torch.maps import CPU_TILE_BYTES

BATCH, HEADS, LAYERS = 32, 8, 4
SEQUENCES = (64, 128, 256, 512)
WARM = (64, 128)  # below the size of most last-level caches
QUICK = 128


@cache
def maps(seq: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Softmax maps of L layers."""
    generator = torch.Generator().manual_seed(seq)
    values = [torch.randn(BATCH, HEADS, seq, seq, generator=generator).softmax(-1) for _ in range(LAYERS)]
    return [attention.to(host.DEVICE, dtype) for attention in values]


@cache
def reference(seq: int, method: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return oracle.from_maps(maps(seq, dtype), method)


def shape(seq: int, layers: int = LAYERS) -> Shape:
    return Shape(BATCH, HEADS, seq, layers)


def skip_in_quick(seq: int, quick: bool, largest: int = QUICK) -> None:
    if quick and seq > largest:
        pytest.skip("left out of the quick run")


def skip_without_compiler(provider: str, seq: int, quick: bool) -> None:
    """Compiling takes tens of seconds: one shape in the quick run. Where no compiler works, the reason is recorded."""
    if provider == chains.COMPILED:
        if quick and seq > 64:
            pytest.skip("left out of the quick run")
        if (problem := chains.compiler_problem()) is not None:
            pytest.skip(f"no compiler: {problem}")


def time_rows(measure: Callable[..., None], suite: str, seq: int, name: str, cold: bool) -> None:
    """One provider, or one read of the maps: next to the others, as memory bandwidth is not the same all day."""
    values, checked = maps(seq), {}
    if name == READ:
        run, (size, flop) = chains.read_limit, (shape(seq).row_bytes(), 0)
    else:
        run, (size, flop) = MAPS[name].run, MAPS[name].work(shape(seq))
        checked = {"reference": reference(seq, MAPS[name].method), "tolerance": MAPS[name].tolerance}
    measure(
        lambda: run(values),
        **checked,
        cold=cold,
        suite=suite,
        provider=name,
        shape={"B": BATCH, "H": HEADS, "S": seq, "L": LAYERS},
        dtype="float32",
        inputs=shape(seq).all_bytes(),
        bytes=size,
        flop=flop,
    )


@pytest.mark.parametrize("provider", [READ, *MAPS])
@pytest.mark.parametrize("seq", SEQUENCES)
def test_float32(seq: int, provider: str, measure: Callable[..., None], quick: bool) -> None:
    skip_in_quick(seq, quick)
    skip_without_compiler(provider, seq, quick)
    time_rows(measure, "rows from maps", seq, provider, cold=True)


@pytest.mark.parametrize("provider", [READ, OURS, NAIVE])
@pytest.mark.parametrize("seq", WARM)
def test_warm(seq: int, provider: str, measure: Callable[..., None], quick: bool) -> None:
    """The same where the maps were just written, as by the layer before: those that fit stay in the cache."""
    skip_in_quick(seq, quick, largest=0)
    time_rows(measure, "rows from maps, warm", seq, provider, cold=False)


@pytest.mark.parametrize("provider", [NAIVE, OURS])
@pytest.mark.parametrize("seq", [128, 256])
def test_bfloat16(seq: int, provider: str, measure: Callable[..., None], quick: bool) -> None:
    skip_in_quick(seq, quick)
    values = maps(seq, torch.bfloat16)
    measure(
        lambda: MAPS[provider].run(values),
        reference=reference(seq, "rollout", torch.bfloat16),
        tolerance=1e-6 if provider == OURS else 5e-2,
        suite="rows from bf16 maps",
        provider=provider,
        shape={"B": BATCH, "H": HEADS, "S": seq, "L": LAYERS},
        dtype="bfloat16",
        inputs=shape(seq).all_bytes(2),
        bytes=shape(seq).row_bytes(2),
    )


@pytest.mark.parametrize("layers", [2, 4, 8])
def test_memory_against_layers(layers: int, measure: Callable[..., None], quick: bool) -> None:
    """The extra memory of ours is the same however many layers there are."""
    seq = QUICK if quick else 256
    values = [maps(seq)[i % LAYERS] for i in range(layers)]
    measure(
        lambda: chains.ours(values),
        reference=oracle.from_maps(values),
        tolerance=1e-6,
        suite="memory against layers",
        provider=OURS,
        shape={"B": BATCH, "H": HEADS, "S": seq, "L": layers},
        dtype="float32",
        inputs=shape(seq, layers).all_bytes(),
        bytes=shape(seq, layers).row_bytes(),
    )


@pytest.mark.parametrize("provider", ["head by head", "sum(1)"])
@pytest.mark.parametrize("seq", SEQUENCES)
def test_head_sum(seq: int, provider: str, measure: Callable[..., None], quick: bool) -> None:
    """Why heads are added one by one: the first step of a tile alone, over a batch in tiles of the engine's size."""
    skip_in_quick(seq, quick)
    values = maps(seq)[0]
    samples = max(1, CPU_TILE_BYTES // (4 * seq * seq))
    buffer = torch.empty(min(samples, BATCH), seq, seq, device=host.DEVICE)

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
        bytes=values.nbytes,
    )
