"""`rollout bench`: how fast attention rollout is on this machine, against the chain as most public code writes it."""

from rollout.bench.chains import naive_chain, naive_chain_qk, naive_full, softmax_maps
from rollout.bench.comparison import rows_from_maps, rows_from_qk, run
from rollout.bench.settings import Settings

__all__ = [
    "Settings", "naive_chain", "naive_chain_qk", "naive_full", "rows_from_maps", "rows_from_qk", "run", "softmax_maps",
]  # fmt: skip
