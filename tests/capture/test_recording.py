"""`rollout.capture` and `register_capture`: numbers, what is left behind, what is refused."""

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rollout
from rollout import Method, Record
from rollout.tape import Tape
from tests.support.capture_models import ROLLOUT, B, Cousin, E, Mixer, Model, S, expected, model_and_input, read_mixer
from tests.support.capture_state import assert_nothing_left, state
from tests.support.cases import random_weights, same_bits
from tests.support.oracles import assert_close, rollout_matrices, take_rows


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    rollout.register_capture(Mixer, read_mixer)
    yield
    rollout.register_capture(Mixer, None)


def test_numbers_of_every_form():
    model, x, mask = model_and_input()
    for given in (None, mask):
        plain = model(x, mask=given)
        with rollout.capture(model) as tape, torch.inference_mode():
            output = model(x, mask=given)
        assert same_bits(output.clone(), plain.detach())
        full = expected(model)
        for query in (None, 0, -1, torch.tensor([2, 0, 1]), random_weights(B, S), random_weights(B, 2, S)):
            result = tape.rollout(query)
            assert list(result) == ["blocks"]
            ends = [6, 4, 3] if given is mask and isinstance(query, int) else None
            assert_close(result["blocks"], take_rows(full, query, ends), "qk")
        for method in ("pyhealth", "chefer_rollout", Method(head_fusion="max"), Method(start_layer=2)):
            matrices = rollout_matrices([b.maps[0] for b in model.blocks], rollout.method.get_method(method))
            for backend in ("torch", "reference"):
                assert_close(tape.rollout(0, method=method, backend=backend)["blocks"], matrices[:, 0], "qk")


def test_maps_on_demand():
    model, x, mask = model_and_input()
    with rollout.capture(model) as tape:
        model(x, mask=mask)
    for layer in (0, 2, -1):
        assert_close(tape.maps(layer), model.blocks[layer].maps[0], "qk")
        assert_close(tape.maps(layer, "blocks"), model.blocks[layer].maps[0], "qk")
    for layer in (3, -4):
        with pytest.raises(IndexError, match=r"Tape.maps: layer must be one of the stream's 3 layers, got"):
            tape.maps(layer)
    with pytest.raises(KeyError, match=r"stream must name one of the streams \['blocks'\]"):
        tape.maps(0, "other")


def test_tape_stays_after_the_block_and_frees():
    model, x, _ = model_and_input()
    with rollout.capture(model) as tape:
        model(x)
        inside = tape.rollout(0)["blocks"]
    assert same_bits(tape.rollout(0)["blocks"], inside)
    per_layer = 2 * B * S * E * 8
    assert tape.nbytes == 3 * per_layer
    assert tape.modules() == ("blocks.0", "blocks.1", "blocks.2")
    held = [weakref.ref(layer.queries) for layer in tape.layers()]
    tape.clear()
    assert tape.nbytes == 0
    assert all(ref() is None for ref in held)
    with pytest.raises(ValueError, match=r"Tape.rollout: the tape must hold a forward pass"):
        tape.rollout(0)
    with rollout.capture(model) as tape:
        model(x)
    held = [weakref.ref(layer.keys) for layer in tape.layers()]
    del tape
    assert all(ref() is None for ref in held)


def test_the_model_can_be_freed():
    model, x, _ = model_and_input()
    with rollout.capture(model) as tape:
        model(x)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    assert tape.rollout(0)["blocks"].shape == (B, S)


def test_memory_two_records_share_counts_once():
    both = torch.randn(2, 5, 2, 2, 4)
    record = Record(queries=both[:, :, 0].transpose(1, 2), keys=both[:, :, 1].transpose(1, 2))
    tape = Tape()
    tape.add("a", "x", record)
    tape.add("a", "y", record)
    assert tape.nbytes == both.numel() * 4
    assert repr(tape) == "Tape(a: 2 layers; 640 bytes)"


def quiet(model: nn.Module) -> dict[str, Any]:
    """The model's state without what the models here keep for the tests."""
    return {k: v for k, v in state(model).items() if not k.endswith((":maps", ":fail"))}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nothing_is_left_after_success(mode: Any):
    model, x, mask = model_and_input()
    before = quiet(model)
    with rollout.capture(model) as tape, mode():
        output = model(x, mask=mask)
    assert quiet(model) == before
    assert not any(t.requires_grad for layer in tape.layers() for t in layer.tensors())
    assert output.requires_grad == (mode is torch.enable_grad)
    assert_close(tape.rollout(0)["blocks"], expected(model)[:, 0], "qk")


def test_nothing_is_left_after_errors():
    model, x, _ = model_and_input()
    before = quiet(model)
    model.fail = True
    with pytest.raises(RuntimeError, match=r"the model raises"), rollout.capture(model) as tape:
        model(x)
    assert len(tape.layers()) == 3  # what ran before is there
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied"), rollout.capture(model):
        model(x[..., :3])
    with pytest.raises(TypeError), rollout.capture(model):
        model()
    with pytest.raises(KeyboardInterrupt), rollout.capture(model):
        raise KeyboardInterrupt
    model.fail = False
    assert quiet(model) == before
    with rollout.capture(model) as tape:
        model(x)
    assert_close(tape.rollout(0)["blocks"], expected(model)[:, 0], "qk")
    assert quiet(model) == before


def test_an_instance_forward_is_put_back():
    model, x, _ = model_and_input()
    calls = []
    own = model.blocks[1].forward
    replaced = lambda *args, **kwargs: (calls.append(1), own(*args, **kwargs))[1]  # noqa: E731
    model.blocks[1].forward = replaced
    with rollout.capture(model) as tape:
        model(x)
    assert model.blocks[1].forward is replaced
    assert "forward" not in vars(model.blocks[0])
    assert calls == [1]
    assert_close(tape.rollout(0)["blocks"], expected(model)[:, 0], "qk")


def test_nested_reentered_and_second_calls():
    model, x, mask = model_and_input()
    before = quiet(model)
    with rollout.capture(model) as outer:
        model(x)
        first = outer.rollout(0)["blocks"]
        with rollout.capture(model) as inner:
            model(x, mask=mask)
        assert_close(inner.rollout(0)["blocks"], expected(model)[:, 0], "qk")
        assert same_bits(outer.rollout(0)["blocks"], inner.rollout(0)["blocks"])  # a second call replaces the first
        assert not torch.equal(first, inner.rollout(0)["blocks"])
        model(x)
        assert same_bits(outer.rollout(0)["blocks"], first)
        assert not torch.equal(inner.rollout(0)["blocks"], first)  # closed: it keeps what it has
    with rollout.capture(model.blocks[1]) as part, rollout.capture(model) as whole:
        model(x)
    assert part.modules() == ("",)
    assert same_bits(part.layers()[0].queries, whole.layers()[1].queries)
    again = rollout.capture(model)
    with again as one:
        model(x)
        with again as two:
            model(x, mask=mask)
    with again as three:
        pass
    assert one is not two
    assert same_bits(one.rollout(0)["blocks"], two.rollout(0)["blocks"])
    assert three.streams == ()
    assert quiet(model) == before


def test_another_model_in_the_block_is_not_recorded():
    model, x, _ = model_and_input()
    other = Model().double().eval()
    with rollout.capture(model) as tape:
        model(x)
        other(x)
    assert len(tape.layers()) == 3
    assert_close(tape.rollout(0)["blocks"], expected(model)[:, 0], "qk")


def test_each_thread_records_its_own():
    model, x, mask = model_and_input()
    before = quiet(model)
    inputs = [x + i for i in range(4)]
    alone = []
    for one in inputs:
        with rollout.capture(model) as tape:
            model(one)
        alone.append(tape.rollout(0)["blocks"])
    barrier, results, stray = threading.Barrier(5), [None] * 4, []

    def work(i: int) -> None:
        barrier.wait()
        for _ in range(10):
            with rollout.capture(model) as tape, torch.inference_mode():
                model(inputs[i])
            results[i] = tape.rollout(0)["blocks"]

    def bystander() -> None:
        barrier.wait()
        for _ in range(40):
            stray.append(model(x, mask=mask).detach())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)] + [threading.Thread(target=bystander)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_bits(result, wanted) for result, wanted in zip(results, alone, strict=True))
    plain = model(x, mask=mask).detach()
    assert len(stray) == 40
    assert all(same_bits(output, plain) for output in stray)
    assert quiet(model) == before


def test_a_thread_that_does_not_capture_is_not_recorded():
    model, x, mask = model_and_input()
    with rollout.capture(model) as tape:
        thread = threading.Thread(target=lambda: model(x, mask=mask))
        thread.start()
        thread.join()
        assert tape.streams == ()
        with pytest.raises(ValueError, match=r"no attention module ran in this thread"):
            tape.rollout(0)


def test_registered_function():
    model, x, _ = model_and_input()
    rollout.register_capture(Mixer, None)
    with rollout.capture(model) as tape:  # it is written out with torch, so it is seen without a function
        model(x)
    assert_close(tape.rollout(0)["blocks"], expected(model)[:, 0], "qk")
    rollout.register_capture(Mixer, lambda module, x, mask=None: None)
    with (
        pytest.raises(rollout.CaptureError, match=r"left out, .* by the function registered for it: blocks.0,"),
        rollout.capture(model),
    ):
        model(x)
    rollout.register_capture(Mixer, lambda module, x, mask=None: (x, x))
    with (
        pytest.raises(
            TypeError, match=r"register_capture: the function of Mixer must return a rollout.Record or None, got tuple"
        ),
        rollout.capture(model),
    ):
        model(x)
    for wrong in (int, "Mixer", model):
        with pytest.raises(TypeError, match=r"module_type must be a subclass of torch.nn.Module"):
            rollout.register_capture(wrong, read_mixer)
    with pytest.raises(TypeError, match=r"function must be callable, got int"):
        rollout.register_capture(Mixer, 3)
    rollout.register_capture(Mixer, read_mixer)
    derived = Model(2, Cousin).double().eval()
    with rollout.capture(derived) as tape:
        derived(x)
    assert_close(tape.rollout(0)["blocks"], expected(derived)[:, 0], "qk")


def test_unknown_attention_is_named():
    class WindowAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.roll(1, 1)

    model = nn.Sequential(nn.Linear(3, 3), *[WindowAttention() for _ in range(10)]).eval()
    with (
        pytest.raises(rollout.CaptureError, match=r"WindowAttention at 1 ran, and no softmax attention of it was seen"),
        rollout.capture(model),
    ):
        model(torch.ones(1, 2, 3))
    with pytest.raises(rollout.CaptureError, match=r"none was seen: .*register_capture"), rollout.capture(model[0]):
        model[0](torch.ones(1, 2, 3))
    with pytest.raises(TypeError, match=r"capture: model must be a torch.nn.Module, got function"):
        rollout.capture(expected)
    with pytest.raises(ValueError, match=r"capture: allow must be None or 'attention_layers_only', got 'mixing'"):
        rollout.capture(model, allow="mixing")


def test_streams_of_mixed_attention_are_refused():
    class OtherAttention(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return x

    model, x, _ = model_and_input()
    model.blocks.append(OtherAttention())
    before = quiet(model)
    with (
        pytest.raises(rollout.CaptureError, match=r"OtherAttention at blocks.3 ran, and no softmax attention of it"),
        rollout.capture(model),
    ):
        model(x)
    assert quiet(model) == before


def test_a_module_that_attends_twice():
    class Universal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Mixer()

        def forward(self, x: Tensor) -> Tensor:
            self.every = []
            for _ in range(3):
                x = self.block(x)
                self.every.append(self.block.maps[0])
            return x

    torch.manual_seed(0)
    model, x = Universal().double().eval(), random_weights(B, S, E).double()
    with (
        pytest.raises(
            rollout.CaptureError, match=r"must attend once in a call of the model, block did twice.*shared_layers=True"
        ),
        rollout.capture(model),
    ):
        model(x)
    with rollout.capture(model, shared_layers=True) as tape:
        model(x)
    assert_close(tape.rollout(0)["layers"], rollout_matrices(model.every, ROLLOUT)[:, 0], "qk")


def test_a_part_called_alone():
    model, x, _ = model_and_input()
    with rollout.capture(model) as tape:
        model.blocks[0](x)
        assert tape.streams == ()
        model(x)
        model.blocks[0](x)
    assert_close(tape.rollout(0)["blocks"], expected(model)[:, 0], "qk")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_dropout_compiled_and_scripted_models_are_refused():
    model, x, _ = model_and_input()
    model.drop = nn.Dropout(0.3)
    model.train()
    before = quiet(model)
    with (
        pytest.raises(
            rollout.CaptureError, match=r"must be in eval mode, got dropout 0.3 on in Dropout at drop: call model.eval"
        ),
        rollout.capture(model),
    ):
        pass
    model.eval()
    with rollout.capture(model):
        model.train()
        with pytest.raises(rollout.CaptureError, match=r"eval mode"):
            model(x)
    model.drop.p = 0.0
    with rollout.capture(model) as tape:  # training mode without dropout is the same model
        model(x)
    assert_close(tape.rollout(0)["blocks"], expected(model)[:, 0], "qk")
    model.drop.p = 0.3
    assert quiet(model) == before
    model.eval()
    with (
        pytest.raises(rollout.CaptureError, match=r"must not be compiled, got OptimizedModule"),
        rollout.capture(torch.compile(model)),
    ):
        pass
    parallel = nn.DataParallel(model)
    parallel.device_ids = [0, 1]
    with pytest.raises(rollout.CaptureError, match=r"got DataParallel at the root.*take and call its .module"):
        rollout.capture(parallel).__enter__()
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(rollout.CaptureError, match=r"must run as Python"), rollout.capture(scripted):
        pass


@pytest.mark.parametrize("name", ["chefer", "grad_rollout", "product"])
def test_methods_that_need_maps_say_so(name: str):
    model, x, _ = model_and_input()
    with rollout.capture(model) as tape:
        model(x)
    with pytest.raises(
        ValueError, match=rf"Tape.rollout: method must form M_l from Q and K alone; '{name}' needs .*attention_rollout"
    ):
        tape.rollout(0, method=name)
    with pytest.raises(ValueError, match=r"method must be one of"):
        tape.rollout(0, method="other")


def test_state_helper_sees_what_is_left():
    """The check of leftovers itself fails when something is left."""
    model, _, _ = model_and_input()
    for change in (
        lambda: model.blocks[0].register_forward_hook(print),
        lambda: setattr(model.blocks[1], "forward", print),
        lambda: setattr(model, "flag", True),
        lambda: model.train(),
    ):
        before = state(model)
        change()
        with pytest.raises(AssertionError):
            assert_nothing_left(model, before)
