"""Which methods find the planted codes: the areas by hand, the methods on a model whose answer is known, the table."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("pyhealth", reason="the demo needs the cohort extra")

from rollout.demo import truth
from rollout.demo.recovery import explainers, integrated_gradients, leave_one_out, marks_of, recovery
from rollout.demo.truth import Found, Trial, table
from tests.support.pyhealth_models import batch as pyhealth_batch
from tests.support.pyhealth_models import transformer

WEIGHTS = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0, 0.25])
MARKS = {"risk": {"codes": {4}}, "protective": {"codes": {2}}}


class Bag(nn.Module):
    """Its logit is the sum of its codes' weights, so that any exact method must give just these."""

    feature_keys, label_keys = ("codes",), ("label",)

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.stack([WEIGHTS, WEIGHTS], 1))

    def embedding_model(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: self.table[codes] for key, codes in inputs.items()}

    def forward_from_embedding(self, codes: Tensor, **batch: Any) -> dict[str, Tensor]:
        return {"logit": 0.5 * codes.sum((1, 2))[:, None]}

    def forward(self, codes: Tensor, **batch: Any) -> dict[str, Tensor]:
        return self.forward_from_embedding(self.table[codes], **batch)


def batch() -> dict[str, Any]:
    return {"codes": torch.tensor([[1, 4, 2, 3], [5, 4, 0, 0], [3, 0, 0, 0]]), "label": torch.zeros(3, 1)}


@pytest.mark.parametrize("steps", [1, 16])
def test_integrated_gradients_of_a_sum_are_its_terms(steps: int) -> None:
    found = integrated_gradients(Bag(), steps, **batch())["codes"]
    torch.testing.assert_close(found, WEIGHTS[batch()["codes"]])


def test_leaving_a_code_out_loses_its_weight_and_a_feature_keeps_its_last() -> None:
    found = leave_one_out(Bag(), **batch())["codes"]
    wanted = WEIGHTS[batch()["codes"]]
    wanted[2] = 0.0
    torch.testing.assert_close(found, wanted)


def test_methods_that_measure_values_or_leave_the_own_place_out() -> None:
    model, data = transformer("flat").eval(), pyhealth_batch("flat")
    found = {name: explain(**data) for name, explain in explainers(model, costly=False).items()}
    for key in model.feature_keys:
        plain, elsewhere = found["rollout"][key], found["rollout, own place left out"][key]
        others = plain[:, 1:] / (plain.sum(1, keepdim=True) - 0.5**3)  # three layers, each half residual
        torch.testing.assert_close(elsewhere[:, 1:], others, atol=1e-6, rtol=0)
        for name in ("value_norm", "kobayashi"):
            assert float((found[name][key] - plain).abs().max()) > 1e-3
            torch.testing.assert_close(found[name][key].sum(1), torch.ones(len(plain)))


def samples() -> list[dict[str, Any]]:
    records = ([1, 4, 2, 3, 5], [4, 1, 5], [1, 4, 4], [3, 5, 2])
    return [
        {"patient_id": f"p{i}", "visit_id": "v", "codes": torch.tensor(codes), "label": torch.zeros(1)}
        for i, codes in enumerate(records)
    ]


def test_the_areas_of_records_leave_their_first_position_out() -> None:
    """Of [1, 4, 2, 3, 5]: risk 4, protective 2, ordinary 3 and 5."""
    by_weight = {1: 0.0, 2: 0.4, 3: 0.3, 4: 0.35, 5: 0.5}

    def explain(**given: Any) -> dict[str, Tensor]:
        scores = [[by_weight.get(int(code), 0.0) for code in row] for row in given["codes"]]
        return {"codes": torch.tensor(scores)}

    found = recovery(Bag(), samples(), MARKS, {"weight": explain}, batch_size=2).sort("sample")
    assert found.select("patient", "feature", "risk", "protective").rows() == [
        ("p0", "codes", 0.5, 0.5),  # 0.35 above 0.3 and below 0.5; 0.3 below and 0.5 above 0.4
        ("p3", "codes", None, 1.0),  # no risk code; 5 above 2
    ]  # p1's risk code stands first, and p2 has no ordinary code after its first


def test_marks_are_ids_of_what_raises_and_what_lowers_the_odds() -> None:
    rows = [{"code": "a", "log_odds": 4.0}, {"code": "b", "log_odds": -4.0}, {"code": "gone", "log_odds": 4.0}]
    found = marks_of({"planted": {"codes": rows}}, {"codes": {"a": 7, "b": 9}})
    assert found == {"risk": {"codes": {7}}, "protective": {"codes": {9}}}


def areas(values: dict[str, list[float]], protective: float | None = None) -> pl.DataFrame:
    return pl.DataFrame([
        {"patient": f"p{i}", "sample": i, "method": method, "feature": "codes", "risk": area, "protective": protective}
        for method, drawn in values.items() for i, area in enumerate(drawn)
    ], schema_overrides={"protective": pl.Float64})  # fmt: skip


def test_the_table_pools_models_and_says_how_far_each_method_is_from_rollout() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0.6, 0.8, 40).tolist()
    better = [value + 0.1 for value in base]
    text = table([
        Found(Trial(0, 2, 2), 0.9, areas({"rollout": base, "frozen_gradient": better})),
        Found(Trial(3, 2, 2), 0.8, areas({"rollout": better, "frozen_gradient": better})),
        Found(Trial(7, 2, 2, protective=True), 0.7, areas({"rollout": base, "frozen_gradient": better}, 0.25)),
    ])  # fmt: skip
    lines = text.splitlines()
    assert lines[0] == "| method | 2×2, cohort 0 | 2×2, cohort 3 | pooled | pooled − rollout |"
    assert lines[2] == "| the model's own AUROC | 0.900 | 0.800 |  |  |"
    mean = np.mean(base)
    assert lines[3].startswith(
        f"| `frozen_gradient` | {mean + 0.1:.3f} | {mean + 0.1:.3f} | {mean + 0.1:.3f} | +0.050 ["
    )
    assert lines[4] == f"| `rollout` | {mean:.3f} | {mean + 0.1:.3f} | {mean + 0.05:.3f} | – |"
    assert "80 records and features of 80 patients, in 2 models." in text
    assert f"| `rollout` | {mean:.3f} | 0.250 |" in text


def test_a_page_without_markers_and_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    page = tmp_path / "methods.md"
    page.write_text("no markers")
    with pytest.raises(ValueError, match=r"methods\.md must have the markers <!-- truth -->"):
        truth.main(["--page", str(page)])
    with pytest.raises(SystemExit):
        truth.main(["--models", "0"])


@pytest.mark.slow
def test_a_model_trained_on_a_cohort_and_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "methods.md"
    page.write_text("before\n<!-- truth -->\n<!-- /truth -->\nafter\n")
    assert truth.main(["--models", "1", "--patients", "600", "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- truth -->\n| method |")
    assert "`leave one code out`" in text
    assert "with protective codes" in text
    assert text.endswith("<!-- /truth -->\nafter\n")
    assert "2×2, cohort 0: AUROC" in capsys.readouterr().out
