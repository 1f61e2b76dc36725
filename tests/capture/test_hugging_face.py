"""Capture of Hugging Face models: outputs, the rollout of eager maps, what is left, and what is refused.

Every model is small, random and made from a config; nothing is downloaded.
"""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rollout
from tests.support.capture_state import assert_nothing_left, state
from tests.support.cases import generator, same_bits
from tests.support.oracles import assert_close, rollout_matrices

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'attention-rollout[hf]'"
)

ROLLOUT = rollout.METHODS["rollout"]
B, S = 3, 9
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {"vocab_size": 99, **SPECIAL, **SIZES}
GROUPED = {**TEXT, "num_key_value_heads": 2}
IDS = torch.randint(5, 90, (B, S), generator=generator(1))
RIGHT = (torch.arange(S) < torch.tensor([9, 5, 2])[:, None]).long()
LEFT = RIGHT.flip(1)
HOLES = RIGHT.clone()
HOLES[0, 3] = 0
PIXELS = torch.randn(2, 3, 16, 16, generator=generator(2))

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", TEXT),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", TEXT),
    "roberta": ("RobertaModel", "RobertaConfig", {**TEXT, "max_position_embeddings": 32}),
    "llama": ("LlamaModel", "LlamaConfig", GROUPED),
    "llama-lm": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral-window": ("MistralModel", "MistralConfig", {**GROUPED, "sliding_window": 3}),
    "gpt2": ("GPT2Model", "GPT2Config", {**SPECIAL, "vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4}),
    "qwen3": ("Qwen3Model", "Qwen3Config", {**GROUPED, "head_dim": 16}),
}  # fmt: skip
PADDING = {"none": None, "right": RIGHT, "left": LEFT, "holes": HOLES}


def make(kind: str, implementation: str = "sdpa") -> Any:
    model_name, config_name, options = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**copy.deepcopy(options))
    config._attn_implementation = implementation
    model = getattr(transformers, model_name)(config).eval()
    for parameter in model.parameters():  # large enough that attention is far from uniform
        parameter.data.add_(0.15 * torch.randn(parameter.shape))
    return model


def eager_maps(model: Any, **batch: Any) -> list[Tensor]:
    """The maps of a copy of the model that runs eager attention."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        output = twin(**batch, output_attentions=True)
    return list(output.attentions)


def only_valid(values: Any, mask: Tensor | None) -> Any:
    """Rows of padded positions as 0: what a model computes there differs between its attention functions."""
    if mask is None:
        return values
    return (
        values * mask.numpy().astype(float)[..., None] if not isinstance(values, Tensor) else values * mask[..., None]
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kind", KINDS)
def test_text(kind: str, padding: str, implementation: str):
    mask = PADDING[padding]
    batch = {"input_ids": IDS} if mask is None else {"input_ids": IDS, "attention_mask": mask}
    if "bert" not in kind:
        batch["use_cache"] = False
    model = make(kind, implementation)
    before = state(model)
    with torch.inference_mode():
        plain = model(**batch)[0]
        with rollout.capture(model) as tape:
            output = model(**batch)[0]
    assert_nothing_left(model, before)
    assert model.config._attn_implementation == implementation
    assert same_bits(output.clone(), plain.clone())

    full = rollout_matrices(eager_maps(model, **batch), ROLLOUT)
    (stream,) = tape.streams
    assert_close(only_valid(tape.rollout()[stream], mask), only_valid(full, mask), "qk")
    if mask is not None:
        last = mask.long().argmax(1) if padding == "left" else torch.zeros(B, dtype=torch.long)
        result = tape.rollout(last)[stream]
        assert_close(result, full[torch.arange(B), last], "qk")
        assert not result[mask == 0].any()
    assert len(tape.layers()) == 3
    assert all(layer.bias is None for layer in tape.layers())  # in the form kernels know


def test_vision():
    for implementation in ("eager", "sdpa"):
        torch.manual_seed(0)
        config = transformers.ViTConfig(image_size=16, patch_size=4, **SIZES)
        config._attn_implementation = implementation
        model = transformers.ViTModel(config).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.15 * torch.randn(parameter.shape))
        before = state(model)
        with torch.inference_mode():
            plain = model(pixel_values=PIXELS)[0]
            with rollout.capture(model) as tape:
                output = model(pixel_values=PIXELS)[0]
        assert same_bits(output.clone(), plain.clone())
        full = rollout_matrices(eager_maps(model, pixel_values=PIXELS), ROLLOUT)
        (stream,) = tape.streams
        assert tape.rollout(0)[stream].shape == (2, 17)
        assert_close(tape.rollout()[stream], full, "qk")
        assert_nothing_left(model, before)


def test_what_is_recorded():
    model = make("mistral-window")
    with torch.inference_mode(), rollout.capture(model) as tape:
        model(input_ids=IDS, attention_mask=LEFT)
    for layer in tape.layers("layers"):
        assert (layer.causal, layer.window) == (True, (2, None))
        assert layer.queries.shape == (B, 4, S, 8)
        assert layer.keys.shape == (B, 2, S, 8)
        assert torch.equal(layer.key_mask, LEFT.bool())
    assert tape.modules() == tuple(f"layers.{i}.self_attn" for i in range(3))
    assert tape.nbytes == 3 * B * S * 8 * (4 + 2) * 4 + B * S


def test_inside_another_model():
    """PyHealth-like: a transformers model is a part of the one captured."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language = make("bert", "eager")
            self.head = nn.Linear(32, 2)

        def forward(self, **batch: Any) -> Tensor:
            return self.head(self.language(**batch)[0][:, 0])

    model = Wrapper().eval()
    before = state(model)
    with torch.inference_mode(), rollout.capture(model) as tape:
        model(input_ids=IDS, attention_mask=RIGHT)
    full = rollout_matrices(eager_maps(model.language, input_ids=IDS, attention_mask=RIGHT), ROLLOUT)
    assert_close(tape.rollout(0)["language.encoder.layer"], full[:, 0], "qk")
    assert_nothing_left(model, before)


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5Model(config).eval()


def test_relative_position_bias_is_added_and_cross_attention_left_out():
    model = t5()
    batch = {"input_ids": IDS, "attention_mask": RIGHT, "decoder_input_ids": IDS, "use_cache": False}
    before = state(model)
    with torch.inference_mode():
        plain = model(**batch)[0]
        with rollout.capture(model) as tape:
            output = model(**batch)[0]
        twin = copy.deepcopy(model)
        twin.set_attn_implementation("eager")
        eager = twin(**batch, output_attentions=True)
    assert same_bits(output.clone(), plain.clone())
    assert tape.streams == ("encoder.block", "decoder.block")
    assert all(path.endswith("SelfAttention") for stream in tape.streams for path in tape.modules(stream))
    full = rollout_matrices(eager.encoder_attentions, ROLLOUT)
    assert_close(only_valid(tape.rollout()["encoder.block"], RIGHT), only_valid(full, RIGHT), "qk")
    assert_close(tape.rollout()["decoder.block"], rollout_matrices(eager.decoder_attentions, ROLLOUT), "qk")
    assert tape.layers("decoder.block")[0].causal
    assert_nothing_left(model, before)


def test_cross_attention_over_as_many_positions_is_left_out():
    torch.manual_seed(0)
    config = transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    model = transformers.BertModel(config).eval()
    states = torch.randn(B, S, 32, generator=generator(4))
    batch = {"input_ids": IDS, "encoder_hidden_states": states, "use_cache": False}
    with torch.inference_mode(), rollout.capture(model) as tape:
        model(**batch)
    assert [path.rpartition("attention.")[0].endswith("layer.0.") for path in tape.modules()] == [True, False, False]
    assert not any("cross" in path for path in tape.modules())
    assert_close(tape.rollout()["encoder.layer"], rollout_matrices(eager_maps(model, **batch), ROLLOUT), "qk")


def test_shared_layers():
    torch.manual_seed(0)
    model = transformers.AlbertModel(transformers.AlbertConfig(embedding_size=16, **TEXT)).eval()
    with (
        pytest.raises(rollout.CaptureError, match=r"shared_layers=True"),
        torch.inference_mode(),
        rollout.capture(model),
    ):
        model(IDS)
    with torch.inference_mode(), rollout.capture(model, shared_layers=True) as tape:
        model(input_ids=IDS)
    (stream,) = tape.streams
    assert_close(tape.rollout()[stream], rollout_matrices(eager_maps(model, input_ids=IDS), ROLLOUT), "qk")


def test_a_mask_of_ones_own():
    """A 4-D mask handed in by the caller: packed sequences, which are no key mask and no window."""
    model = make("llama")
    i, j = torch.arange(S)[:, None], torch.arange(S)
    packed = ((j <= i) & (i // 4 == j // 4)).expand(B, 1, S, S)
    low = torch.finfo(torch.float32).min
    for mask in (packed, torch.zeros(B, 1, S, S).masked_fill(~packed, low)):
        with torch.inference_mode(), rollout.capture(model) as tape:
            model(input_ids=IDS, attention_mask=mask)
        maps = eager_maps(model, input_ids=IDS, attention_mask=torch.zeros(B, 1, S, S).masked_fill(~packed, low))
        assert_close(tape.rollout()["layers"], rollout_matrices(maps, ROLLOUT), "qk")


def refused(model: Any, message: str, *batches: dict[str, Any]) -> None:
    before = state(model)

    def run() -> None:
        with torch.inference_mode(), rollout.capture(model):
            for batch in batches:
                model(**batch)

    with pytest.raises(rollout.CaptureError, match=message):
        run()
    assert_nothing_left(model, before)


def test_what_cannot_be_recorded_is_refused_by_name():
    torch.manual_seed(0)
    options = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "window_size": 4}
    swin = transformers.SwinModel(transformers.SwinConfig(depths=[2, 2], num_heads=[2, 4], **options)).eval()
    refused(
        swin, r"Swin\w*Attention at .*layers.0.blocks.0.* got 8 sequences for inputs of 2", {"pixel_values": PIXELS}
    )
    bert = make("bert").train()
    refused(bert, r"must be in eval mode, got dropout 0.1 on in Dropout")
    llama = make("llama")
    llama.config.attention_dropout = 0.2
    for layer in llama.layers:
        layer.self_attn.attention_dropout = 0.2
    refused(
        llama.train(),
        "must be in eval mode, got dropout 0.2 on in LlamaAttention at layers.0.self_attn|got attention dropout 0.2 on",
        {"input_ids": IDS},
    )


def test_generation_steps_are_refused():
    model = make("llama-lm")
    with torch.inference_mode():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    refused(
        model,
        r"got 1 queries and 10 keys: run the whole sequence at once",
        {"input_ids": IDS[:, :1], "past_key_values": cache},
    )
    before = state(model)
    with pytest.raises(rollout.CaptureError, match=r"generation steps cannot be recorded"), rollout.capture(model):
        model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert_nothing_left(model, before)
    with torch.inference_mode(), rollout.capture(model) as tape:  # the first call, that fills a cache, can be
        model(input_ids=IDS, use_cache=True)
    assert_close(tape.rollout()["model.layers"], rollout_matrices(eager_maps(model, input_ids=IDS), ROLLOUT), "qk")


def fail(*args: Any) -> None:
    raise RuntimeError("in the last layer")


def test_nothing_is_left_after_errors_and_nesting():
    model = make("bert", "eager")
    before = state(model)
    with pytest.raises(IndexError), rollout.capture(model):
        model(input_ids=IDS + 99)
    model.encoder.layer[2].attention.output.forward = fail
    failing = state(model)
    with pytest.raises(RuntimeError, match=r"in the last layer"), rollout.capture(model):
        model(input_ids=IDS)
    assert_nothing_left(model, failing)
    del model.encoder.layer[2].attention.output.forward
    assert_nothing_left(model, before)
    with torch.inference_mode(), rollout.capture(model) as outer:
        with rollout.capture(model.encoder) as inner:
            model(input_ids=IDS)
        assert model.config._attn_implementation == "eager"
        model(input_ids=IDS)
    assert_nothing_left(model, before)
    assert same_bits(outer.rollout(0)["encoder.layer"], inner.rollout(0)["layer"])


def test_a_model_that_shares_the_config_runs_right_beside():
    model = make("bert", "eager")
    other = transformers.BertModel(model.config).eval()
    with torch.inference_mode():
        wanted = other(input_ids=IDS, attention_mask=RIGHT)[0]
        with rollout.capture(model) as tape:
            model(input_ids=IDS)
            result = other(input_ids=IDS, attention_mask=RIGHT)[0]
    assert same_bits(result.clone(), wanted.clone())
    assert len(tape.layers()) == 3


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_threads(implementation: str):
    """Two threads capture one model and a third one runs it with other masks: everyone sees what they would alone."""
    model = make("llama", implementation)
    before = state(model)
    batches = [{"input_ids": IDS, "attention_mask": m} for m in (RIGHT, LEFT, HOLES)]
    alone = []
    with torch.inference_mode():
        for batch in batches:
            with rollout.capture(model) as tape:
                model(**batch)
            alone.append(tape.rollout()["layers"])
        plain = model(**batches[2])[0]
    results: list[Any] = [None, None, []]
    barrier = threading.Barrier(3)

    def work(i: int) -> None:
        barrier.wait()
        for _ in range(8):
            with torch.inference_mode():
                if i == 2:
                    results[2].append(model(**batches[2])[0])
                    continue
                with rollout.capture(model) as tape:
                    model(**batches[i])
                results[i] = tape.rollout()["layers"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same_bits(results[0], alone[0])
    assert same_bits(results[1], alone[1])
    assert len(results[2]) == 8
    assert all(same_bits(output.clone(), plain.clone()) for output in results[2])
    assert_nothing_left(model, before)


def test_an_attention_function_of_the_users_own_runs_and_is_seen() -> None:
    """Registered with transformers: twice as sharp, so that fused attention in its place would show."""

    def sharp(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        scores = 2.0 * options["scaling"] * query @ key.transpose(-1, -2)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    transformers.AttentionInterface.register("sharp_for_test", sharp)
    try:
        model = make("bert", "sharp_for_test")
        with torch.inference_mode():
            plain = model(input_ids=IDS)[0]
            with rollout.capture(model) as tape:
                assert same_bits(model(input_ids=IDS)[0].clone(), plain.clone())
        assert [layer.scale for layer in tape.layers()] == [1.0] * 3  # the queries carry it
        assert model.config._attn_implementation == "sharp_for_test"
        maps = (tape.layers()[0].queries @ tape.layers()[0].keys.transpose(-1, -2)).softmax(-1)
        assert_close(tape.maps(0), maps, "qk")
    finally:
        transformers.AttentionInterface._global_mapping.pop("sharp_for_test")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_composites_run_each_part_as_it_is(implementation: str) -> None:
    """An encoder and a decoder of different families, one of which looks nothing up in the interface."""
    torch.manual_seed(0)
    decoder = transformers.RoFormerConfig(is_decoder=True, add_cross_attention=True, embedding_size=32, **TEXT)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(image_size=16, patch_size=4, **SIZES), decoder
    )
    config._attn_implementation = {"encoder": implementation, "decoder": "eager"}
    model = transformers.VisionEncoderDecoderModel(config).eval()
    before = state(model)
    batch = {"pixel_values": PIXELS, "decoder_input_ids": IDS[:2], "use_cache": False}
    with torch.inference_mode():
        plain = model(**batch)
        with rollout.capture(model) as tape:
            captured = model(**batch)
    assert same_bits(captured.logits.clone(), plain.logits.clone())
    assert_nothing_left(model, before)
    assert [len(tape.layers(stream)) for stream in tape.streams] == [3, 3]
    twin = copy.deepcopy(model)
    twin.set_attn_implementation({"encoder": "eager", "decoder": "eager"})
    with torch.no_grad():
        eager = twin(**batch, output_attentions=True)
    for stream, maps in zip(tape.streams, (eager.encoder_attentions, eager.decoder_attentions), strict=True):
        assert_close(tape.rollout()[stream], rollout_matrices(maps, ROLLOUT), "qk")
