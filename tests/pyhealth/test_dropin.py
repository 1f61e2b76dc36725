"""`rollout.pyhealth.AttentionRollout` beside PyHealth's own.

Equal where PyHealth's gives numbers; where it fails or gives a wrong shape, what its documentation promises.
"""

import importlib
import os
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("pyhealth", reason="the PyHealth drop-in needs the pyhealth extra")

import rollout
from rollout.pyhealth import AttentionRollout, MissingFeatureError
from tests.support.pyhealth_models import (
    Stock,
    assert_same,
    batch,
    both,
    maps_of,
    naive_rollout,
    result,
    rows,
    stage_net,
    transformer,
    valid,
    values,
)

TRANSFORMER_DATA = ["flat", "nested", "gaps", "stagenet", "stagenet_flat", "stagenet_tensor", "timeseries"]
STAGE_DATA = ["nested", "gaps", "stagenet", "stagenet_tensor", "timeseries"]
MODELS = [pytest.param(transformer, kind, id=f"Transformer-{kind}") for kind in TRANSFORMER_DATA] + [
    pytest.param(stage_net, kind, id=f"StageAttentionNet-{kind}") for kind in STAGE_DATA
]


# Where PyHealth gives numbers.


@pytest.mark.parametrize("size", [1, 3, 6], ids="B{}".format)
@pytest.mark.parametrize(("build", "kind"), MODELS)
def test_same_as_stock(build: Any, kind: str, size: int) -> None:
    ours, stock = both(build(kind), batch(kind, size))
    assert_same(ours, stock)


@pytest.mark.parametrize("layers", [1, 2, 4], ids="L{}".format)
@pytest.mark.parametrize("heads", [1, 4], ids="H{}".format)
def test_same_as_stock_for_every_depth(heads: int, layers: int) -> None:
    ours, stock = both(transformer("flat", heads=heads, num_layers=layers), batch("flat"))
    assert_same(ours, stock)


@pytest.mark.parametrize(("build", "kind"), MODELS)
def test_against_the_formula_in_float64(build: Any, kind: str) -> None:
    model, data = build(kind), batch(kind)
    ours = AttentionRollout(model).attribute(**data)
    for key, maps in maps_of(model, data).items():
        full = {key: naive_rollout(maps)}
        if build is stage_net:
            full = {other: naive_rollout(layers) for other, layers in maps_of(model, data).items()}
        wanted = model.get_relevance_tensor(full, **data)[key]
        got = ours[key] if ours[key].dim() == 2 else ours[key][..., 0]
        torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_every_backend(backend: str) -> None:
    model, data = transformer("flat"), batch("flat")
    assert_same(result(AttentionRollout, model, data, backend=backend), result(Stock, model, data))


def test_padding_is_exactly_zero_and_a_trimmed_sample_agrees() -> None:
    model, data = transformer("flat"), batch("flat")
    ours = AttentionRollout(model).attribute(**data)["conditions"]
    ids = data["conditions"]
    assert int((ids == 0).sum()) > 0
    assert torch.equal(ours[ids == 0], torch.zeros(int((ids == 0).sum())))
    for b in range(len(ids)):
        alone = {key: value[b : b + 1] if isinstance(value, Tensor) else value for key, value in data.items()}
        alone["conditions"] = ids[b : b + 1, : int((ids[b] != 0).sum())]
        trimmed = AttentionRollout(model).attribute(**alone)["conditions"]
        torch.testing.assert_close(trimmed[0], ours[b, : trimmed.shape[1]], atol=1e-6, rtol=0)


def test_a_visits_score_is_copied_to_every_code_cell() -> None:
    model, data = transformer("nested"), batch("nested")
    ours, stock = both(model, data)
    assert_same(ours, stock)
    assert ours["visits"].shape == data["visits"].shape
    assert int((data["visits"][:, 0] == 0).sum()) > 0, "a padded cell in a visit that is read"
    assert torch.equal(ours["visits"], ours["visits"][..., :1].expand_as(data["visits"]))
    torch.testing.assert_close(ours["visits"][..., 0].sum(1), torch.ones(6))


@pytest.mark.parametrize("build", [transformer, stage_net])
def test_a_row_that_is_masked_is_uniform(build: Any) -> None:
    """Position 0 is read by the Transformer, and is invalid here: every padded query row is uniform over S."""
    model, data = build("gaps", **({"num_layers": 1} if build is transformer else {})), batch("gaps")
    assert not bool(valid(data["visits"])[0, 0])
    ours, stock = both(model, data)
    assert_same(ours, stock)
    if build is transformer:
        uniform = torch.full((data["visits"].shape[1],), 0.5 / data["visits"].shape[1])
        uniform[0] += 0.5
        torch.testing.assert_close(ours["visits"][0, :, 0], uniform)


def test_an_empty_sample_beside_a_longer_one() -> None:
    data = batch("half_empty")
    assert torch.count_nonzero(data["conditions"][:3]) == 0
    assert_same(*both(transformer("half_empty"), data))


def test_an_id_of_zero_first_and_a_sample_of_nothing() -> None:
    model, data = transformer("flat"), batch("flat")
    data["conditions"] = data["conditions"].clone()
    data["conditions"][1, 0] = 0
    data["conditions"][2] = 0
    assert_same(*both(model, data))


@pytest.mark.parametrize("build", [transformer, stage_net])
def test_numeric_steps_of_padding_share_the_relevance_as_in_stock(build: Any) -> None:
    """The bias of a linear embedding makes padded steps valid to the model."""
    model, data = build("stagenet_tensor"), batch("stagenet_tensor")
    ours, stock = both(model, data)
    assert_same(ours, stock)
    padded = ~(values(data, "labs") != 0).any(-1)
    assert float(ours["labs"][..., 0][padded].sum() / ours["labs"][..., 0].sum()) > 0.1


def test_a_nan_stays_in_its_sample() -> None:
    model, data = transformer("stagenet_tensor"), batch("stagenet_tensor")
    labs = values(data, "labs").clone()
    labs[2, 0, 0] = torch.nan
    data["labs"] = (data["labs"][0], labs)
    ours, stock = both(model, data)
    others = [0, 1, 3, 4, 5]
    assert bool(ours["labs"][2].isnan().any())
    assert bool(stock["labs"][2].isnan().any())
    torch.testing.assert_close(ours["labs"][others], stock["labs"][others], atol=1e-5, rtol=0)
    assert_same({"visits": ours["visits"]}, {"visits": stock["visits"]})


def test_training_mode_draws_the_same_dropout() -> None:
    model, data = transformer("flat", dropout=0.4), batch("flat")
    answers = []
    for interpreter in (AttentionRollout(model), Stock(model)):
        model.train()
        torch.manual_seed(11)
        answers.append(interpreter.attribute(**data))
        assert model.training
    assert_same(*answers)
    model.eval()
    assert (
        float((answers[0]["conditions"] - AttentionRollout(model).attribute(**data)["conditions"]).abs().max()) > 1e-3
    )


# Where PyHealth fails, or gives a wrong shape.


def test_beyond_max_seq_len_what_was_not_read_gets_zero() -> None:
    model, data = transformer("flat", max_seq_len=4), batch("flat")
    ours, stock = both(model, data)
    for key in ours:
        assert stock[key].shape == (6, 4)
        assert ours[key].shape == data[key].shape
        torch.testing.assert_close(ours[key][:, :4], stock[key], atol=1e-5, rtol=0)
        assert torch.count_nonzero(ours[key][:, 4:]) == 0


def test_beyond_max_seq_len_with_nested_visits() -> None:
    model, data = transformer("nested", max_seq_len=3), batch("nested")
    ours, stock = both(model, data)
    assert isinstance(stock, RuntimeError)
    assert ours["visits"].shape == data["visits"].shape
    short = dict(data, visits=data["visits"][:, :3])
    torch.testing.assert_close(ours["visits"][:, :3], Stock(model).attribute(**short)["visits"], atol=1e-5, rtol=0)
    assert torch.count_nonzero(ours["visits"][:, 3:]) == 0


@pytest.mark.parametrize("build", [transformer, stage_net])
def test_a_feature_that_is_empty_in_every_sample(build: Any) -> None:
    model, data = build("half_empty"), batch("half_empty", 3)
    assert data["conditions"].shape == (3, 0)
    ours, stock = both(model, data)
    assert isinstance(stock, IndexError if build is transformer else Exception)
    assert ours["conditions"].shape == (3, 0)
    assert ours["drugs"].shape == data["drugs"].shape
    beside = dict(data, conditions=torch.zeros(3, 1, dtype=torch.long))
    maps = maps_of(model, beside)["drugs"]
    read = torch.zeros(3, dtype=torch.long) if build is transformer else valid(data["drugs"]).sum(1) - 1
    torch.testing.assert_close(ours["drugs"].double(), rows(naive_rollout(maps), read), atol=1e-6, rtol=0)


def test_a_batch_of_no_samples() -> None:
    model, data = transformer("flat"), batch("flat")
    none = {key: value[:0] if isinstance(value, Tensor) else value for key, value in data.items()}
    ours, stock = both(model, none)
    assert isinstance(stock, RuntimeError)
    assert {key: tuple(value.shape) for key, value in ours.items()} == {"conditions": (0, 17), "drugs": (0, 6)}
    assert ours["drugs"].dtype == torch.float32


def test_a_feature_that_is_one_position_fills_its_value_shape() -> None:
    model, data = transformer("mixed"), batch("mixed")
    ours, stock = both(model, data)
    assert_same({"visits": ours["visits"]}, {"visits": stock["visits"]})
    for key in ("vitals", "flags"):
        assert torch.equal(stock[key], torch.ones(6, 1))
        assert torch.equal(ours[key], torch.ones_like(data[key], dtype=torch.float32))


@pytest.mark.parametrize("kind", ["flat", "stagenet_flat"])
def test_a_stage_attention_net_of_flat_features_reads_the_last_valid_position(kind: str) -> None:
    model, data = stage_net(kind), batch(kind)
    ours, stock = both(model, data)
    assert isinstance(stock, IndexError)
    for key, maps in maps_of(model, data).items():
        ids = values(data, key)
        wanted = rows(naive_rollout(maps), valid(ids).sum(1) - 1)
        assert ours[key].shape == ids.shape
        torch.testing.assert_close(ours[key].double(), wanted, atol=1e-6, rtol=0)


def test_readout_forward_reads_the_row_the_model_used() -> None:
    """PyHealth's readout takes the mask from the raw lab values; the model took it from their embedding: all valid."""
    model, data = stage_net("stagenet_tensor"), batch("stagenet_tensor")
    used = AttentionRollout(model, readout="forward").attribute(**data)
    last = torch.full((6,), values(data, "labs").shape[1] - 1)
    wanted = rows(naive_rollout(maps_of(model, data)["labs"]), last)
    torch.testing.assert_close(used["labs"][..., 0].double(), wanted, atol=1e-6, rtol=0)
    stock = Stock(model).attribute(**data)
    assert_same({"visits": used["visits"]}, {"visits": stock["visits"]})
    assert float((used["labs"] - stock["labs"]).abs().max()) > 0.1


def test_readout_forward_is_the_default_for_a_transformer() -> None:
    model, data = transformer("flat"), batch("flat")
    assert_same(AttentionRollout(model, readout="forward").attribute(**data), Stock(model).attribute(**data))


# Options beyond PyHealth's.


@pytest.mark.parametrize(
    ("fusion", "fuse"),
    [
        ("max", lambda a: a.amax(1)),
        ("min", lambda a: a.amin(1)),
        (torch.tensor([3.0, 1.0]), lambda a: (a * torch.tensor([0.75, 0.25]).view(1, 2, 1, 1)).sum(1)),
    ],
    ids=["max", "min", "weights"],
)
def test_other_head_fusions_renormalise(fusion: Any, fuse: Any) -> None:
    model, data = transformer("flat"), batch("flat")
    ours = AttentionRollout(model, fusion).attribute(**data)
    for key, maps in maps_of(model, data).items():
        wanted = naive_rollout(maps, fuse, renormalize=True)[:, 0]
        torch.testing.assert_close(ours[key].double(), wanted, atol=1e-6, rtol=0)
        torch.testing.assert_close(ours[key].sum(1), torch.ones(6))


@pytest.mark.parametrize("method", ["rollout", "chefer_rollout", "discard", rollout.Method(start_layer=2)], ids=str)
def test_a_method_replaces_the_default(method: Any) -> None:
    model, data = transformer("flat"), batch("flat")
    ours = AttentionRollout(model, method=method).attribute(**data)
    for key, maps in maps_of(model, data).items():
        wanted = rollout.attention_rollout([a.float() for a in maps], query=0, method=method, backend="reference")
        torch.testing.assert_close(ours[key], wanted, atol=1e-6, rtol=0)


# Errors.


@pytest.mark.parametrize("fusion", ["banana", None, 3, ["mean"]])
def test_an_unknown_head_fusion_is_a_value_error_as_in_stock(fusion: Any) -> None:
    model = transformer("flat")
    with pytest.raises(ValueError, match="head_fusion"):
        Stock(model, fusion)
    with pytest.raises(ValueError, match=r"AttentionRollout: head_fusion must be one of .*'mean'.* got"):
        AttentionRollout(model, fusion)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "banana"}, "method must be one of .* got 'banana'"),
        ({"method": "chefer"}, "method must be gradient-free, got 'chefer'"),
        ({"method": "grad_rollout"}, "method must be gradient-free, got 'grad_rollout'"),
        ({"method": "rollout", "head_fusion": "max"}, "give head_fusion or method, not both"),
        ({"backend": "banana"}, "backend must be one of .* got 'banana'"),
        ({"readout": "banana"}, "readout must be one of .* got 'banana'"),
        ({"head_fusion": torch.tensor([1.0, -1.0])}, "must not sum to 0"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionRollout(transformer("flat"), **options)


def test_a_model_without_readout_methods_is_a_type_error_as_in_stock() -> None:
    model = torch.nn.Linear(2, 2)
    model.set_attention_hooks = lambda enabled: None
    answers = [result(interpreter, model, {}) for interpreter in (AttentionRollout, Stock)]
    for answer in answers:
        assert isinstance(answer, TypeError)
        assert "Missing: get_attention_layers, get_relevance_tensor" in str(answer)
    assert model.training, "refused before the model is touched"


def test_without_pyhealth_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[:2] == ["rollout", "pyhealth"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyhealth.models", None)
    with pytest.raises(ImportError, match=r"pip install 'attention-rollout\[pyhealth\]'"):
        importlib.import_module("rollout.pyhealth")


@pytest.mark.parametrize("build", [transformer, stage_net])
def test_a_missing_feature_is_named(build: Any) -> None:
    model, data = build("stagenet_tensor"), batch("stagenet_tensor")
    del data["labs"]
    ours, stock = both(model, data)
    assert isinstance(stock, KeyError)
    assert isinstance(ours, MissingFeatureError)
    assert isinstance(ours, KeyError)
    assert isinstance(ours, ValueError)
    assert "missing ['labs'], got ['label', 'patient_id', 'visit_id', 'visits']" in str(ours)


def test_head_weights_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"head_fusion weights must be \[H\] = \[2\]"):
        AttentionRollout(transformer("flat"), torch.ones(3)).attribute(**batch("flat"))


def test_an_error_of_the_model_is_the_models() -> None:
    model, data = stage_net("stagenet").bfloat16(), batch("stagenet")
    ours, stock = both(model, data)
    assert type(ours) is type(stock) is RuntimeError
    assert str(ours) == str(stock)


# Real tables.


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The MIMIC-IV tables named by EHR_ROOT."""
    if "EHR_ROOT" not in os.environ:
        pytest.skip("EHR_ROOT does not name a folder of MIMIC-IV tables")
    from pyhealth.datasets import MIMIC4Dataset

    return MIMIC4Dataset(
        ehr_root=os.environ["EHR_ROOT"],
        ehr_tables=["diagnoses_icd", "procedures_icd", "prescriptions", "labevents"],
        cache_dir=str(tmp_path_factory.mktemp("pyhealth")),
        num_workers=1,
    )


@pytest.fixture(scope="module", params=["MortalityPredictionMIMIC4", "MortalityPredictionStageNetMIMIC4"])
def cohort(request: pytest.FixtureRequest, tables: Any) -> Any:
    """A task on them: flat codes, or codes by visit and lab values with their times."""
    from pyhealth import tasks

    return tables.set_task(getattr(tasks, request.param)(), num_workers=1)


@pytest.mark.parametrize("name", ["Transformer", "StageAttentionNet"])
def test_same_as_stock_on_real_tables(name: str, cohort: Any) -> None:
    """The whole cohort. PyHealth's readout of a StageAttentionNet fails on flat codes; there the formula stands in."""
    from pyhealth import models
    from pyhealth.datasets import get_dataloader

    torch.manual_seed(0)
    options = {"heads": 4, "num_layers": 3} if name == "Transformer" else {"chunk_size": 16, "levels": 2}
    model = getattr(models, name)(cohort, embedding_dim=32, **options)
    seen, worst, by_formula = 0, 0.0, 0
    for part in get_dataloader(cohort, batch_size=32, shuffle=False):
        ours, stock = both(model, part)
        if isinstance(stock, IndexError):
            maps = maps_of(model, part)
            stock = {k: rows(naive_rollout(m), valid(part[k]).sum(1) - 1).float() for k, m in maps.items()}
            by_formula += len(part["patient_id"])
        assert_same(ours, stock)
        seen += len(part["patient_id"])
        worst = max(worst, *(float((ours[key] - stock[key]).abs().max()) for key in ours))
    assert seen == len(cohort) > 0
    assert by_formula == (seen if name == "StageAttentionNet" and "labs" not in model.feature_keys else 0)
    print(f"\n{name} {cohort.task_name}: {seen} samples, {by_formula} by the formula, largest difference {worst:.2e}")
