"""What PyHealth's contract asks of a rollout interpreter: the full R for a model that reads it its own way, and the
protocol of hooks for a model that is none of PyHealth's."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("pyhealth", reason="the PyHealth drop-in needs the pyhealth extra")

from pyhealth.interpret.methods.base_interpreter import BaseInterpreter
from pyhealth.models import StageAttentionNet, Transformer

from rollout.pyhealth import AttentionRollout
from tests.support.pyhealth_models import (
    HookOnly,
    Stock,
    assert_same,
    batch,
    both,
    codes,
    maps_of,
    naive_rollout,
    result,
    stage_net,
    transformer,
)

PYHEALTH = [pytest.param(transformer, id="Transformer"), pytest.param(stage_net, id="StageAttentionNet")]


# The interpreter.


@pytest.mark.parametrize("build", PYHEALTH)
def test_is_a_callable_base_interpreter_that_puts_the_model_in_eval_mode(build: Any) -> None:
    model, data = build("stagenet").train(), batch("stagenet")
    interpreter = AttentionRollout(model)
    assert isinstance(interpreter, BaseInterpreter)
    assert interpreter.model is model
    assert interpreter.head_fusion == "mean"
    assert not model.training
    assert torch.equal(interpreter(**data)["visits"], interpreter.attribute(**data)["visits"])


@pytest.mark.parametrize("build", PYHEALTH)
def test_is_deterministic_and_ignores_the_target_class(build: Any) -> None:
    interpreter, data = AttentionRollout(build("stagenet")), batch("stagenet")
    wanted = interpreter.attribute(**data)["visits"]
    assert float(wanted.std()) > 1e-3
    for options in ({}, {"target_class_idx": 0}, {"target_class_idx": 1}):
        assert torch.equal(interpreter.attribute(**options, **data)["visits"], wanted)
    assert torch.equal(interpreter.attribute(1, **data)["visits"], wanted)


# A readout method overridden on the instance: the full R.


def overriding(model: Any, seen: list[dict[str, Tensor]]) -> None:
    """Replace the readout on the instance, as PyHealth's own tests do, by one that keeps the R it is handed."""

    def readout(R: dict[str, Tensor], **data: Any) -> dict[str, Tensor]:
        seen.append({key: r.clone() for key, r in R.items()})
        return {key: r[:, -1] for key, r in R.items()}

    model.get_relevance_tensor = readout


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize(("build", "kind"), [(transformer, "flat"), (stage_net, "stagenet"), (transformer, "nested")])
def test_an_overridden_readout_is_handed_the_full_matrix_once(build: Any, kind: str, frozen: bool) -> None:
    model, data, seen = build(kind), batch(kind), []
    overriding(model, seen)
    stock = Stock(model).attribute(**data)
    model.requires_grad_(not frozen)
    ours = AttentionRollout(model).attribute(**data)
    assert_same(ours, stock)
    by_stock, by_ours = seen
    assert_same(by_ours, by_stock, tolerance=1e-6)
    for key, maps in maps_of(model, data).items():
        torch.testing.assert_close(by_ours[key].double(), naive_rollout(maps), atol=1e-6, rtol=0)
        assert bool((by_ours[key] >= 0).all())
        torch.testing.assert_close(by_ours[key].sum(-1), torch.ones(by_ours[key].shape[:2]))


@pytest.mark.parametrize("build", PYHEALTH)
def test_identity_maps_give_the_identity(build: Any) -> None:
    model, data, seen = build("stagenet"), batch("stagenet"), []
    eye = torch.eye(6).expand(6, 2, 6, 6)
    model.get_attention_layers = lambda: {"visits": [(eye, None)] * 3}
    overriding(model, seen)
    AttentionRollout(model).attribute(**data)
    assert torch.equal(seen[0]["visits"], torch.eye(6).expand(6, 6, 6))
    assert all(module.attn_map is None for module in model.modules() if hasattr(module, "attn_map"))


def test_layers_overridden_on_the_instance_are_composed_input_side_first() -> None:
    """Two maps that do not commute, by hand: ½(I+A₂) · ½(I+A₁)."""
    model, data = transformer("flat"), batch("flat", 1)
    first, second = torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    layers = [(first.view(1, 1, 2, 2), None), (second.view(1, 1, 2, 2), None)]
    model.get_attention_layers = lambda: {"conditions": layers, "drugs": layers}
    ours = AttentionRollout(model).attribute(**dict(data, drugs=data["drugs"][:, :2]))
    assert torch.equal(ours["conditions"], torch.tensor([[0.25, 0.75]]))
    assert torch.equal(ours["drugs"], ours["conditions"])


@pytest.mark.parametrize("name", ["set_attention_hooks", "get_attention_layers"])
def test_any_method_overridden_on_the_instance_is_called(name: str) -> None:
    model, data, calls = transformer("flat"), batch("flat"), []
    own = getattr(model, name)

    def spy(*args: Any) -> Any:
        calls.append(args)
        return own(*args)

    setattr(model, name, spy)
    wanted = result(Stock, transformer("flat"), data)
    assert_same(AttentionRollout(model).attribute(**data), wanted)
    assert calls == ([(True,), (False,)] if name == "set_attention_hooks" else [()])
    assert model._attention_hooks_enabled is False
    assert all(mha.attn_map is None for mha in model.modules() if hasattr(mha, "attn_map"))


class MeanOfRows(Transformer):
    """Reads the mean of all rows."""

    def get_relevance_tensor(self, R: dict[str, Tensor], **data: Any) -> dict[str, Tensor]:
        return {key: r.mean(1) for key, r in R.items()}


class LastRow(StageAttentionNet):
    """Reads the last row, padded or not, and has attention layers of its own order."""

    def get_attention_layers(self) -> Any:
        return dict(reversed(super().get_attention_layers().items()))

    def get_relevance_tensor(self, R: dict[str, Tensor], **data: Any) -> dict[str, Tensor]:
        return {key: r[:, -1] for key, r in R.items()}


@pytest.mark.parametrize(
    ("build", "cls", "kind"), [(transformer, MeanOfRows, "flat"), (stage_net, LastRow, "stagenet")]
)
def test_a_subclass_with_a_readout_of_its_own(build: Any, cls: type, kind: str) -> None:
    model, data = build(kind, cls=cls), batch(kind)
    wanted = result(Stock, model, data)
    assert_same(result(AttentionRollout, model, data), wanted)
    model.requires_grad_(False)
    with torch.inference_mode():
        ours, stock = both(model, data)
    assert isinstance(stock, RuntimeError)
    assert_same(ours, wanted)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("shared", ["streams", "depths"])
def test_shared_layers(shared: str) -> None:
    model, data = transformer("flat"), batch("flat")
    if shared == "streams":
        model.transformer["drugs"] = model.transformer["conditions"]
        data["drugs"] = data["conditions"].clamp(max=3)
    else:
        model.transformer["drugs"].transformer[0] = model.transformer["drugs"].transformer[2]
    assert_same(*both(model, data))


def test_attention_of_another_kind_and_a_replaced_forward() -> None:
    model, data = transformer("flat"), batch("flat")
    mha = model.transformer["drugs"].transformer[1].attention
    own = mha.attention.forward

    class Uniform(type(mha)):
        """A `MultiHeadedAttention` that makes its maps otherwise."""

        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, register_hook: bool = False
        ) -> Any:
            self.attn_map = torch.full((len(query), 2, query.shape[1], query.shape[1]), 1 / query.shape[1])
            return self.output_linear(value.mean(1, keepdim=True).expand_as(value))

    mha.attention.forward = lambda *args, **kwargs: own(*args, **dict(kwargs, mask=None))
    assert_same(*both(model, data))
    mha.__class__ = Uniform
    assert_same(*both(model, data))


class Renamed(Transformer):
    """Overrides nothing of the readout: the fast path serves it."""


def test_a_subclass_that_keeps_the_readout_takes_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = transformer("flat", cls=Renamed), batch("flat")
    wanted = result(Stock, model, data)
    monkeypatch.setattr("rollout.pyhealth.attention_rollout.protocol_maps", None)
    assert_same(AttentionRollout(model).attribute(**data), wanted)


def test_a_readout_of_pyhealths_own_that_stops_picking_a_row_gets_the_full_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if a later PyHealth read R otherwise: the probe finds out, and nothing is cached."""
    model, data = transformer("flat"), batch("flat")
    interpreter = AttentionRollout(model)
    own = interpreter.attribute(**data)
    model.get_relevance_tensor = lambda R, **data: {key: 0.5 * (r[:, 0] + r[:, 1]) for key, r in R.items()}
    changed = interpreter.attribute(**data)
    for key, maps in maps_of(model, data).items():
        wanted = naive_rollout(maps)[:, :2].mean(1)
        torch.testing.assert_close(changed[key].double(), wanted, atol=1e-6, rtol=0)
        assert float((changed[key] - own[key]).abs().max()) > 1e-2


# A third-party model that has the three methods and nothing else of PyHealth's.


@pytest.mark.parametrize("layers", [1, 3], ids="L{}".format)
def test_a_hook_only_model(layers: int) -> None:
    data = {"codes": codes(), "label": torch.ones(3)}
    model = HookOnly(layers)
    ours, stock = both(model, data)
    assert_same(ours, stock)
    assert model.calls[0] == ("hooks", True)
    assert model.calls[1] == ("hooks", False)
    torch.testing.assert_close(model.calls[2][1]["codes"], model.calls[5][1]["codes"], atol=1e-6, rtol=0)


def test_maps_whose_heads_are_fused_already() -> None:
    """[B, S, S] is in the contract; PyHealth's rollout takes its mean over rows instead of heads."""
    data, model = {"codes": codes()}, HookOnly(fused=True)
    ours, stock = both(model, data)
    model.set_attention_hooks(True)
    model(**data)
    maps = [attention.double() for attention in model.kept["codes"]]
    wanted = naive_rollout(maps, fuse=lambda a: a).mean(1)
    torch.testing.assert_close(ours["codes"].double(), wanted, atol=1e-6, rtol=0)
    assert isinstance(stock, Exception)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_hook_only_model_without_gradients_and_frozen(mode: Any) -> None:
    """Its hooks need gradients; they are switched on for the call only. The batch is made in the mode, too."""
    model = HookOnly()
    wanted = result(Stock, model, {"codes": codes()})
    model.requires_grad_(False)
    with mode():
        ours, stock = both(model, {"codes": codes()})
    assert isinstance(stock, RuntimeError)
    assert_same(ours, wanted)
    assert [parameter.requires_grad for parameter in model.parameters()] == [False] * 3
    assert [parameter.grad for parameter in model.parameters()] == [None] * 3


def test_a_hook_that_cannot_be_set_is_explained() -> None:
    with torch.inference_mode():
        model = HookOnly()
        with pytest.raises(RuntimeError, match="the attention hooks of HookOnly need gradients"):
            AttentionRollout(model).attribute(codes=codes())
    assert model.enabled is False


class WithoutFirst(HookOnly):
    """Leaves its first position out of what it gives back."""

    max_seq_len = 100

    def get_relevance_tensor(self, R: dict[str, Tensor], **data: Any) -> dict[str, Tensor]:
        return {key: r[:, 0, 1:] for key, r in R.items()}


def test_a_readout_of_another_length_is_left_alone() -> None:
    ours, stock = both(WithoutFirst(), {"codes": codes()})
    assert_same(ours, stock)
    assert ours["codes"].shape == (3, 4)


class Fails(HookOnly):
    """Fails in its forward pass, after the maps were made, or in its readout."""

    where = "forward"

    def forward(self, codes: Tensor, **data: Any) -> Tensor:
        super().forward(codes)
        if self.where == "forward":
            raise ZeroDivisionError
        return codes

    def get_relevance_tensor(self, R: dict[str, Tensor], **data: Any) -> dict[str, Tensor]:
        raise ZeroDivisionError


@pytest.mark.parametrize("where", ["forward", "readout"])
def test_a_hook_only_model_is_as_it_was_after_an_exception(where: str) -> None:
    model = Fails()
    model.where = where
    model.embedding.requires_grad_(False)
    earlier = model.kept = {"codes": [torch.ones(1)]}
    with pytest.raises(ZeroDivisionError):
        AttentionRollout(model).attribute(codes=codes())
    assert model.enabled is False
    assert model.kept is earlier
    assert torch.equal(earlier["codes"][0], torch.ones(1))
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True]


class KeepsInPlace(HookOnly):
    """Keeps its maps in a list that is never replaced, and the last one in an attribute that was not there before."""

    def forward(self, codes: Tensor, **data: Any) -> Tensor:
        out = super().forward(codes)
        if self.enabled:
            self.history["codes"].extend(self.kept["codes"])
            self.newest = self.kept["codes"][-1]
            self.kept = {}
        return out

    def get_attention_layers(self) -> Any:
        return {key: [(attention, None) for attention in maps] for key, maps in self.history.items()}


def test_no_map_is_kept_in_place_either() -> None:
    model = KeepsInPlace()
    model.history = {"codes": []}
    assert AttentionRollout(model).attribute(codes=codes())["codes"].shape == (3, 5)
    assert "newest" not in vars(model)
    assert model.kept == {}


class GradientFree(HookOnly):
    """The contract to come: hooks that may be told not to capture gradients."""

    def set_attention_hooks(self, enabled: bool, capture_gradients: bool = True) -> None:
        self.calls.append((enabled, capture_gradients))
        self.enabled, self.capture = enabled, capture_gradients

    def _layer(self, projection: Any, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not self.capture
        q, k = projection(x).unflatten(-1, (2 * self.heads, -1)).transpose(1, 2).chunk(2, 1)
        attention = (4 * q @ k.transpose(-1, -2)).softmax(-1)
        self.kept["codes"].append(attention)
        return x + attention.mean(1) @ x


def test_hooks_that_take_capture_gradients_are_told_not_to() -> None:
    model = GradientFree()
    ours = AttentionRollout(model).attribute(codes=codes())
    assert_same(ours, result(Stock, HookOnly(), {"codes": codes()}))
    assert model.calls[0] == (True, False)
    assert model.calls[1][0] is False


class Plain:
    """Not even a module: maps made by hand, [[1, 0], [1, 0]] in each of two layers; it reads row 1."""

    def __init__(self, layers: Any) -> None:
        self.layers, self.enabled = layers, False

    def set_attention_hooks(self, enabled: bool) -> None:
        self.enabled = enabled

    def get_attention_layers(self) -> Any:
        return self.layers

    def get_relevance_tensor(self, R: dict[str, Tensor], **data: Any) -> dict[str, Tensor]:
        return {key: r[:, 1] for key, r in R.items()}

    def __call__(self, **data: Any) -> None:
        assert self.enabled


def test_an_object_that_is_no_module() -> None:
    attention = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).view(1, 1, 2, 2)
    ours, stock = both(Plain({"x": [(attention, None)] * 2}), {"x": torch.ones(1, 2)})
    assert_same(ours, stock)
    assert torch.equal(ours["x"], torch.tensor([[0.75, 0.25]]))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"x": [(None, None)]}, "must give a map for every layer of feature 'x', got None"),
        ({"x": []}, "must give at least one layer for feature 'x', got none"),
    ],
    ids=["None", "no layers"],
)
def test_maps_that_are_missing(layers: Any, message: str) -> None:
    model = Plain(layers)
    ours, stock = both(model, {"x": torch.ones(1, 2)})
    assert type(ours) is type(stock) is RuntimeError
    assert message in str(ours)
    assert model.enabled is False


def test_a_transformer_without_layers() -> None:
    ours, stock = both(transformer("flat", num_layers=0), batch("flat"))
    assert type(ours) is type(stock) is RuntimeError
    assert "feature 'conditions'" in str(ours)


def test_readout_forward_is_refused_for_a_model_that_is_not_pyhealths() -> None:
    with pytest.raises(ValueError, match=r"readout='forward' needs PyHealth's own .* got HookOnly"):
        AttentionRollout(HookOnly(), readout="forward").attribute(codes=codes())
