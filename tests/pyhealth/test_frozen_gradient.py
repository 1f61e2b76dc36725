"""`rollout.pyhealth.FrozenGradient`: that it conserves, keeps to the features' shapes, and leaves nothing behind."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("pyhealth", reason="the PyHealth drop-in needs the pyhealth extra")

from pyhealth import models as zoo
from pyhealth.datasets import create_sample_dataset, get_dataloader

from rollout.errors import CaptureError
from rollout.frozen import frozen_gradient
from rollout.pyhealth import FrozenGradient, MissingFeatureError
from tests.pyhealth.test_state import footprint

FLAT = {"codes": "sequence", "drugs": "sequence"}
VISITS = {"codes": "nested_sequence"}
STAGES = {"codes": "stagenet"}


def sample(schema: dict[str, str], i: int) -> dict[str, Any]:
    visits = [[f"c{j * i % 7}", f"c{j}"] for j in range(1 + i)]
    if schema is FLAT:
        return {"codes": [f"c{j * i % 7}" for j in range(2 + i)], "drugs": [f"d{j}" for j in range(1 + i % 3)]}
    return {"codes": visits if schema is VISITS else ([0.5 * k for k in range(1 + i)], visits)}


def built(kind: str, schema: dict[str, str], classes: int = 2, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model without biases, whose logit is then all of its inputs', and a batch of six samples."""
    samples = [
        {"patient_id": f"p{i}", "visit_id": "v", **sample(schema, i), "label": i % classes} for i in range(6)
    ]  # fmt: skip
    mode = "binary" if classes == 2 else "multiclass"
    dataset = create_sample_dataset(samples, schema, {"label": mode}, dataset_name="frozen")
    torch.manual_seed(0)
    model = getattr(zoo, kind)(dataset, **options).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model, next(iter(get_dataloader(dataset, batch_size=6, shuffle=False)))


TRANSFORMER = {"embedding_dim": 16, "heads": 2, "num_layers": 2}
STAGE_NET = {"embedding_dim": 16, "chunk_size": 8, "levels": 2, "num_heads": 2}
CASES = {
    "Transformer": ("Transformer", FLAT, 2, TRANSFORMER),
    "Transformer, three classes": ("Transformer", FLAT, 3, TRANSFORMER),
    "Transformer, visits": ("Transformer", VISITS, 2, TRANSFORMER),
    "Transformer, stages": ("Transformer", STAGES, 2, TRANSFORMER),
    "MLP": ("MLP", FLAT, 2, {}),
    "MLP, visits": ("MLP", VISITS, 2, {}),
    "TCN": ("TCN", FLAT, 2, {}),
    "JambaEHR": ("JambaEHR", FLAT, 2, {}),
    "EHRMamba, visits": ("EHRMamba", VISITS, 2, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_scores_of_all_codes_sum_to_the_logit(case: str) -> None:
    kind, schema, classes, options = CASES[case]
    model, data = built(kind, schema, classes, **options)
    before, logits = footprint(model), model(**data)["logit"].detach()
    for target in (None, *range(classes if classes > 2 else 0)):
        found = FrozenGradient(model).attribute(target, **data)
        wanted = logits.max(1).values if target is None else logits[:, target]
        values = {key: data[key][-1] if isinstance(data[key], tuple) else data[key] for key in schema}
        assert {key: tuple(scores.shape) for key, scores in found.items()} == {
            key: tuple(value.shape) for key, value in values.items()
        }
        total = sum(scores.flatten(1).sum(1) for scores in found.values())
        torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-5)
        padded = found["codes"][values["codes"] == 0]
        assert padded.abs().max().item() == 0.0
    assert footprint(model) == before


@pytest.mark.parametrize(("kind", "message"), [("RNN", r"in rnn.codes \(RNNLayer\)"), ("AdaCare", r"gru in adacare")])
def test_recurrence_is_refused_by_name(kind: str, message: str) -> None:
    model, data = built(kind, FLAT)
    before = footprint(model)
    with pytest.raises(CaptureError, match=message):
        FrozenGradient(model).attribute(**data)
    assert footprint(model) == before


def test_fused_attention_gives_what_the_maps_give() -> None:
    """The general form runs PyHealth's own attention, map and all."""
    model, data = built("Transformer", FLAT, **TRANSFORMER)
    model = model.double()
    data = {**data, "label": data["label"].double()}
    plain = frozen_gradient(model, data, at="embedding_model")
    found = FrozenGradient(model).attribute(**data)
    assert isinstance(plain, dict)
    for key in FLAT:
        torch.testing.assert_close(found[key], plain[key], rtol=1e-10, atol=1e-12)


def test_a_masked_first_position_an_empty_feature_and_a_frozen_model() -> None:
    model, data = built("Transformer", FLAT, **TRANSFORMER)
    data["codes"][1, 0] = 0  # padding where the model reads
    data["drugs"][2] = 0
    logits = model(**data)["logit"][:, 0]
    frozen = copy.deepcopy(model).requires_grad_(False)
    with torch.inference_mode():
        found = FrozenGradient(frozen).attribute(**data)
    total: Tensor = sum(scores.sum(1) for scores in found.values())  # type: ignore[assignment]
    torch.testing.assert_close(total, logits.detach(), rtol=1e-4, atol=1e-5)
    without = {**data, "drugs": data["drugs"][:, :0]}
    assert FrozenGradient(model).attribute(**without)["drugs"].shape == (6, 0)


def test_bad_input_is_named() -> None:
    model, data = built("Transformer", FLAT, 3, **TRANSFORMER)
    with pytest.raises(MissingFeatureError, match="drugs"):
        FrozenGradient(model).attribute(codes=data["codes"])
    with pytest.raises(ValueError, match="target_class_idx must be below 3, got 3"):
        FrozenGradient(model).attribute(3, **data)
    with pytest.raises(TypeError, match="must have an embedding_model, as PyHealth's have, got Linear"):
        FrozenGradient(nn.Linear(2, 2))
