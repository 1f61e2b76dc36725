"""Rollout through cross-attention, against the chain of joint matrices [[D, C], [0, I]] in float64."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rollout
from rollout import Method
from tests.support.capture_families import BOTH, FAMILIES, IDS, MASK
from tests.support.capture_state import assert_nothing_left, state
from tests.support.cases import generator, same_bits
from tests.support.oracles import assert_close, joint_rollout

E, H = 16, 4
PAIRS = ["BART", "Marian", "T5 (relative bias)", "Whisper"]
SHORT = {"BART": IDS[:, :4], "Marian": IDS[:, :7], "T5 (relative bias)": IDS, "Whisper": IDS[:, :6]}


def pair(name: str, implementation: str = "eager") -> tuple[nn.Module, dict[str, Any]]:
    """A small model of a family in float64, and a batch whose decoder and encoder differ in length."""
    batch = {**FAMILIES[name].inputs, "decoder_input_ids": SHORT[name], "use_cache": False}
    batch = {key: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for key, v in batch.items()}
    return FAMILIES[name].make(implementation).double(), batch


def maps_of(model: nn.Module, batch: dict[str, Any]) -> tuple[Sequence[Tensor], ...]:
    twin: Any = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    with torch.inference_mode():
        output = twin(**batch, output_attentions=True)
    return output.encoder_attentions, output.decoder_attentions, output.cross_attentions


def recorded(model: nn.Module, *args: Any, **batch: Any) -> Any:
    with torch.inference_mode(), rollout.capture(model, cross_attention=True) as tape:
        model(*args, **batch)
    return tape


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_hugging_face(name: str, implementation: str) -> None:
    model, batch = pair(name, implementation)
    before = state(model)
    with torch.inference_mode():
        plain = model(**batch)[0]
        for _ in range(2):  # the first call is looked at, the second is known
            with rollout.capture(model, cross_attention=True) as tape:
                output = model(**batch)[0]
            assert same_bits(output.clone(), plain.clone())
            assert tape.left_out == ()
            top, below = tape.streams[1], tape.streams[0]
            got = tape.encoder_decoder_rollout()
            wanted = joint_rollout(*maps_of(model, batch))
            seq = wanted.shape[1]
            assert_close(got[top], wanted[..., :seq], "qk")
            assert_close(got[below], wanted[..., seq:], "qk")
            assert_close(tape.encoder_decoder_rollout(-1)[below], wanted[:, -1, seq:], "qk")
            torch.testing.assert_close(got[top].sum(-1) + got[below].sum(-1), torch.ones(len(wanted), seq).double())
    assert_nothing_left(model, before)


def test_padding_of_the_encoder_gets_nothing() -> None:
    model, batch = pair("BART")
    got = recorded(model, **batch).encoder_decoder_rollout(0)["encoder.layers"]
    assert bool((got[MASK == 0] == 0).all())
    assert bool((got[MASK == 1] > 0).all())


def test_rows_are_those_of_the_decoder() -> None:
    model, batch = pair("BART", "sdpa")
    tape = recorded(model, **batch)
    full = tape.encoder_decoder_rollout(stream="decoder.layers")
    weights = torch.randn(3, 2, 4, generator=generator(3), dtype=torch.float64)
    some = torch.tensor([3, 0, -2])
    for stream in full:
        rows = full[stream]
        assert_close(tape.encoder_decoder_rollout(some)[stream], rows[torch.arange(3), some], "qk")
        assert_close(tape.encoder_decoder_rollout(weights)[stream], weights @ rows, "qk")
        assert_close(tape.encoder_decoder_rollout(weights[:, 0])[stream], (weights @ rows)[:, 0], "qk")


def test_weights_of_the_residual() -> None:
    model, batch = pair("Marian")
    tape, maps = recorded(model, **batch), maps_of(model, batch)
    wanted = joint_rollout(*maps, residual=0.8)
    got = tape.encoder_decoder_rollout(method=Method(residual=0.8))
    assert_close(got["encoder.layers"], wanted[..., wanted.shape[1] :], "qk")
    doubled = tape.encoder_decoder_rollout(method=Method(residual=1.6, attention=0.4))
    assert_close(doubled["encoder.layers"], wanted[..., wanted.shape[1] :], "qk")


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("lengths", [(7, 5), (4, 9)], ids=["encoder longer", "decoder longer"])
def test_transformer_of_torch(lengths: tuple[int, int], batch_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(E, H, 2, 2, 24, batch_first=batch_first).double().eval()
    over, seq = lengths
    source, target = (torch.randn(3, n, E, generator=generator(n), dtype=torch.float64) for n in (over, seq))
    padded = torch.arange(over) >= torch.tensor([over, over - 1, 2])[:, None]
    causal = torch.ones(seq, seq, dtype=torch.bool).triu(1)
    inputs = (source, target) if batch_first else (source.transpose(0, 1), target.transpose(0, 1))
    masks = {"tgt_mask": causal, "src_key_padding_mask": padded, "memory_key_padding_mask": padded}
    tape = recorded(model, *inputs, **masks)
    maps: dict[str, list[Tensor]] = {"encoder": [], "decoder": [], "crossing": []}
    with torch.enable_grad():  # no fused path
        hidden = source
        for layer in model.encoder.layers:
            maps["encoder"].append(weights(layer.self_attn, hidden, hidden, key_padding_mask=padded))
            hidden = by_batch(layer, hidden, src_key_padding_mask=padded)
        memory, hidden = model.encoder.norm(hidden), target
        for layer in model.decoder.layers:
            maps["decoder"].append(weights(layer.self_attn, hidden, hidden, attn_mask=causal))
            middle = layer.norm1(hidden + attend(layer.self_attn, hidden, hidden, attn_mask=causal)[0])
            maps["crossing"].append(weights(layer.multihead_attn, middle, memory, key_padding_mask=padded))
            middle = layer.norm2(middle + attend(layer.multihead_attn, middle, memory, key_padding_mask=padded)[0])
            hidden = layer.norm3(middle + layer.linear2(torch.relu(layer.linear1(middle))))
    wanted = joint_rollout(maps["encoder"], maps["decoder"], maps["crossing"])
    got = tape.encoder_decoder_rollout()
    assert_close(got["decoder.layers"], wanted[..., :seq], "qk")
    assert_close(got["encoder.layers"], wanted[..., seq:], "qk")


def attend(module: nn.MultiheadAttention, query: Tensor, key: Tensor, **masks: Any) -> tuple[Tensor, Tensor]:
    """`module` on [B, S, E] and [B, S', E], whatever its layout, and its maps."""
    if not module.batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    output, maps = module(query, key, key, average_attn_weights=False, **masks)
    return output if module.batch_first else output.transpose(0, 1), maps


def weights(module: nn.MultiheadAttention, query: Tensor, key: Tensor, **masks: Any) -> Tensor:
    return attend(module, query, key, **masks)[1].detach()


def by_batch(layer: Any, hidden: Tensor, **masks: Any) -> Tensor:
    if layer.self_attn.batch_first:
        return layer(hidden, **masks)
    return layer(hidden.transpose(0, 1), **masks).transpose(0, 1)


class Bridge(nn.Module):
    """An encoder and a decoder with something in between."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pair = nn.Transformer(E, H, 2, 2, 24, batch_first=True)
        self.between = between

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.pair.decoder(target, self.between(self.pair.encoder(source)))


def mixed(memory: Tensor) -> Tensor:
    return memory.roll(1, 1)


def pooled(memory: Tensor) -> Tensor:
    return memory[:, ::2]


@pytest.mark.parametrize(
    ("between", "match"), [(mixed, "positions are mixed by something else between the last attention of pair.encoder"),
                           (pooled, "must be over the last state of a stream that was recorded")],
)  # fmt: skip
def test_memory_that_is_not_the_encoders_is_refused(between: Any, match: str) -> None:
    model = Bridge(between).double().eval()
    source, target = torch.randn(2, 8, E).double(), torch.randn(2, 5, E).double()
    with pytest.raises(rollout.CaptureError, match=match):
        recorded(model, source, target)
    assert Bridge(nn.Linear(E, E)).double().eval()(source, target).shape == target.shape
    tape = recorded(Bridge(nn.Linear(E, E)).double().eval(), source, target)
    assert set(tape.encoder_decoder_rollout(0)) == {"pair.decoder.layers", "pair.encoder.layers"}


def test_memory_from_outside_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 24, batch_first=True), 2).eval()
    with pytest.raises(rollout.CaptureError, match="call the whole model, or leave cross_attention out"):
        recorded(model, torch.randn(2, 5, E), torch.randn(2, 7, E))


def test_what_cannot_be_said_is_refused() -> None:
    model, batch = pair("BART")
    tape = recorded(model, **batch)
    for method in (Method(head_fusion="max"), Method(discard_ratio=0.5), Method(start_layer=1)):
        with pytest.raises(ValueError, match="fuse heads by their mean, discard nothing and start at the first layer"):
            tape.encoder_decoder_rollout(method=method)
    with pytest.raises(ValueError, match="must have own_path=True through cross-attention"):
        tape.encoder_decoder_rollout(method=Method(own_path=False))
    with pytest.raises(ValueError, match="needs the gradients"):
        tape.encoder_decoder_rollout(method="grad_rollout")
    with pytest.raises(ValueError, match="'value_norm' needs values, output weights and inputs, which a tape does not"):
        tape.encoder_decoder_rollout(method="value_norm")
    with pytest.raises(KeyError, match="must name one of the streams"):
        tape.encoder_decoder_rollout(stream="decoder")
    with pytest.raises(ValueError, match=r"must hold cross-attention of encoder\.layers, it holds that of"):
        tape.encoder_decoder_rollout(stream="encoder.layers")
    with pytest.raises(ValueError, match=r"query must be a row"):
        tape.encoder_decoder_rollout(4)
    with torch.inference_mode(), rollout.capture(model) as plain:
        model(**batch)
    assert len(plain.left_out) == 2
    with pytest.raises(ValueError, match=r"capture\(model, cross_attention=True\)"):
        plain.encoder_decoder_rollout()
    assert same_bits(plain.rollout(0)["decoder.layers"], tape.rollout(0)["decoder.layers"])


def test_a_row_of_no_keys_is_refused() -> None:
    model, _ = pair("BART")
    nothing = MASK.clone()
    nothing[1] = 0
    tape = recorded(model, **{**BOTH, "attention_mask": nothing, "decoder_input_ids": IDS.repeat(1, 2)})
    with pytest.raises(ValueError, match="every position must attend over some position of the encoder"):
        tape.encoder_decoder_rollout(0)
