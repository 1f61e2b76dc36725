"""`rollout.pyhealth.CheferRelevance` beside PyHealth's own."""

import copy
import threading
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("pyhealth", reason="the PyHealth drop-in needs the pyhealth extra")

from pyhealth.datasets import create_sample_dataset, get_dataloader
from pyhealth.interpret.api import CheferInterpretable
from pyhealth.interpret.methods import CheferRelevance as Stock
from pyhealth.models import Transformer

from rollout.pyhealth import CheferRelevance, GradientRollout, MissingFeatureError
from rollout_kernels import BackendError
from tests.pyhealth.test_dropin import MODELS, cohort, tables
from tests.pyhealth.test_state import Boom, footprint
from tests.support.pyhealth_models import (
    HookOnly,
    Result,
    assert_same,
    batch,
    codes,
    result,
    stage_net,
    transformer,
    valid,
)

__all__ = ["cohort", "tables"]  # fixtures


def both(model: Any, data: dict[str, Any], **options: Any) -> tuple[Result, Result]:
    """(ours, PyHealth's); PyHealth's on a copy, because it leaves gradients and maps behind."""
    answers: list[Result] = []
    for interpreter, on in ((CheferRelevance, model), (Stock, copy.deepcopy(model))):
        try:
            answers.append(interpreter(on).attribute(**options, **data))
        except Exception as error:
            answers.append(error)
    return answers[0], answers[1]


def scaled(ours: Result, stock: Result) -> None:
    """The same to 1e-5 of the largest relevance beyond the identity's."""
    assert isinstance(ours, dict), repr(ours)
    assert isinstance(stock, dict), repr(stock)
    for key in stock:
        assert float(stock[key].max()) > 0
        assert_same({key: ours[key]}, {key: stock[key]}, tolerance=1e-5 * max(1.0, float(stock[key].max())))


def formula(model: Any, data: dict[str, Any], target: int | None = None) -> dict[str, Tensor]:
    """R of each feature in float64, from the maps and gradients PyHealth's hooks keep."""
    model = copy.deepcopy(model).double().eval().requires_grad_(True)
    model.set_attention_hooks(True)
    logits = model(**data)["logit"]
    classes = logits.argmax(1) if target is None else torch.full((len(logits),), target)
    logits.gather(1, classes[:, None]).sum().backward()
    relevance = {}
    for key, layers in model.get_attention_layers().items():
        product = torch.eye(layers[0][0].shape[-1], dtype=torch.float64)
        for attention, gradient in layers:
            product = product + (attention * gradient).clamp(min=0).mean(1) @ product
        relevance[key] = product
    return relevance


@pytest.mark.parametrize("size", [1, 6], ids="B{}".format)
@pytest.mark.parametrize(("build", "kind"), MODELS)
def test_same_as_stock(build: Any, kind: str, size: int) -> None:
    scaled(*both(build(kind), batch(kind, size)))


@pytest.mark.parametrize("layers", [1, 4], ids="L{}".format)
def test_against_the_formula_in_float64(layers: int) -> None:
    model, data = transformer("flat", num_layers=layers), batch("flat")
    ours = CheferRelevance(model).attribute(**data)
    double = CheferRelevance(transformer("flat", num_layers=layers).double()).attribute(**data)
    for key, full in formula(model, data).items():
        assert float(full[:, 0].sum(1).max()) > 1.01, "there is something beyond the identity"
        torch.testing.assert_close(ours[key].double(), full[:, 0], atol=1e-5, rtol=1e-4)
        assert double[key].dtype == torch.float64
        torch.testing.assert_close(double[key], full[:, 0], atol=1e-11, rtol=1e-9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may serve what is asked")
@pytest.mark.parametrize("backend", ["triton", "native"])
def test_a_backend_that_cannot_weight_maps_from_the_output_is_asked_for_stored_ones(backend: str) -> None:
    interpreter = GradientRollout(transformer("flat"), "chefer", backend=backend)
    with pytest.raises(BackendError, match=f"^attention_rollout: backend='{backend}' cannot serve this call"):
        interpreter.attribute(**batch("flat"))


@cache
def classes_dataset() -> Any:
    samples = [
        {"patient_id": f"p{i}", "visit_id": f"v{i}", "codes": [f"c{(i * j) % 7}" for j in range(3 + i)], "label": i % 3}
        for i in range(6)
    ]
    return create_sample_dataset(samples, {"codes": "sequence"}, {"label": "multiclass"}, dataset_name="classes")


def many_classes() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(1)
    model = Transformer(classes_dataset(), embedding_dim=16, heads=2, num_layers=2)
    return model, next(iter(get_dataloader(classes_dataset(), batch_size=6, shuffle=False)))


@pytest.mark.parametrize("target", [None, 0, 1, 2])
def test_the_class_asked_for(target: int | None) -> None:
    model, data = many_classes()
    ours, stock = both(model, data, target_class_idx=target)
    scaled(ours, stock)
    wanted = formula(model, data, target)["codes"][:, 0]
    torch.testing.assert_close(ours["codes"].double(), wanted, atol=1e-6, rtol=1e-5)
    others = [CheferRelevance(model).attribute(c, **data)["codes"] for c in range(3)]
    assert not torch.allclose(others[0], others[1], atol=1e-4)


@pytest.mark.parametrize("target", [3, -1])
def test_a_class_there_is_not(target: int) -> None:
    model, data = many_classes()
    before = footprint(model.eval())
    ours, stock = both(model, data, target_class_idx=target)
    assert type(ours) is type(stock)
    assert str(ours) == str(stock)
    assert footprint(model) == before


@pytest.mark.parametrize("build", [transformer, stage_net])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_without_gradients_and_frozen(build: Any, mode: Any, frozen: bool) -> None:
    model = build("stagenet")
    wanted = both(model, batch("stagenet"))[1]
    model.requires_grad_(not frozen)
    with mode():
        ours, stock = both(model, batch("stagenet"))
    assert isinstance(stock, RuntimeError)
    scaled(ours, wanted)
    assert not any(scores.requires_grad for scores in ours.values())


def test_training_mode_draws_the_same_dropout() -> None:
    model, data = transformer("flat", dropout=0.4), batch("flat")
    answers = []
    for interpreter in (CheferRelevance(model), Stock(copy.deepcopy(model))):
        interpreter.model.train()
        torch.manual_seed(11)
        answers.append(interpreter.attribute(**data))
    scaled(*answers)


@pytest.mark.parametrize("build", [transformer, stage_net])
def test_nothing_is_left(build: Any) -> None:
    model, data = build("stagenet").eval(), batch("stagenet")
    model(**data)["loss"].backward()
    model.embedding_model.requires_grad_(False)
    before, gradients = footprint(model), [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    CheferRelevance(model).attribute(**data)
    assert footprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("where", ["forward", "readout"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "protocol"])
def test_nothing_is_left_after_an_exception(where: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = transformer("flat").eval(), batch("flat")

    def boom(*args: Any, **kwargs: Any) -> Any:
        raise Boom

    if not own:
        model.get_attention_layers = type(model).get_attention_layers.__get__(model)
        model.get_relevance_tensor = boom if where == "readout" else model.get_relevance_tensor
        monkeypatch.setattr("rollout.pyhealth.interpreter.attention_sites", lambda model: None)
    elif where == "readout":
        monkeypatch.setattr("rollout.pyhealth.merged.encode.Run.chain", boom)
    handle = model.fc.register_forward_hook(boom if where == "forward" else lambda *args: None)
    before = footprint(model)
    with pytest.raises(Boom):
        CheferRelevance(model).attribute(**data)
    assert footprint(model) == before
    assert [p.grad for p in model.parameters()] == [None] * len(list(model.parameters()))
    handle.remove()


def test_an_overridden_readout_is_handed_the_full_matrix() -> None:
    model, data, seen = transformer("flat"), batch("flat"), []

    def readout(R: dict[str, Tensor], **data: Any) -> dict[str, Tensor]:
        seen.append(R)
        return {key: r.mean(1) for key, r in R.items()}

    model.get_relevance_tensor = readout
    ours = CheferRelevance(model).attribute(**data)
    for key, full in formula(transformer("flat"), data).items():
        torch.testing.assert_close(seen[0][key].double(), full, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours[key].double(), full.mean(1), atol=1e-5, rtol=1e-4)


class ThirdParty(HookOnly, CheferInterpretable):
    """A model of one's own, with hooks that keep its gradients."""

    def get_attention_layers(self) -> Any:
        pairs = zip(self.kept["codes"], reversed(self.gradients), strict=True)
        return {"codes": list(pairs)}

    def forward(self, codes: Tensor, **data: Any) -> Any:
        self.gradients = []
        return {"logit": super().forward(codes)[:, None] * torch.tensor([1.0, -1.0])}


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_a_third_party_model(frozen: bool) -> None:
    model, data = ThirdParty(), {"codes": codes()}
    stock = Stock(copy.deepcopy(model)).attribute(target_class_idx=1, **data)
    model.requires_grad_(not frozen)
    before = [p.grad for p in model.parameters()]
    ours = CheferRelevance(model).attribute(target_class_idx=1, **data)
    scaled(ours, stock)
    assert [p.grad for p in model.parameters()] == before == [None] * 3
    assert [p.requires_grad for p in model.parameters()] == [not frozen] * 3
    assert model.enabled is False
    assert model.kept == {}


def test_shared_layers_take_the_protocol() -> None:
    model, data = transformer("flat"), batch("flat")
    model.transformer["drugs"] = model.transformer["conditions"]
    data["drugs"] = data["conditions"].clamp(max=3)
    scaled(*both(model, data))


def test_beyond_what_stock_can() -> None:
    """Truncated visits, an empty feature, flat features of a StageAttentionNet, no samples."""
    model, data = transformer("nested", max_seq_len=3), batch("nested")
    ours, stock = both(model, data)
    assert isinstance(stock, RuntimeError)
    short = dict(data, visits=data["visits"][:, :3])
    scaled({"visits": ours["visits"][:, :3]}, both(model, short)[1])
    assert torch.count_nonzero(ours["visits"][:, 3:]) == 0

    model, data = stage_net("flat"), batch("flat")
    ours, stock = both(model, data)
    assert isinstance(stock, IndexError)
    for key, full in ((key, formula32(model, data)[key]) for key in ours):
        last = valid(data[key]).sum(1) - 1
        torch.testing.assert_close(ours[key], full[torch.arange(6), last], atol=1e-5, rtol=1e-4)

    model, data = transformer("half_empty"), batch("half_empty", 3)
    ours, stock = both(model, data)
    assert isinstance(stock, IndexError)
    assert ours["conditions"].shape == (3, 0)
    assert float(ours["drugs"].sum(1).min()) > 1
    none = {key: value[:0] if isinstance(value, Tensor) else value for key, value in batch("flat").items()}
    assert CheferRelevance(transformer("flat")).attribute(**none)["drugs"].shape == (0, 6)


def formula32(model: Any, data: dict[str, Any]) -> dict[str, Tensor]:
    """As `formula`, in float32: PyHealth's StageAttentionNet makes float32 states whatever its dtype."""
    model = copy.deepcopy(model).eval()
    model.set_attention_hooks(True)
    model(**data)["logit"].sum().backward()
    return {
        key: torch.eye(layers[0][0].shape[-1]) + (layers[0][0] * layers[0][1]).clamp(min=0).mean(1)
        for key, layers in model.get_attention_layers().items()
    }


def test_float16_and_bfloat16_give_float32() -> None:
    data = batch("flat")
    wanted = CheferRelevance(transformer("flat")).attribute(**data)
    for dtype in (torch.bfloat16, torch.float16):
        ours, stock = both(transformer("flat").to(dtype), data)
        assert isinstance(stock, RuntimeError)
        for key in wanted:
            assert ours[key].dtype == torch.float32
            torch.testing.assert_close(ours[key], wanted[key], atol=0.1 * float(wanted[key].max()), rtol=0)


def test_errors() -> None:
    with pytest.raises(ValueError, match="must implement CheferInterpretable interface, got HookOnly"):
        CheferRelevance(HookOnly())
    model, data = transformer("flat"), batch("flat")
    del data["drugs"]
    assert isinstance(both(model, data)[1], KeyError)
    with pytest.raises(MissingFeatureError, match=r"CheferRelevance: the batch must hold .* missing \['drugs'\]"):
        CheferRelevance(model).attribute(**data)
    ours, stock = both(transformer("flat", num_layers=0), batch("flat"))
    assert isinstance(ours, RuntimeError)
    assert "feature 'conditions'" in str(ours)
    assert isinstance(stock, Exception)


def test_the_older_name_and_a_call() -> None:
    model, data = transformer("flat"), batch("flat")
    interpreter = CheferRelevance(model.train())
    assert not model.training
    wanted = interpreter.attribute(**data)
    for other in (interpreter.get_relevance_matrix(**data), interpreter(**data), result(CheferRelevance, model, data)):
        for key in wanted:
            assert torch.equal(other[key], wanted[key])


def test_two_threads_share_a_model() -> None:
    model, data = transformer("flat"), batch("flat")
    parts = [{k: v[i : i + 3] if isinstance(v, Tensor) else v for k, v in data.items()} for i in range(2)]
    interpreter = CheferRelevance(model)
    wanted = [interpreter.attribute(**part) for part in parts]
    got: list[list[dict[str, Tensor]]] = [[], []]

    def work(i: int) -> None:
        got[i].extend(interpreter.attribute(**parts[i]) for _ in range(5))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answers, right in zip(got, wanted, strict=True):
        assert len(answers) == 5
        assert all(torch.equal(answer[key], right[key]) for answer in answers for key in right)


@pytest.mark.parametrize("name", ["Transformer", "StageAttentionNet"])
def test_same_as_stock_on_real_tables(name: str, cohort: Any) -> None:
    """The first batch of each task; PyHealth's readout of a StageAttentionNet fails on flat codes."""
    from pyhealth import models

    torch.manual_seed(0)
    options = {"heads": 4, "num_layers": 3} if name == "Transformer" else {"chunk_size": 16, "levels": 2}
    model = getattr(models, name)(cohort, embedding_dim=32, **options)
    data = next(iter(get_dataloader(cohort, batch_size=32, shuffle=False)))
    ours, stock = both(model, data)
    if name == "StageAttentionNet" and "labs" not in model.feature_keys:
        assert isinstance(stock, IndexError)
        full = formula32(model, data)
        stock = {key: full[key][torch.arange(len(data[key])), valid(data[key]).sum(1) - 1].detach() for key in ours}
    scaled(ours, stock)
