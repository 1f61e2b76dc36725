"""Batched attention rollout: explain a transformer over a whole cohort.

>>> import torch, rollout
>>> maps = [torch.rand(2, 4, 8, 8).softmax(-1) for _ in range(3)]
>>> rollout.attention_rollout(maps, query=0).shape
torch.Size([2, 8])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rollout._capture import capture, register_capture
from rollout.api import attention_rollout, attention_rollout_qk
from rollout.errors import CaptureError, require
from rollout.frozen import frozen_gradient
from rollout.method import METHODS
from rollout.tape import Record
from rollout_kernels.method import Method

if TYPE_CHECKING:
    from rollout.cohort import attribute_cohort
    from rollout.cohort.evaluation import evaluate_cohort
    from rollout.results.attributions import CohortAttributions
    from rollout.results.comparison import compare_cohorts
    from rollout.results.faithfulness import CohortFaithfulness, open_faithfulness
    from rollout.results.notebook import show_record
    from rollout.results.plot_faithfulness import plot_faithfulness
    from rollout.results.plots import plot_positions, plot_record, plot_top_codes

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "CaptureError",
    "CohortAttributions",
    "CohortFaithfulness",
    "Method",
    "Record",
    "attention_rollout",
    "attention_rollout_qk",
    "attribute_cohort",
    "capture",
    "compare_cohorts",
    "evaluate_cohort",
    "frozen_gradient",
    "open_faithfulness",
    "plot_faithfulness",
    "plot_positions",
    "plot_record",
    "plot_top_codes",
    "register_capture",
    "show_record",
]

_FROM_EXTRAS = {
    "CohortAttributions": ("rollout.results.attributions", "polars"),
    "CohortFaithfulness": ("rollout.results.faithfulness", "polars"),
    "attribute_cohort": ("rollout.cohort", "pyarrow"),
    "compare_cohorts": ("rollout.results.comparison", "polars"),
    "evaluate_cohort": ("rollout.cohort.evaluation", "pyarrow"),
    "open_faithfulness": ("rollout.results.faithfulness", "polars"),
    "plot_faithfulness": ("rollout.results.plot_faithfulness", "polars"),
    "plot_positions": ("rollout.results.plots", "polars"),
    "plot_record": ("rollout.results.plots", "polars"),
    "plot_top_codes": ("rollout.results.plots", "polars"),
    "show_record": ("rollout.results.notebook", "polars"),
}
"""Name → its module, imported when first asked for, and what that needs of the extra `cohort`."""


def __getattr__(name: str) -> Any:
    if name not in _FROM_EXTRAS:
        raise AttributeError(f"module 'rollout' has no attribute {name!r}")
    module, needed = _FROM_EXTRAS[name]
    require(needed, "cohort")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_FROM_EXTRAS})
