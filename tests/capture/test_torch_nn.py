"""Capture of torch.nn.MultiheadAttention and its users: encoders (fused and nested paths too)."""

import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rollout
from tests.support.capture_state import assert_nothing_left, state
from tests.support.cases import generator, same_bits
from tests.support.oracles import assert_close, rollout_matrices, take_rows

ROLLOUT = rollout.METHODS["rollout"]
B, S, E, H = 3, 7, 16, 4
PADDED = torch.arange(S) >= torch.tensor([7, 4, 2])[:, None]
CAUSAL = torch.ones(S, S, dtype=torch.bool).triu(1)
HOLES = torch.rand(S, S, generator=generator(5)) < 0.3
HOLES.fill_diagonal_(False)
PER_HEAD = torch.rand(B * H, S, S, generator=generator(6)) < 0.3
PER_HEAD.diagonal(dim1=1, dim2=2).fill_(False)


def additive(mask: Tensor, low: float = -math.inf) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, low)


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"src_key_padding_mask": PADDED},
    "padding-float": {"src_key_padding_mask": additive(PADDED)},
    "padding-bias": {"src_key_padding_mask": torch.randn(B, S, generator=generator(3), dtype=torch.float64)},
    "holes-in-padding": {"src_key_padding_mask": PADDED.flip(1)},
    "causal": {"mask": CAUSAL},
    "causal-float-hint": {"mask": additive(CAUSAL), "is_causal": True},
    "holes": {"mask": HOLES},
    "bias": {"mask": torch.randn(S, S, generator=generator(4), dtype=torch.float64)},
    "per-head": {"mask": PER_HEAD},
    "both": {"mask": CAUSAL, "src_key_padding_mask": PADDED},
    "both-float": {"mask": additive(HOLES), "src_key_padding_mask": additive(PADDED, -3.0)},
}
# Biases that torch's fused encoder layer takes for masks: see the test of that.
NOT_FUSED = ("padding-bias", "bias", "both-float")


def encoder(
    batch_first: bool = True, norm_first: bool = False, heads: int = H, **options: Any
) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    bias = options.pop("bias", True)
    layer = nn.TransformerEncoderLayer(E, heads, 24, batch_first=batch_first, norm_first=norm_first, bias=bias)
    nested = batch_first and not norm_first and bias and heads % 2 == 0
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=nested, **options)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape))
    return model.double().eval()


def inputs(batch_first: bool = True) -> Tensor:
    x = torch.randn(B, S, E, generator=generator(1), dtype=torch.float64)
    return x if batch_first else x.transpose(0, 1)


def expected_maps(model: nn.TransformerEncoder, x: Tensor, masks: dict[str, Any]) -> list[Tensor]:
    """The maps each layer's own MultiheadAttention hands out when it is asked for weights."""
    maps, padding, mask = [], masks.get("src_key_padding_mask"), masks.get("mask")
    if padding is not None and mask is not None and padding.dtype != mask.dtype:
        padding = additive(padding)
    with torch.enable_grad():  # no fused path
        for layer in model.layers:
            hidden = layer.norm1(x) if layer.norm_first else x
            _, weights = layer.self_attn(
                hidden, hidden, hidden, key_padding_mask=padding, attn_mask=mask, average_attn_weights=False
            )
            maps.append(weights.detach())
            x = layer(x, src_mask=mask, src_key_padding_mask=padding)
    return maps


@pytest.mark.parametrize("layout", ["batch-first", "norm-first", "seq-first", "odd-heads", "no-bias"])
@pytest.mark.parametrize("name", MASKS)
def test_encoder(name: str, layout: str):
    """Bit-equal outputs on every path of torch's encoder, and the rollout of the maps it would hand out."""
    masks = dict(MASKS[name])
    heads = 1 if layout == "odd-heads" else H
    if name == "per-head" and heads == 1:
        masks["mask"] = PER_HEAD[:B]
    model = encoder(layout != "seq-first", layout == "norm-first", heads, bias=layout != "no-bias")
    x = inputs(layout != "seq-first")
    before = state(model)
    maps = expected_maps(model, x, {k: v for k, v in masks.items() if k != "is_causal"})
    full = rollout_matrices(maps, ROLLOUT)
    for mode in (torch.enable_grad, torch.inference_mode):
        if mode is torch.inference_mode and name in NOT_FUSED:
            continue
        with mode():
            plain = model(x, **masks)
            with rollout.capture(model) as tape:
                output = model(x, **masks)
        assert same_bits(output.detach().clone(), plain.detach().clone())
        assert tape.modules("layers") == tuple(f"layers.{i}.self_attn" for i in range(3))
        for query in (None, torch.zeros(B, dtype=torch.long)):
            result, wanted = tape.rollout(query)["layers"], take_rows(full, query)
            if query is None and "src_key_padding_mask" in masks:  # nested layers do not compute padded rows
                padded = masks["src_key_padding_mask"]
                rows = padded if padded.dtype == torch.bool else padded == -math.inf
                result, wanted = result.masked_fill(rows[..., None], 0), wanted * ~rows.numpy()[..., None]
            assert_close(result, wanted, "qk")
    assert_nothing_left(model, before)


def test_every_path_of_the_encoder_is_met(monkeypatch: pytest.MonkeyPatch):
    """The fused layer, with a nested and with a plain tensor, is what the encoder test above runs."""
    seen = []
    fused = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda src, *rest: (seen.append(src.is_nested), fused(src, *rest))[1]
    )
    for masks, nested in (({}, False), ({"src_key_padding_mask": PADDED}, True), ({"mask": CAUSAL}, False)):
        model = encoder()
        with torch.inference_mode(), rollout.capture(model) as tape:
            model(inputs(), **masks)
        assert seen == [nested] * 3
        assert len(tape.layers()) == 3
        seen.clear()


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_fused_layer_takes_a_bias_for_a_mask(norm_first: bool):
    """torch's fused layer masks wherever a floating-point mask is not 0. What is recorded is what it did."""
    bias, padding = -3.0 * HOLES.double(), -0.5 * PADDED.double()
    model, x = encoder(norm_first=norm_first), inputs()
    both = {"mask": bias, "src_key_padding_mask": padding}, {"mask": HOLES, "src_key_padding_mask": PADDED}
    for given, meant in (({"mask": bias}, {"mask": HOLES}), both):
        with torch.inference_mode(), rollout.capture(model) as tape:
            output = model(x, **given)
        with torch.enable_grad():
            slow = model(x, **meant)
        assert torch.allclose(output[0], slow[0], atol=1e-12)  # the others have rows without a key
        maps = [m[:1] for m in expected_maps(model, x, meant)]
        assert_close(tape.rollout(validate=False)["layers"][:1], rollout_matrices(maps, ROLLOUT), "qk")


def test_masks_are_kept_in_the_form_kernels_know():
    def recorded(name: str) -> Any:
        model = encoder(norm_first=True)
        with torch.inference_mode(), rollout.capture(model) as tape:
            model(inputs(), **MASKS[name])
        return tape.layers()[1]

    for name in ("padding", "padding-float"):
        record = recorded(name)
        assert torch.equal(record.key_mask, ~PADDED)
        assert record.bias is None
    for name in ("causal", "causal-float-hint"):
        record = recorded(name)
        assert record.causal
        assert record.bias is None
    record = recorded("both")
    assert record.causal
    assert torch.equal(record.key_mask, ~PADDED)
    assert recorded("per-head").bias.shape == (B, H, S, S)


def test_padding_gets_nothing():
    model = encoder()
    with torch.inference_mode(), rollout.capture(model) as tape:
        model(inputs(), src_key_padding_mask=PADDED)
    result = tape.rollout(0)["layers"]
    assert not result[PADDED].any()
    assert torch.allclose(result.sum(-1), torch.ones(B, dtype=torch.float64))
    for b, n in enumerate((7, 4, 2)):
        with torch.inference_mode(), rollout.capture(model) as alone:
            model(inputs()[b : b + 1, :n])
        assert_close(alone.rollout(0)["layers"], result[b : b + 1, :n], "qk")


def test_nested_input():
    """A NestedTensor handed to the encoder itself: padded on the right to its longest sample."""
    model = encoder()
    x = inputs()
    nested = torch.nested.nested_tensor([x[0], x[1, :4], x[2, :2]])
    with torch.inference_mode():
        plain = model(nested)
        with rollout.capture(model) as tape:
            output = model(nested)
    assert all(same_bits(a.clone(), b.clone()) for a, b in zip(output.unbind(), plain.unbind(), strict=True))
    full = rollout_matrices(expected_maps(model, x, {"src_key_padding_mask": PADDED}), ROLLOUT)
    assert_close(tape.rollout(0)["layers"], full[:, 0], "qk")


class Direct(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, **options)

    def forward(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        return self.attention(x, x, x, **options)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "masks",
    [{}, {"key_padding_mask": PADDED}, {"attn_mask": HOLES}, {"attn_mask": PER_HEAD}],
    ids=["none", "padding", "holes", "per-head"],
)
def test_direct(masks: dict[str, Any], batch_first: bool, need_weights: bool):
    torch.manual_seed(0)
    model, x = Direct(batch_first=batch_first, dropout=0.2).double().eval(), inputs(batch_first)
    with torch.inference_mode():
        plain = model(x, need_weights=need_weights, **masks)
        maps = model(x, average_attn_weights=False, **masks)[1]
        with rollout.capture(model) as tape:
            output = model(x, need_weights=need_weights, **masks)
    assert same_bits(output[0].clone(), plain[0].clone())
    assert (output[1] is None) == (not need_weights)
    assert tape.streams == ("layers",)
    assert_close(tape.maps(0), maps, "qk")
    assert_close(tape.rollout()["layers"], rollout_matrices([maps], ROLLOUT), "qk")


def test_one_sample_without_a_batch_axis():
    torch.manual_seed(0)
    model, x = Direct().double().eval(), inputs()[0]
    with torch.inference_mode(), rollout.capture(model) as tape:
        model(x, key_padding_mask=PADDED[1])
        maps = model(x, key_padding_mask=PADDED[1], average_attn_weights=False)[1]
    assert_close(tape.maps(0), maps[None], "qk")


def test_the_module_itself_as_the_model():
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(E, H, batch_first=True).double().eval(), inputs()
    before = state(model)
    with torch.inference_mode(), rollout.capture(model) as tape:
        maps = model(x, x, x, average_attn_weights=False)[1]
    assert_close(tape.maps(0), maps, "qk")
    assert_nothing_left(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_and_autocast(dtype: torch.dtype):
    model, x = encoder().to(dtype), inputs().to(dtype)
    with torch.inference_mode(), rollout.capture(model) as tape:
        output = model(x, src_key_padding_mask=PADDED)
        plain = tape.rollout(0)["layers"]
    with torch.inference_mode():
        assert same_bits(output.clone(), model(x, src_key_padding_mask=PADDED).clone())
    assert {t.dtype for layer in tape.layers() for t in (layer.queries, layer.keys)} == {dtype}
    assert torch.allclose(plain.sum(-1), torch.ones(B), atol=1e-6)
    if dtype == torch.float32:
        # torch's fused paths fail under CPU autocast; with gradients on they are not taken
        with torch.autocast("cpu", dtype=torch.bfloat16), rollout.capture(model) as tape:
            model(x, src_key_padding_mask=PADDED)
        assert tape.layers()[0].queries.dtype == torch.bfloat16
        assert torch.allclose(tape.rollout(0)["layers"], plain, atol=0.02)


class Quantised(nn.MultiheadAttention):
    """As torch's quantised one: a subclass with a forward of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("not called")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Direct(add_bias_kv=True), "MultiheadAttention at attention must not have bias_k"),
        (Direct(add_zero_attn=True), "must not have add_zero_attn=True"),
        (Direct(kdim=8, vdim=8), "must have kdim and vdim equal to embed_dim, got kdim=8, vdim=8, embed_dim=16"),
        (Direct(dropout=0.1).train(), "must be in eval mode, got dropout 0.1 on in MultiheadAttention at attention"),
        (nn.Sequential(Quantised(E, H)), "Quantised at 0 must run .* it has its own .quantised ones.*register_capture"),
    ],
    ids=["bias_k", "add_zero_attn", "kdim", "dropout", "quantised"],
)  # fmt: skip
def test_settings_that_cannot_be_recorded_are_refused_by_name(model: nn.Module, message: str):
    before = state(model)
    if "eval mode" not in message:
        model.eval()
        before = state(model)
    with pytest.raises(rollout.CaptureError, match=message), rollout.capture(model):
        pass
    assert_nothing_left(model, before)


def test_calls_that_cannot_be_recorded_are_refused_by_name():
    torch.manual_seed(0)
    model, x = Direct(batch_first=True).double().eval(), inputs()
    before = state(model)
    with (
        rollout.capture(model),
        pytest.raises(
            rollout.CaptureError,
            match=r"MultiheadAttention at attention was called with is_causal=True and an attn_mask that is not causal",
        ),
    ):
        model(x, attn_mask=HOLES, is_causal=True)
    assert_nothing_left(model, before)


def test_what_is_one_sequence_is_seen_by_where_it_comes_from():
    """Three tensors made of one are self-attention; a sequence of another input is not, of whatever length."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(E), nn.MultiheadAttention(E, H, batch_first=True)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            x = x + self.attention(self.norm(x), self.norm(x), self.norm(x))[0]
            return x + self.attention(x, other, other)[0]

    torch.manual_seed(0)
    model, x = Normed().double().eval(), inputs()
    maps = model.attention(model.norm(x), model.norm(x), model.norm(x), average_attn_weights=False)[1]
    for other in (x.flip(1).clone(), x[:, :4].clone()):
        with torch.inference_mode(), rollout.capture(model) as tape:
            model(x, other)
            model(x, other)
        assert len(tape.layers()) == 1
        assert_close(tape.maps(0), maps, "qk")


class Resampler(nn.Module):
    """An array of its own that attends over what is given, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.cross = nn.Parameter(torch.randn(1, 3, E)), nn.MultiheadAttention(E, H, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cross(self.start.expand(len(x), -1, -1), x, x)[0]


def test_a_model_of_cross_attention_alone_is_refused():
    model = Resampler().double().eval()
    message = "every attention was left out, as over another sequence .*: cross$"
    for _ in range(2):
        with torch.inference_mode(), pytest.raises(rollout.CaptureError, match=message), rollout.capture(model):
            model(inputs())


def test_decoder_leaves_cross_attention_out():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(E, H, 24, batch_first=True)
    model = nn.TransformerDecoder(layer, 2).double().eval()
    x, memory = inputs(), inputs().flip(0)
    maps = []
    with torch.inference_mode():
        plain = model(x, memory, tgt_mask=CAUSAL)
        hidden = x
        for one in model.layers:
            maps.append(one.self_attn(hidden, hidden, hidden, attn_mask=CAUSAL, average_attn_weights=False)[1])
            hidden = one(hidden, memory, tgt_mask=CAUSAL)
        with rollout.capture(model) as tape:
            output = model(x, memory, tgt_mask=CAUSAL)
    assert same_bits(output.clone(), plain.clone())
    assert tape.modules() == ("layers.0.self_attn", "layers.1.self_attn")
    assert tape.left_out == ("layers.0.multihead_attn", "layers.1.multihead_attn")
    assert_close(tape.rollout()["layers"], rollout_matrices(maps, ROLLOUT), "qk")


def test_transformer_has_two_streams():
    torch.manual_seed(0)
    model = nn.Transformer(E, H, 2, 2, 24, batch_first=True).double().eval()
    with torch.inference_mode(), rollout.capture(model) as tape:
        model(inputs(), inputs()[:, :5])
    assert tape.streams == ("encoder.layers", "decoder.layers")
    assert {k: tuple(v.shape) for k, v in tape.rollout(0).items()} == {
        "encoder.layers": (B, S),
        "decoder.layers": (B, 5),
    }
    with torch.inference_mode(), rollout.capture(model.encoder) as alone:
        model(inputs(), inputs()[:, :5])
    assert same_bits(alone.rollout(0)["layers"], tape.rollout(0)["encoder.layers"])
    full = rollout_matrices(expected_maps(model.encoder, inputs(), {}), ROLLOUT)
    assert_close(alone.rollout()["layers"], full, "qk")


def test_threads_share_an_encoder():
    """Nested and plain batches at once: what one thread's encoder notes is not another's."""
    model, results = encoder(), {}
    before = state(model)
    cases = {
        "a": {},
        "b": {"src_key_padding_mask": PADDED},
        "c": {"mask": CAUSAL},
        "d": {"src_key_padding_mask": PADDED},
    }
    wanted = {}
    for name, masks in cases.items():
        with torch.inference_mode(), rollout.capture(model) as tape:
            model(inputs(), **masks)
        wanted[name] = tape.rollout(0)["layers"]
    barrier = threading.Barrier(len(cases))

    def work(name: str) -> None:
        barrier.wait()
        for _ in range(10):
            with torch.inference_mode(), rollout.capture(model) as tape:
                model(inputs(), **cases[name])
            results[name] = tape.rollout(0)["layers"]

    threads = [threading.Thread(target=work, args=(name,)) for name in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_bits(results[name], wanted[name]) for name in cases)
    assert_nothing_left(model, before)


def test_what_hooks_make_of_the_arguments_is_recorded() -> None:
    torch.manual_seed(0)
    model, x = Direct(batch_first=True).double().eval(), inputs()
    model.attention.register_forward_pre_hook(
        lambda module, args, kwargs: (args, dict(kwargs, attn_mask=CAUSAL)), with_kwargs=True
    )
    maps = model(x, average_attn_weights=False)[1]
    with torch.no_grad(), rollout.capture(model) as tape:
        model(x)
    assert_close(tape.maps(0), maps, "qk")
    assert tape.layers()[0].causal
