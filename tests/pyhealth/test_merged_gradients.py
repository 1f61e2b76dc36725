"""Chefer's relevance and its kin on the distinct rows of each record, beside PyHealth's own and the formula."""

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("pyhealth", reason="the PyHealth drop-in needs the pyhealth extra")

from pyhealth.datasets import create_sample_dataset
from pyhealth.interpret.methods import CheferRelevance as Stock
from pyhealth.models import Transformer

import rollout
from rollout.pyhealth import CheferRelevance, GradientRollout
from tests.support.merged_records import batches, record, repeated, with_masked_starts
from tests.support.pyhealth_models import batch, stage_net, transformer

LAYERS, HEADS = 3, 4


@cache
def model(layers: int = LAYERS) -> Any:
    return transformer("flat", num_layers=layers, heads=HEADS).double().eval()


@settings(deadline=None)
@given(batches(), st.integers(1, LAYERS), st.booleans())
def test_pyhealths_own_one_by_one(data: dict[str, Any], layers: int, frozen: bool) -> None:
    """In float32: PyHealth's knows no other."""
    data["label"] = data["label"].float()
    subject = copy.deepcopy(model(layers)).float().requires_grad_(not frozen)
    ours = without_maps(CheferRelevance(subject), data)
    assert all(p.grad is None for p in subject.parameters())
    subject.requires_grad_(True)
    for b in range(len(data["label"])):
        stock = Stock(subject).attribute(**record(data, b))
        for key, wanted in stock.items():
            tolerance = 1e-5 * max(1.0, float(wanted.max()))
            torch.testing.assert_close(ours[key][b : b + 1], wanted.detach(), atol=tolerance, rtol=0)


def without_maps(interpreter: GradientRollout, data: dict[str, Any]) -> dict[str, Tensor]:
    """What it gives, with the way of stored maps closed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rollout.pyhealth.gradient_rollout.GradientCapture", None)
        return interpreter.attribute(**data)


def maps_and_gradients(subject: Any, data: dict[str, Any]) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """By PyHealth's hooks, for the one logit."""
    subject = copy.deepcopy(subject)
    subject.set_attention_hooks(True)
    subject(**data)["logit"].sum().backward()
    layers = subject.get_attention_layers()
    return {key: ([each for each, _ in pairs], [each for _, each in pairs]) for key, pairs in layers.items()}


METHODS = st.builds(
    rollout.Method,
    head_fusion=st.sampled_from(["mean", "max", "min", torch.tensor([3.0, 1.0, 2.0, 0.5])]),
    residual=st.sampled_from([0.5, 1.0]),
    renormalize=st.booleans(),
    normalize_attention=st.booleans(),
    start_layer=st.integers(0, LAYERS - 1),
    gradients=st.sampled_from(["clamp_then_fuse", "fuse_then_clamp"]),
)


def with_a_hook() -> Any:
    """`model`, whose rows are not merged because someone looks into a layer."""
    subject = copy.deepcopy(model())
    for layer in subject.transformer.values():
        layer.register_forward_hook(lambda *args: None)
    return subject


@pytest.mark.parametrize("make", [model, with_a_hook], ids=["merged", "every position"])
@settings(deadline=None)
@given(batches(), METHODS)
def test_every_gradient_weighted_method(make: Any, data: dict[str, Any], method: rollout.Method) -> None:
    subject = make()
    ours = without_maps(GradientRollout(subject, method), data)
    assert all(p.grad is None for p in subject.parameters())
    for key, (maps, gradients) in maps_and_gradients(model(), data).items():
        wanted = rollout.attention_rollout(maps, query=0, gradients=gradients, method=method, backend="reference")
        torch.testing.assert_close(ours[key], wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("make", [model, with_a_hook], ids=["merged", "every position"])
def test_no_map_is_stored(make: Any) -> None:
    """Of what autograd keeps nothing grows with the square of the length: [B, H, S, S] would be 2^17 numbers."""
    size, seq = 2, 128
    subject, kept = copy.deepcopy(make()), []
    ids = torch.arange(2, 2 + seq).repeat(size, 1)
    for key in ("conditions", "drugs"):
        subject.embedding_model.embedding_layers[key] = torch.nn.Embedding(2 + seq, 16, padding_idx=0).double()
    data = {"conditions": ids, "drugs": ids, "label": torch.ones(size, 1, dtype=torch.float64)}

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes() // tensor.itemsize)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        CheferRelevance(subject).attribute(**data)
    assert len(kept) > 10
    assert max(kept) < size * HEADS * seq**2 / 4


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("form", ["clamp_then_fuse", "fuse_then_clamp"])
def test_rows_without_their_own_path(form: Any, renormalize: bool) -> None:
    method = rollout.Method(residual=0.5, renormalize=renormalize, gradients=form, own_path=False)
    data = with_masked_starts()
    ours = without_maps(GradientRollout(model(), method), data)
    plain = without_maps(GradientRollout(model(), replace(method, own_path=True)), data)
    for key, (maps, gradients) in maps_and_gradients(model(), data).items():
        wanted = rollout.attention_rollout(maps, query=0, gradients=gradients, method=method, backend="reference")
        torch.testing.assert_close(ours[key], wanted, atol=1e-12, rtol=0)
        assert float((ours[key] - plain[key]).abs().max()) > 0.1


def test_a_logit_that_hears_of_nothing_leaves_nothing_without_the_own_path() -> None:
    """No gradient, so that of row 0 nothing is left but its own path: a row of 0, not of rounding."""
    subject = copy.deepcopy(model())
    with torch.no_grad():
        subject.fc.weight.zero_()
    ours = without_maps(GradientRollout(subject, replace(rollout.METHODS["chefer"], own_path=False)), repeated())
    assert all(torch.count_nonzero(scores) == 0 for scores in ours.values())


def test_a_batch_is_its_records_and_padding_gets_nothing() -> None:
    data = repeated()
    whole = without_maps(CheferRelevance(model()), data)
    padded = {key: torch.nn.functional.pad(value, (0, 5)) if key != "label" else value for key, value in data.items()}
    wider = without_maps(CheferRelevance(model()), padded)
    for key, wanted in whole.items():
        torch.testing.assert_close(wider[key][:, :20], wanted, atol=1e-12, rtol=1e-12)
        assert torch.count_nonzero(wider[key][:, 20:]) == 0


@pytest.mark.parametrize("target", [0, 2, None])
def test_the_class_asked_for(target: int | None) -> None:
    """Of several logits; the class predicted where none is asked for."""
    codes = [f"c{i}" for i in range(6)]
    samples = [{"patient_id": f"p{i}", "visit_id": "v", "codes": codes, "label": i} for i in range(3)]
    made = create_sample_dataset(samples, {"codes": "sequence"}, {"label": "multiclass"}, dataset_name="classes")
    torch.manual_seed(1)
    subject = Transformer(made, embedding_dim=16, heads=2, num_layers=2)
    ids = torch.randint(2, 6, (5, 9), generator=torch.Generator().manual_seed(4))
    data = {"codes": ids, "label": torch.zeros(5, dtype=torch.long)}
    ours = without_maps(CheferRelevance(subject), data | {"target_class_idx": target})["codes"]
    wanted = Stock(subject).attribute(**data, target_class_idx=target)["codes"].detach()
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["hook", "stage net", "training"])
def test_where_rows_are_not_merged(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fused attention, and on stored maps where that may not stand in."""
    monkeypatch.setattr("rollout.pyhealth.gradient_rollout.MergedGradientCapture", None)
    other = "FusedGradientCapture" if way == "training" else "GradientCapture"
    monkeypatch.setattr(f"rollout.pyhealth.gradient_rollout.{other}", None)
    subject, data = (
        (stage_net("stagenet"), batch("stagenet")) if way == "stage net" else (transformer("flat"), repeated())
    )
    ours, stock = CheferRelevance(subject), Stock(copy.deepcopy(subject))
    if way == "hook":
        subject.transformer["drugs"].register_forward_hook(lambda *args: None)
    elif way == "training":
        subject.train()
        stock.model.train()
    answers = []
    for interpreter in (ours, stock):
        torch.manual_seed(6)
        answers.append({key: scores.detach() for key, scores in interpreter.attribute(**data).items()})
    for key, wanted in answers[1].items():
        torch.testing.assert_close(answers[0][key], wanted, atol=1e-5 * max(1.0, float(wanted.max())), rtol=0)
