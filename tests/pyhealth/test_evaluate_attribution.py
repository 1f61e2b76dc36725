"""`evaluate_attribution`: PyHealth's own numbers for given attributions."""

import contextlib
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("pyhealth", reason="the PyHealth drop-in needs the pyhealth extra")

from pyhealth.datasets import get_dataloader
from pyhealth.metrics.interpretability import SampleClass
from pyhealth.metrics.interpretability import evaluate_attribution as stock_evaluate

from rollout.pyhealth import AttentionRollout, evaluate_attribution
from rollout.pyhealth.merged.ablation import Ablation
from tests.support.pyhealth_models import batch, dataset, stage_net, transformer


class Given:
    """A method whose scores are drawn once per batch: some tie, some are all equal."""

    def __init__(self, seed: int, levels: int) -> None:
        self.seed, self.levels = seed, levels

    def attribute(self, **data: Any) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        found = {}
        for key, value in data.items():
            values = value[1] if isinstance(value, tuple) else value
            if isinstance(values, Tensor) and key not in ("label", "patient_id", "visit_id"):
                scores = torch.randint(-1, self.levels, values.shape, generator=generator).float() / 7
                scores[0] = 0.25
                found[key] = scores
        return found


def everyone(probability: Tensor, kind: str) -> Tensor:
    return torch.full(probability.shape, int(SampleClass.POSITIVE))


def signed(probability: Tensor, kind: str) -> Tensor:
    marks = torch.where(probability < 0.3, int(SampleClass.NEGATIVE), int(SampleClass.POSITIVE))
    return torch.where((probability > 0.4) & (probability < 0.45), int(SampleClass.IGNORE), marks)


FILTERS: dict[str, Callable[..., Tensor] | None] = {"default": None, "everyone": everyone, "signed": signed}


def both(model: Any, loader: Any, method: Any, **options: Any) -> tuple[dict[str, float], dict[str, float]]:
    ours = evaluate_attribution(model, loader, method, **options)
    with contextlib.redirect_stdout(io.StringIO()):
        return ours, stock_evaluate(model, loader, method, **options)


def assert_same(ours: dict[str, float], wanted: dict[str, float]) -> None:
    assert list(ours) == list(wanted)
    for name, value in wanted.items():
        assert ours[name] == pytest.approx(value, abs=1e-6, nan_ok=True)


@settings(deadline=None, max_examples=12)
@given(
    st.tuples(st.just("flat"), st.integers(1, 6)) | st.tuples(st.just("half_empty"), st.integers(4, 6)),
    st.integers(0, 10**6),
    st.sampled_from([1, 3, 50]),
    st.sampled_from(sorted(FILTERS)),
)
def test_pyhealths_numbers(data: tuple[str, int], seed: int, levels: int, chosen: str) -> None:
    kind, size = data
    model = transformer(kind)
    loader = get_dataloader(dataset(kind), batch_size=size, shuffle=False)
    assert Ablation(model.eval()).serves(batch(kind), {})
    assert_same(*both(model, loader, Given(seed, levels), sample_filter=FILTERS[chosen]))


@pytest.mark.parametrize("strategy", ["zero", "mean"])
@pytest.mark.parametrize(
    ("kind", "make"),
    [("nested", transformer), ("mixed", transformer), ("stagenet", stage_net), ("stagenet_tensor", stage_net)],
    ids=["nested", "mixed", "stagenet", "stagenet_tensor"],
)
def test_models_that_run_in_whole_stacks(kind: str, make: Callable[..., Any], strategy: str) -> None:
    model = make(kind)
    loader = get_dataloader(dataset(kind), batch_size=4, shuffle=False)
    options = {"sample_filter": everyone, "ablation_strategy": strategy}
    assert_same(*both(model, loader, Given(3, 5), **options))


def test_an_interpreter_and_one_metric() -> None:
    model = transformer("flat").eval()
    loader = get_dataloader(dataset("flat"), batch_size=3, shuffle=False)
    options: dict[str, Any] = {"metrics": ["sufficiency"], "percentages": [2.5, 30, 100], "positive_threshold": 0.01}
    with pytest.warns(DeprecationWarning, match="positive_threshold"):
        assert_same(*both(model, loader, AttentionRollout(model), **options))


def test_nobody_is_left() -> None:
    model = transformer("flat").eval()
    loader = get_dataloader(dataset("flat"), batch_size=3, shuffle=False)
    nobody = {"sample_filter": lambda probability, kind: torch.zeros(len(probability), dtype=torch.long)}
    found = evaluate_attribution(model, loader, Given(0, 5), **nobody)
    assert list(found) == ["comprehensiveness", "sufficiency"]
    assert all(math.isnan(value) for value in found.values())


class Wrong:
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change

    def attribute(self, **data: Any) -> dict[str, Tensor]:
        return {"drugs": self.change(torch.ones(data["drugs"].shape))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["auc"]}, r"metrics must be of comprehensiveness, sufficiency, got \['auc'\]"),
        ({"percentages": [0, 5]}, r"percentages must be one or more numbers in \(0, 100\], got \[0, 5\]"),
        ({"percentages": []}, "percentages must be one or more"),
        ({"ablation_strategy": "blank"}, "must be zero, mean or noise, got 'blank'"),
        (
            {"method": Wrong(lambda x: x[:, :-1])},
            r"scores of 'drugs' must be shaped like its values, \[6, 6\], got \[6, 5\]",
        ),
        ({"method": Wrong(lambda x: x * torch.nan)}, "scores of 'drugs' must be finite"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    model = transformer("flat").eval()
    arguments = {"method": Given(0, 3), **options}
    with pytest.raises(ValueError, match=message):
        evaluate_attribution(model, [batch("flat")], **arguments)
