"""What the value-aware methods cost beside plain rollout, rows from queries and keys, as ratios within one process.

    python -m bench.values [--lengths 64 128 256 512] [--seconds 5]

B = 16, H = 8, L = 4, E = 128, float32, the torch backend. Two samples are checked against float64 before any time is
taken.
"""

import argparse
from functools import partial

import torch
from torch import Tensor

import rollout
from rollout.bench.measure import Flush, alternate, relative_error

BATCH, HEADS, LAYERS, WIDTH = 16, 8, 4, 128
METHODS = ("rollout", "value_norm", "kobayashi")
BOUND = 3e-6  # max|err| / max|ref| from Q and K
CPU = torch.device("cpu")


def make_inputs(seq: int, batch: int = BATCH) -> dict[str, list[Tensor]]:
    """The arguments of a call, random, from one seed."""
    source, dim = torch.Generator().manual_seed(seq), WIDTH // HEADS
    shapes = dict.fromkeys(("queries", "keys", "values"), (batch, HEADS, seq, dim))
    shapes |= {"output_weights": (HEADS, dim, WIDTH), "inputs": (batch, seq, WIDTH)}
    return {name: [torch.randn(shape, generator=source) for _ in range(LAYERS)] for name, shape in shapes.items()}


def check(given: dict[str, list[Tensor]], method: str) -> None:
    """Raise RuntimeError unless the first two samples are right."""
    few = {name: [t if name == "output_weights" else t[:2] for t in tensors] for name, tensors in given.items()}
    result, exact = (
        rollout.attention_rollout_qk(query=0, method=method, backend=backend, **few)
        for backend in ("torch", "reference")
    )
    if not (error := relative_error(result, exact.double())) <= BOUND:
        raise RuntimeError(f"bench.values: {method} is {error:.1e} off float64, allowed {BOUND:.0e}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[64, 128, 256, 512], help="S of each row of the table"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="for each of them")
    options = parser.parse_args()
    print(f"| S | rollout, ms | {' | '.join(f'{name}, of rollout' for name in METHODS[1:])} |")
    print("|---|---|---|---|")
    for seq in options.lengths:
        given = make_inputs(seq)
        for method in METHODS:
            check(given, method)
        call = partial(rollout.attention_rollout_qk, query=0, backend="torch", validate=False, **given)
        times = alternate({name: partial(call, method=name) for name in METHODS}, options.seconds, CPU, Flush(CPU))
        ratios = " | ".join(f"{times[name] / times['rollout']:.2f}" for name in METHODS[1:])
        print(f"| {seq} | {1e3 * times['rollout']:.1f} | {ratios} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
