"""How `rollout.pyhealth.AttentionRollout` runs: without gradients, in every dtype, and leaving nothing on the model."""

import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("pyhealth", reason="the PyHealth drop-in needs the pyhealth extra")

import rollout
from rollout.pyhealth import AttentionRollout
from tests.support.pyhealth_models import (
    Stock,
    assert_same,
    batch,
    both,
    maps_of,
    naive_rollout,
    result,
    stage_net,
    transformer,
    valid,
    values,
)

# How it runs.


@pytest.mark.parametrize("build", [transformer, stage_net])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(build: Any, mode: Any) -> None:
    model, data = build("stagenet"), batch("stagenet")
    wanted = result(Stock, model, data)
    with mode():
        ours, stock = both(model, data)
    assert isinstance(stock, RuntimeError)
    assert_same(ours, wanted)


@pytest.mark.parametrize("build", [transformer, stage_net])
def test_frozen_parameters(build: Any) -> None:
    model, data = build("stagenet"), batch("stagenet")
    wanted = result(Stock, model, data)
    model.requires_grad_(False)
    ours, stock = both(model, data)
    assert isinstance(stock, RuntimeError)
    assert_same(ours, wanted)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_float64_and_bfloat16() -> None:
    data = batch("flat")
    assert_same(*both(transformer("flat").double(), data), tolerance=1e-12)
    model = transformer("flat").bfloat16()
    ours, stock = both(model, data)
    assert_same(ours, stock, tolerance=2**-6)
    for key, maps in maps_of(model, data).items():
        torch.testing.assert_close(ours[key].double(), naive_rollout(maps)[:, 0], atol=1e-9, rtol=2**-8)


def test_bfloat16_autocast() -> None:
    model, data = transformer("flat"), batch("flat")
    with torch.autocast("cpu", torch.bfloat16):
        ours, stock = both(model, data)
    assert ours["drugs"].dtype == torch.bfloat16
    assert_same(ours, stock, tolerance=2**-6)


def test_float16_where_the_model_itself_overflows() -> None:
    model, data = transformer("flat"), batch("flat")
    wanted = result(Stock, model, data)
    ours, stock = both(model.half(), data)
    assert isinstance(stock, RuntimeError)
    assert "overflow" in str(stock)
    for key in wanted:
        assert ours[key].dtype == torch.float16
        torch.testing.assert_close(ours[key].float(), wanted[key], atol=2e-2, rtol=0)
    with torch.autocast("cpu", torch.float16), pytest.raises(RuntimeError, match="float16 cannot hold"):
        AttentionRollout(model.float()).attribute(**data)


def test_the_result_is_an_ordinary_tensor_that_keeps_nothing_alive() -> None:
    model, data = transformer("flat"), batch("flat")
    for key, scores in AttentionRollout(model).attribute(**data).items():
        assert not scores.is_inference()
        assert not scores.requires_grad
        assert scores.untyped_storage().nbytes() == 4 * data[key].numel()
        before = scores.clone()
        scores.mul_(2.0)
        torch.testing.assert_close(scores, 2 * before)


@pytest.fixture
def chained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the interpreter hands to the chain: rows, and the shapes of Q; it must not still hold what came before."""
    seen: list[dict[str, Any]] = []
    kept: list[Any] = []

    def spy(queries: list[Tensor], keys: list[Tensor], *, query: Any, **options: Any) -> Tensor:
        assert [ref() for ref in kept] == [None] * len(kept), "queries of an earlier call are still alive"
        kept.extend(weakref.ref(q) for q in (*queries, *keys))
        seen.append({"query": query, "shape": tuple(queries[0].shape), "layers": len(queries), **options})
        return rollout.attention_rollout_qk(queries, keys, query=query, **options)

    monkeypatch.setattr("rollout.pyhealth.fused.attention_rollout_qk", spy)
    return seen


def test_only_the_row_that_is_read_is_computed(chained: list[dict[str, Any]]) -> None:
    model = transformer("flat")
    with model.transformer["drugs"].register_forward_hook(lambda *args: None):
        AttentionRollout(model).attribute(**batch("flat"))
    assert [len(call["query"]) for call in chained] == [6, 6]
    assert all(not call["query"].any() for call in chained)
    assert {call["layers"] for call in chained} == {3}
    chained.clear()
    data = batch("stagenet")
    AttentionRollout(stage_net("stagenet")).attribute(**data)
    (call,) = chained
    assert call["query"].tolist() == (valid(values(data, "visits")).sum(1) - 1).tolist()


def test_no_map_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyHealth's own attention does not run: where it is another's forward, rows are not merged either."""
    for build, kind in ((transformer, "flat"), (stage_net, "stagenet")):
        model, data = build(kind), batch(kind)
        wanted = result(Stock, model, data)
        with monkeypatch.context() as patch:
            patch.setattr("pyhealth.models.transformer.Attention.forward", None)
            assert_same(AttentionRollout(model).attribute(**data), wanted)


# Nothing is left on the model.


def footprint(model: Any) -> Any:
    """Everything a call could leave behind: hooks, plain attributes, flags, gradients, values."""
    return [
        (
            {
                name: len(hooks)
                for name, hooks in vars(module).items()
                if name.endswith("hooks") and hasattr(hooks, "__len__")
            },
            {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str | None)},
            {name: id(value) for name, value in vars(module).items() if isinstance(value, Tensor)},
        )
        for module in model.modules()
    ] + [(p.requires_grad, id(p.grad), p._version) for p in model.parameters()]


class Boom(Exception):
    """Raised inside a model."""


@pytest.mark.parametrize("build", [transformer, stage_net])
def test_nothing_is_left(build: Any) -> None:
    model, data = build("stagenet").eval(), batch("stagenet")
    model(**data)["loss"].backward()
    model.embedding_model.requires_grad_(False)
    before, gradients = footprint(model), [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    kept: list[Any] = []
    attention = (
        model.transformer["visits"].transformer[0].attention if build is transformer else model.stagenet["visits"].mha
    )
    with attention.attention.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output[1]))):
        AttentionRollout(model).attribute(**data)
    assert footprint(model) == before
    assert torch.equal(torch.get_rng_state(), state), "random numbers were drawn from the global generator"
    assert [ref() for ref in kept] == [None], "the map is still alive"
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("where", ["forward", "layer", "readout"])
@pytest.mark.parametrize("build", [transformer, stage_net])
def test_nothing_is_left_after_an_exception(build: Any, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build("stagenet").eval(), batch("stagenet")

    def boom(*args: Any, **kwargs: Any) -> Any:
        raise Boom

    if where == "readout":
        monkeypatch.setattr("rollout.pyhealth.fused.attention_rollout_qk", boom)
        monkeypatch.setattr("rollout.pyhealth.merged.encode.Run.chain", boom)
        before = footprint(model)
    else:
        handle = (model.fc if where == "forward" else model.embedding_model).register_forward_hook(boom)
        before = footprint(model)
    with pytest.raises(Boom):
        AttentionRollout(model).attribute(**data)
    assert footprint(model) == before
    monkeypatch.undo()
    if where != "readout":
        handle.remove()
    assert_same(*both(model, data))


@pytest.mark.parametrize("build", [transformer, stage_net])
def test_hooks_that_are_on_are_off_for_the_call_and_on_again(build: Any) -> None:
    model, data = build("stagenet"), batch("stagenet")
    wanted = result(Stock, model, data)
    model.set_attention_hooks(True)
    assert_same(AttentionRollout(model).attribute(**data), wanted)
    assert model._attention_hooks_enabled is True


def test_a_call_from_inside_a_forward_pass() -> None:
    """An inner call on other data, from a hook between the outer call's layers, disturbs neither."""
    model, data = transformer("flat"), batch("flat")
    other = {key: value[:2] if isinstance(value, Tensor) else value for key, value in data.items()}
    interpreter = AttentionRollout(model)
    block = model.transformer["drugs"].transformer[1]
    with block.register_forward_hook(lambda *args: None):  # a layer with a hook is run on the whole batch
        wanted, wanted_inner = interpreter.attribute(**data), interpreter.attribute(**other)
    inner: list[dict[str, Tensor]] = []

    def reenter(*args: Any) -> None:
        if not inner:
            inner.append({})
            inner[0].update(interpreter.attribute(**other))

    with block.register_forward_hook(reenter):
        outer = interpreter.attribute(**data)
    for key in wanted:
        assert torch.equal(outer[key], wanted[key])
        assert torch.equal(inner[0][key], wanted_inner[key])


def test_two_threads_share_a_model() -> None:
    model, data = transformer("flat"), batch("flat")
    batches = [{k: v[i : i + 3] if isinstance(v, Tensor) else v for k, v in data.items()} for i in range(3)]
    interpreter = AttentionRollout(model)
    wanted = [interpreter.attribute(**part) for part in batches]
    got: list[list[dict[str, Tensor]]] = [[] for _ in batches]

    def work(i: int) -> None:
        got[i].extend(interpreter.attribute(**batches[i]) for _ in range(10))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answers, right in zip(got, wanted, strict=True):
        assert len(answers) == 10
        for answer in answers:
            for key in right:
                assert torch.equal(answer[key], right[key])
