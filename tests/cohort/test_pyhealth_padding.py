"""PyHealth's features whose padding its models do not mask: the share is written, and equal lengths are exact."""

import json
from dataclasses import replace
from datetime import datetime

import numpy as np
import polars as pl
import pytest
import torch
from pyhealth.datasets import create_sample_dataset
from pyhealth.models import StageAttentionNet, Transformer

import rollout
from rollout.method import METHODS
from rollout.pyhealth import AttentionRollout, GradientRollout
from rollout_kernels import Method
from tests.support.pyhealth_models import HookOnly, _sharpened, stage_net, transformer
from tests.support.toy_cohort import rows

COUNT = 12


def _hours(count: int) -> list[datetime]:
    return [datetime(2020, 1, 1, k) for k in range(count)]


def _codes(i: int) -> list[str]:
    return [f"c{(i + k) % 7}" for k in range(1 + i % 3)]


def time_series():
    """Flat codes beside a time series of 1 to 4 hours, such as the labs of PyHealth's InHospitalMortalityMIMIC4."""
    raw = [
        {
            "patient_id": f"p{i}", "label": i % 2, "codes": _codes(i % 4),
            "vitals": (_hours(1 + i % 4), [[0.5 * k + i, -1.0] for k in range(1 + i % 4)]),
        }
        for i in range(COUNT)
    ]  # fmt: skip
    samples = create_sample_dataset(raw, {"codes": "sequence", "vitals": "timeseries"}, {"label": "binary"})
    torch.manual_seed(7)
    return _sharpened(Transformer(samples, embedding_dim=16, heads=2, num_layers=2)), samples, "vitals"


def stage_tensor():
    """Nested codes beside a lab tensor, as in PyHealth's MortalityPredictionStageNetMIMIC4."""
    raw = [
        {
            "patient_id": f"p{i}", "label": i % 2,
            "codes": (
                [2.0 * k for k in range(1 + i % 2)], [_codes(i + k) for k in range(1 + i % 2)],
            ),
            "labs": ([1.0 * k for k in range(2 + i % 4)], [[0.3 * k - 1.0, 2.0, float(i)] for k in range(2 + i % 4)]),
        }
        for i in range(COUNT)
    ]  # fmt: skip
    samples = create_sample_dataset(raw, {"codes": "stagenet", "labs": "stagenet_tensor"}, {"label": "binary"})
    torch.manual_seed(7)
    model = StageAttentionNet(samples, embedding_dim=8, chunk_size=4, levels=2, num_heads=2)
    return _sharpened(model), samples, "labs"


def attributed(case, out, **settings):
    model, samples, _ = case
    run = rollout.attribute_cohort(model, samples, out, progress=False, **settings)
    assert run.failed == 0
    predictions = rows(out, "predictions")
    return rows(out)["attribution"].to_numpy(), np.stack(predictions["y_prob"].to_numpy()), predictions


@pytest.mark.parametrize("make", [time_series, stage_tensor])
@pytest.mark.parametrize("method", ["rollout", "pyhealth", "chefer"])
def test_equal_lengths_are_exact_and_padding_is_said(make, method, tmp_path) -> None:
    case = make()
    single, alone, _ = attributed(case, tmp_path / "single", method=method, batch_samples=1)
    padded, together, predictions = attributed(case, tmp_path / "padded", method=method)
    equal, grouped, exact = attributed(case, tmp_path / "equal", method=method, equal_lengths=True)
    np.testing.assert_allclose(equal, single, rtol=0, atol=1e-6)
    np.testing.assert_allclose(grouped, alone, rtol=0, atol=1e-6)
    assert np.abs(padded - single).max() > 1e-3
    assert np.abs(together - alone).max() > 1e-3

    manifest = json.loads((tmp_path / "padded" / "manifest.json").read_text())
    features, unmasked = manifest["identity"]["dataset"]["features"], case[2]
    shares = dict(zip(features, np.stack(predictions["padding_share"].to_numpy()).T, strict=True))
    assert shares["codes"].max() <= 1e-6
    assert (shares[unmasked] > 1e-6).sum() == manifest["padding_share"][unmasked]["above"] > 0
    assert "The model does not mask this padding" in manifest["notes"][0]
    assert repr(unmasked) in manifest["notes"][0]
    assert "'codes'" not in manifest["notes"][0]
    assert np.stack(exact["padding_share"].to_numpy()).max() == 0.0
    batches = [part["batches"] for part in json.loads((tmp_path / "equal" / "manifest.json").read_text())["parts"]]
    assert sum(map(sum, batches)) == COUNT
    assert sum(map(len, batches)) < COUNT


def test_a_sample_without_times_takes_them_from_no_other(tmp_path) -> None:
    """PyHealth's collate leaves out the times of a whole batch for one sample that has none."""
    raw = [
        {
            "patient_id": f"p{i}", "label": i % 2,
            "codes": (None if i in (2, 5) else [7.0 * k for k in range(1 + i)], [f"c{k}" for k in range(1 + i)]),
        }
        for i in range(6)
    ]  # fmt: skip
    samples = create_sample_dataset(raw, {"codes": "stagenet"}, {"label": "binary"})
    torch.manual_seed(7)
    case = StageAttentionNet(samples, embedding_dim=8, chunk_size=4, levels=2, num_heads=2), samples, None
    padded, together, _ = attributed(case, tmp_path / "padded")
    single, alone, _ = attributed(case, tmp_path / "single", batch_samples=1)
    np.testing.assert_allclose(padded, single, rtol=0, atol=1e-6)
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)


def test_discard_is_that_of_each_sample_alone(tmp_path) -> None:
    """It counts the entries of the whole map: the padding of a batch would be discarded first."""
    model = transformer("flat")
    case = model, model.dataset, None
    found, _, _ = attributed(case, tmp_path / "out", method="discard")
    single, _, _ = attributed(case, tmp_path / "single", method="discard", batch_samples=1)
    np.testing.assert_allclose(found, single, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="equal_lengths must not be False for a method that looks at the whole map"):
        rollout.attribute_cohort(model, model.dataset, tmp_path / "no", method="discard", equal_lengths=False)


def test_which_rows_must_sum_to_1() -> None:
    for model in (transformer("nested"), stage_net("stagenet")):
        for name in ("rollout", "pyhealth", "chefer_rollout", "discard"):
            assert AttentionRollout(model, method=name).rows_sum_to_one
        assert AttentionRollout(model, torch.tensor([0.25, 0.75])).rows_sum_to_one
        assert AttentionRollout(model, method=Method(head_fusion="max")).rows_sum_to_one
        assert not AttentionRollout(model, method=Method(head_fusion="max", renormalize=False)).rows_sum_to_one
        assert not AttentionRollout(model, method=Method(attention=1.0, renormalize=False)).rows_sum_to_one
        assert not AttentionRollout(model, method=Method(discard_ratio=0.5, renormalize=False)).rows_sum_to_one
        for name in ("value_norm", "kobayashi"):
            assert AttentionRollout(model, method=name).rows_sum_to_one
        halves = Method(values="norm_then_sum", renormalize=False)  # half of ‖x‖, half of the norms handed on
        assert not AttentionRollout(model, method=halves).rows_sum_to_one
        assert AttentionRollout(model, method=Method(attention=1.0, renormalize=False, own_path=False)).rows_sum_to_one
        assert GradientRollout(model, replace(METHODS["chefer"], own_path=False)).rows_sum_to_one
        assert GradientRollout(model, "grad_rollout").rows_sum_to_one
        assert not GradientRollout(model, "chefer").rows_sum_to_one
    assert not AttentionRollout(HookOnly(), method="rollout").rows_sum_to_one


def test_a_row_of_pyhealths_that_does_not_sum_to_1_is_a_failure(tmp_path, monkeypatch) -> None:
    model, samples, _ = time_series()
    whole = AttentionRollout.attribute
    monkeypatch.setattr(
        AttentionRollout, "attribute", lambda *args, **data: {k: 0.845 * v for k, v in whole(*args, **data).items()}
    )
    run = rollout.attribute_cohort(model, samples, tmp_path / "out", progress=False)
    assert (run.attributed, run.failed) == (0, COUNT)
    assert rows(tmp_path / "out", "failures")["error"][0].startswith("the relevance of feature 'codes' sums to 0.845")


@pytest.mark.parametrize("method", ["rollout", "pyhealth"])
def test_half_precision_is_no_failure(tmp_path, method) -> None:
    model = transformer("flat", num_layers=6).bfloat16()
    assert rollout.attribute_cohort(model, model.dataset, tmp_path / "out", progress=False, method=method).failed == 0
    sums = rows(tmp_path / "out").group_by("sample", "feature").agg(pl.col("attribution").sum())["attribution"]
    assert 1e-4 < np.abs(sums - 1).max() < 2e-2
