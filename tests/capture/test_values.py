"""`capture(model, values=True)` beside the papers' formulas on maps, values, W_O and residuals taken by hand."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import rollout
from rollout.errors import CaptureError
from rollout.tape import Record
from tests.support.capture_state import assert_nothing_left, state
from tests.support.capture_values import KNOWN, REFUSED, B, E, H, Layer, S, Stack, Taken, agree, merge
from tests.support.cases import generator, same_bits

PADDED = torch.arange(S) >= torch.tensor([[S], [4]])


def given(seed: int = 1) -> Tensor:
    return torch.randn(B, S, E, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", KNOWN)
def test_layers_of_ones_own(name: str) -> None:
    ending, of_weights, of_inputs = KNOWN[name]
    model, layers = Stack(ending), list[Taken]()
    x = given()
    before = state(model)
    with torch.no_grad():
        plain = model(x, layers)
        for attempt in range(2):  # the first is looked at, the second is not
            with rollout.capture(model, values=True) as tape:
                output = model(x)
            assert same_bits(output, plain), attempt
            for layer, taken in zip(model.layers, layers, strict=True) if not attempt else ():
                taken.weights, taken.inputs = taken.weights * of_weights(layer), taken.inputs * of_inputs
            agree(tape, layers)
    assert_nothing_left(model, before)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    ending, message = REFUSED[name]
    model = Stack(ending)
    before = state(model)
    for _ in range(2):
        with (
            torch.no_grad(),
            pytest.raises(CaptureError, match=f"Layer at layers.0 .*{message}"),
            rollout.capture(model, values=True),
        ):
            model(given())
    assert_nothing_left(model, before)
    with torch.no_grad(), rollout.capture(model, allow="attention_layers_only") as tape:
        model(given())
    assert tape.layers()[0].inputs is None


def test_another_call_has_its_own() -> None:
    """The second call is not looked at, and a plain capture before it says nothing of what values need."""
    ending, _, _ = KNOWN["pre-LN"]
    model = Stack(ending)
    with torch.no_grad():
        with rollout.capture(model) as tape:
            model(given())
        with pytest.raises(ValueError, match=r"'kobayashi' needs values, W_O and residuals: .*values=True"):
            tape.rollout(0, method="kobayashi")
        for seed in (1, 2):
            layers: list[Taken] = []
            with rollout.capture(model, values=True) as tape:
                model(given(seed))
            model(given(seed), layers)
            agree(tape, layers)


def test_a_later_call_that_does_something_else_is_refused() -> None:
    gated = [False]
    model = Stack(lambda at, x, o: x + (at.inner(at.proj(merge(o))) if gated[0] else at.proj(merge(o))))
    with torch.no_grad(), rollout.capture(model, values=True):
        model(given())
        gated[0] = True
        with pytest.raises(CaptureError, match="hands W_O·o to layer_norm"):
            model(given())


def test_nothing_is_kept_that_was_not_asked_for() -> None:
    model = Stack(KNOWN["pre-LN"][0])
    sizes = []
    for asked in (False, True):
        with torch.no_grad(), rollout.capture(model, values=asked) as tape:
            model(given())
        for record in tape.layers():
            assert [(part is not None) for part in (record.values, record.output_weights, record.inputs)] == [asked] * 3
        sizes.append(tape.nbytes)
    # Queries, keys and values are views of one tensor.
    assert sizes[1] - sizes[0] == 3 * 8 * (E * E + B * S * E)


def test_a_weight_changed_since_is_refused() -> None:
    model = Stack(KNOWN["pre-LN"][0])
    with torch.no_grad(), rollout.capture(model, values=True) as tape:
        model(given())
        model.layers[1].proj.weight.mul_(2.0)
    with pytest.raises(ValueError, match="attended with must be as it was recorded, it was changed in place since"):
        tape.rollout(0, method="value_norm")


def test_nested_in_threads_and_after_an_error() -> None:
    model = Stack(KNOWN["in place"][0])
    layers: list[Taken] = []
    before = state(model)
    with torch.no_grad():
        model(given(), layers)
        with rollout.capture(model) as outer, rollout.capture(model, values=True) as inner:
            model(given())
    agree(inner, layers)
    assert outer.layers()[0].inputs is None
    found: dict[int, Any] = {}

    def run(seed: int) -> None:
        with torch.no_grad(), rollout.capture(model, values=True) as tape:
            model(given(seed))
        found[seed] = tape

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    agree(found[1], layers)
    assert not torch.equal(found[1].layers()[0].inputs, found[2].layers()[0].inputs)
    with torch.no_grad(), rollout.capture(model, values=True) as tape:
        with pytest.raises(RuntimeError):
            model(torch.ones(B, S, E + 1).double())
        model(given())
    agree(tape, layers)
    assert_nothing_left(model, before)


def test_with_gradients() -> None:
    model, layers = Stack(KNOWN["pre-LN"][0]), list[Taken]()
    with rollout.capture(model, values=True, gradients=True) as tape:
        target = model(given())[:, 0].tanh().sum()
    tape.take_gradients(target)
    model(given(), layers)
    agree(tape, layers)
    with rollout.capture(model, gradients=True) as other:
        target = model(given())[:, 0].tanh().sum()
    other.take_gradients(target)
    (ours,), (wanted,) = (each.rollout(0, method="chefer").values() for each in (tape, other))
    assert torch.equal(ours, wanted)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_function_of_ones_own_is_refused() -> None:
    def read(module: nn.Module, x: Tensor, kept: None) -> Record:
        q, k, _ = module.qkv(module.norm(x)).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
        return Record(queries=q, keys=k)

    model = Stack(KNOWN["pre-LN"][0])
    rollout.register_capture(Layer, read)
    try:
        with (
            torch.no_grad(),
            pytest.raises(CaptureError, match=r"hands on, and that of Layer at layers.0 is not known"),
            rollout.capture(model, values=True),
        ):
            model(given())
    finally:
        rollout.register_capture(Layer, None)


# torch.nn's own.


def encoder(norm_first: bool, batch_first: bool = True) -> nn.TransformerEncoder:
    torch.manual_seed(4)
    layer = nn.TransformerEncoderLayer(E, H, 12, norm_first=norm_first, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=batch_first and not norm_first).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def written_out(model: nn.TransformerEncoder, x: Tensor, padded: Tensor | None) -> list[Taken]:
    """Its layers on [B, S, E], as its documentation says they are."""
    found = []
    for layer in model.layers:
        mha, state = layer.self_attn, layer.norm1(x) if layer.norm_first else x
        joint = functional.linear(state, mha.in_proj_weight, mha.in_proj_bias)
        q, k, v = joint.unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        maps = (scores if padded is None else scores.masked_fill(padded[:, None, None], -torch.inf)).softmax(-1)
        found.append(Taken(maps, v, mha.out_proj.weight.T.reshape(H, -1, E), x))
        total = x + mha.out_proj(merge(maps @ v))
        state = layer.norm2(total) if layer.norm_first else layer.norm1(total)
        after = (total if layer.norm_first else state) + layer.linear2(layer.linear1(state).relu())
        x = after if layer.norm_first else layer.norm2(after)
    return found


@pytest.mark.parametrize("padded", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("path", ["fast", "in autograd", "S-B-E"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-LN", "post-LN"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torch_encoder(norm_first: bool, path: str, padded: Tensor | None) -> None:
    model, x = encoder(norm_first, path != "S-B-E"), given()
    source = x if path != "S-B-E" else x.transpose(0, 1)
    with torch.set_grad_enabled(path != "fast"):
        plain = model(source, src_key_padding_mask=padded)
        with rollout.capture(model, values=True) as tape:
            output = model(source, src_key_padding_mask=padded)
    assert same_bits(output, plain)
    agree(tape, written_out(model, x, padded), None if padded is None else [S, 4])


class Own(nn.Module):
    """A layer of one's own around torch's attention."""

    def __init__(self, norm_first: bool, batch_first: bool) -> None:
        super().__init__()
        self.layers = encoder(norm_first, batch_first).layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            state = layer.norm1(x) if layer.norm_first else x
            total = x + layer.dropout1(layer.self_attn(state, state, state, need_weights=False)[0])
            state = layer.norm2(total) if layer.norm_first else layer.norm1(total)
            after = (total if layer.norm_first else state) + layer.linear2(layer.linear1(state).relu())
            x = after if layer.norm_first else layer.norm2(after)
        return x


@pytest.mark.parametrize("batch_first", [True, False], ids=["B-S-E", "S-B-E"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-LN", "post-LN"])
def test_torch_attention_in_layers_of_ones_own(norm_first: bool, batch_first: bool) -> None:
    model, x = Own(norm_first, batch_first), given()
    with torch.no_grad(), rollout.capture(model, values=True) as tape:
        model(x if batch_first else x.transpose(0, 1))
    agree(tape, written_out(model, x, None))


class Stacked(Own):
    """W_O·o goes through a second attention before it is added."""

    def forward(self, x: Tensor) -> Tensor:
        first, second, _ = (layer.self_attn for layer in self.layers)
        output = first(x, x, x, need_weights=False)[0]
        return x + output + second(output, output, output, need_weights=False)[0]


def test_what_goes_into_another_attention_is_refused() -> None:
    model = Stacked(norm_first=True, batch_first=True)
    with (
        torch.no_grad(),
        pytest.raises(CaptureError, match=r"layers.0.self_attn hands what it gives to MultiheadAttention"),
        rollout.capture(model, values=True),
    ):
        model(given())


def test_an_encoder_layer_with_parts_of_others_is_refused() -> None:
    for grad, message in ((True, "was not seen to be added"), (False, "runs fused with parts that are not its own")):
        model = encoder(norm_first=True)
        model.layers[1].dropout1 = nn.Hardtanh(-0.1, 0.1)
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(CaptureError, match=f"MultiheadAttention at layers.1.self_attn.*{message}"),
            rollout.capture(model, values=True),
        ):
            model(given())


def test_of_cross_attention_nothing_is_measured() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(E, H, 2, 2, 12, batch_first=True).double().eval()
    with rollout.capture(model, values=True, cross_attention=True) as tape:
        model(given(), given(2))
    for stream in tape.streams:
        assert all(record.inputs is not None for record in tape.layers(stream))
    decoder = copy.deepcopy(model.decoder.layers[0].self_attn)
    assert torch.equal(tape.layers("decoder.layers")[0].output_weights, decoder.out_proj.weight.T.reshape(H, E // H, E))
    assert torch.equal(tape.layers("decoder.layers")[0].inputs, given(2))
    with pytest.raises(ValueError, match="'value_norm' needs values, output weights and inputs"):
        tape.encoder_decoder_rollout(method="value_norm")
