"""Tiny random models of many families, what a capture must say of each, and the table of `docs/capture.md`."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

import rollout
from tests.support.cases import generator
from tests.support.oracles import array, rollout_matrices

B, S = 3, 9
IDS = torch.randint(5, 90, (B, S), generator=generator(1))
MASK = (torch.arange(S) < torch.tensor([9, 5, 2])[:, None]).long()
PIXELS = torch.randn(2, 3, 32, 32, generator=generator(2))
MIXED = "positions are mixed by something else"


@dataclass(frozen=True)
class Family:
    """One family: how to make a model of it, what to call it with, and what a capture must say.

    Attributes:
        make: gives the model, for an attention implementation.
        refused: what the refusal says; None when the family is captured.
        eager: output fields that hold the maps of each stream, in the order of the streams; empty: none are given out.
        shared: its layers share weights.
        single: run in float32; some kernels of mixtures of experts know no float64.
        stateful: its modules keep something of every call.
    """

    make: Callable[[str], Any]
    inputs: dict[str, Tensor]
    refused: str | None = None
    eager: tuple[str, ...] = ("attentions",)
    implementations: tuple[str, ...] = ("eager",)
    shared: bool = False
    single: bool = False
    stateful: bool = False


def hugging_face(name: str, config: str | None = None, **options: Any) -> Callable[[str], Any]:
    """Makes `name`Model from `config`Config."""

    def make(implementation: str) -> Any:
        torch.manual_seed(0)
        made = getattr(transformers, f"{config or name}Config")(**copy.deepcopy(options))
        made._attn_implementation = implementation
        model = getattr(transformers, f"{name}Model")(made).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
        return model

    return make


TEXT: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
CLASSIC = {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
LATENT = {
    **TEXT, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
SPARSE = {**LATENT, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}
PAIR = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
IMAGE = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48,
}  # fmt: skip
SOUND = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "conv_dim": [8, 8],
    "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip

TOKENS = {"input_ids": IDS, "attention_mask": MASK}
BOTH = {**TOKENS, "decoder_input_ids": IDS}
VIEW = {"pixel_values": PIXELS}
WAVE = {"input_values": torch.randn(2, 400, generator=generator(3))}
TWO = ("eager", "sdpa")
STREAMS = ("encoder_attentions", "decoder_attentions")

FAMILIES: dict[str, Family] = {
    "BERT": Family(hugging_face("Bert", **TEXT), TOKENS, implementations=TWO),
    "ALBERT": Family(hugging_face("Albert", embedding_size=16, **TEXT), TOKENS, implementations=TWO, shared=True),
    "RoFormer": Family(hugging_face("RoFormer", embedding_size=32, **TEXT), TOKENS),
    "DeBERTa": Family(
        hugging_face("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"], **TEXT), TOKENS
    ),
    "DeBERTa-v2": Family(
        hugging_face("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], **TEXT), TOKENS
    ),
    "I-BERT": Family(hugging_face("IBert", **TEXT), TOKENS),
    "MPNet": Family(hugging_face("MPNet", **TEXT), TOKENS),
    "CTRL": Family(hugging_face("CTRL", dff=48, **CLASSIC), TOKENS),
    "GPT-J": Family(hugging_face("GPTJ", rotary_dim=4, n_inner=48, **CLASSIC), TOKENS),
    "GPT-NeoX": Family(hugging_face("GPTNeoX", **TEXT), TOKENS, implementations=TWO),
    "BLOOM (ALiBi)": Family(hugging_face("Bloom", vocab_size=99, hidden_size=32, n_layer=3, n_head=4), TOKENS),
    "Falcon": Family(hugging_face("Falcon", **TEXT), TOKENS),
    "MPT (ALiBi)": Family(
        hugging_face("Mpt", vocab_size=99, d_model=32, n_heads=4, n_layers=3, max_seq_len=64, expansion_ratio=2), TOKENS
    ),
    "XGLM": Family(
        hugging_face("XGLM", vocab_size=99, d_model=32, ffn_dim=48, num_layers=3, attention_heads=4),
        TOKENS,
        single=True,
    ),
    "Mistral (window)": Family(
        hugging_face("Mistral", sliding_window=3, **GROUPED), TOKENS, implementations=TWO, single=True
    ),
    "Mixtral": Family(
        hugging_face("Mixtral", num_local_experts=4, num_experts_per_tok=2, **GROUPED), TOKENS,
        implementations=TWO, single=True,
    ),
    "DeepSeek-V3 (latent)": Family(hugging_face("DeepseekV3", **LATENT), TOKENS, implementations=TWO, single=True),
    "DeepSeek-V3.2 (sparse)": Family(hugging_face("DeepseekV32", **SPARSE), TOKENS, implementations=TWO, single=True),
    "Perceiver": Family(
        hugging_face(
            "Perceiver", num_latents=6, d_latents=32, d_model=16, num_blocks=1, num_self_attends_per_block=3,
            num_self_attention_heads=4, num_cross_attention_heads=4,
        ),
        {"inputs": torch.randn(2, 9, 16, generator=generator(4))},
    ),
    "BART": Family(hugging_face("Bart", **PAIR), BOTH, eager=STREAMS, implementations=TWO),
    "Marian": Family(hugging_face("Marian", **PAIR), BOTH, eager=STREAMS),
    "T5 (relative bias)": Family(
        hugging_face("T5", decoder_start_token_id=0, **T5), BOTH, eager=STREAMS, implementations=TWO
    ),
    "Whisper": Family(
        hugging_face("Whisper", **{**PAIR, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 16}),
        {"input_features": torch.randn(B, 8, 24, generator=generator(5)), "decoder_input_ids": IDS},
        eager=STREAMS,
    ),
    "ViT": Family(hugging_face("ViT", **IMAGE), VIEW, implementations=TWO),
    "BEiT (relative bias)": Family(hugging_face("Beit", use_relative_position_bias=True, **IMAGE), VIEW),
    "SigLIP": Family(hugging_face("SiglipVision", **IMAGE), VIEW, implementations=TWO),
    "wav2vec 2.0": Family(hugging_face("Wav2Vec2", **SOUND), WAVE),
    # Refused, by what they do.
    "Jamba": Family(
        hugging_face(
            "Jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2,
            num_experts_per_tok=1, use_mamba_kernels=False, mamba_d_state=4, **{**GROUPED, "num_hidden_layers": 4},
        ),
        TOKENS, refused=MIXED, single=True,
    ),
    "Bamba": Family(
        hugging_face("Bamba", attn_layer_indices=[1, 3], **MAMBA, **{**GROUPED, "num_hidden_layers": 4}),
        TOKENS, refused=MIXED,
    ),
    "Zamba": Family(
        hugging_face(
            "Zamba", attention_head_dim=16, n_mamba_heads=2, mamba_d_state=4, use_mamba_kernels=False,
            attn_layer_period=2, attn_layer_offset=1, **{**TEXT, "num_hidden_layers": 6, "num_key_value_heads": 4},
        ),
        TOKENS, refused=MIXED,
    ),
    "Falcon-H1": Family(
        hugging_face("FalconH1", mamba_d_ssm=64, **MAMBA, **GROUPED), TOKENS, refused=MIXED, implementations=TWO
    ),
    "Granite hybrid": Family(
        hugging_face(
            "GraniteMoeHybrid", layer_types=["attention", "mamba", "attention"], num_local_experts=0, **MAMBA, **GROUPED
        ),
        TOKENS, refused=MIXED,
    ),
    "RecurrentGemma": Family(
        hugging_face(
            "RecurrentGemma", lru_width=32, attention_window_size=16,
            **{**GROUPED, "num_hidden_layers": 6, "num_key_value_heads": 1},
        ),
        TOKENS, refused=MIXED, stateful=True, implementations=("sdpa",),
    ),
    "LFM2": Family(
        hugging_face(
            "Lfm2", layer_types=["conv", "full_attention"] * 2, **{**GROUPED, "num_hidden_layers": 4}
        ),
        TOKENS, refused=MIXED, implementations=TWO,
    ),
    "Conformer": Family(hugging_face("Wav2Vec2Conformer", **SOUND), WAVE, refused=MIXED),
    "Nyströmformer": Family(hugging_face("Nystromformer", **TEXT), TOKENS, refused=MIXED),
    "ConvBERT": Family(hugging_face("ConvBert", embedding_size=32, **TEXT), TOKENS, refused=MIXED),
    "Gemma 2 (soft-capping)": Family(hugging_face("Gemma2", attn_logit_softcapping=2.0, **GROUPED), TOKENS),
    "GPT-OSS (sinks)": Family(
        hugging_face("GptOss", num_local_experts=2, num_experts_per_tok=1, **GROUPED),
        TOKENS, single=True,
    ),
    "Gemma 3n (shared keys)": Family(
        hugging_face(
            "Gemma3nText", vocab_size_per_layer_input=99, hidden_size_per_layer_input=8, num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2, laurel_rank=4, altup_num_inputs=2,
            activation_sparsity_pattern=[0.0] * 4, **{**GROUPED, "num_hidden_layers": 4},
        ),
        {"input_ids": IDS}, refused="keys made of an earlier layer's state", implementations=TWO,
    ),
    "DiffLlama": Family(hugging_face("DiffLlama", **GROUPED), TOKENS, refused="must attend once", implementations=TWO),
    "WavLM": Family(hugging_face("WavLM", **SOUND), WAVE, refused="multi_head_attention_forward itself"),
    "Longformer": Family(
        hugging_face("Longformer", attention_window=4, **TEXT), TOKENS, refused="no softmax attention"
    ),
    "Swin": Family(
        hugging_face("Swin", image_size=32, patch_size=2, embed_dim=16, window_size=4, depths=[2, 2], num_heads=[2, 4]),
        VIEW, refused="32 sequences for inputs of 2", implementations=TWO,
    ),
    "SegFormer": Family(
        hugging_face("Segformer", depths=[1] * 4, hidden_sizes=[8, 16, 16, 16], num_attention_heads=[1, 2, 2, 2]),
        VIEW, refused="keys of a shortened sequence|no softmax attention", implementations=TWO,
    ),
    "FNet": Family(hugging_face("FNet", **TEXT), {"input_ids": IDS}, refused="none was seen"),
    "Mamba": Family(hugging_face("Mamba", **TEXT), {"input_ids": IDS}, refused="none was seen"),
}  # fmt: skip


def prepared(family: Family, implementation: str) -> tuple[Any, dict[str, Tensor]]:
    model = family.make(implementation)
    if family.single:
        return model, family.inputs
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in family.inputs.items()}
    return model.double(), inputs


def largest_error(family: Family, model: Any, inputs: dict[str, Tensor], tape: Any) -> float:
    """max|error| of the full rollout of every stream, against the maps the model hands out, on valid rows."""
    twin = copy.deepcopy(model)
    if twin.config._attn_implementation != "eager":
        twin.set_attn_implementation("eager")
    with torch.no_grad():
        output = twin(**inputs, output_attentions=True)
    assert len(tape.streams) == len(family.eager)
    worst = 0.0
    for stream, given in zip(tape.streams, family.eager, strict=True):
        maps = [layer for layer in output[given] if layer is not None]
        assert len(maps) == len(tape.layers(stream))
        difference = array(tape.rollout()[stream]) - rollout_matrices(maps, rollout.METHODS["rollout"])
        mask = inputs.get("attention_mask")
        if mask is not None and "decoder" not in given:
            difference = difference * mask.numpy()[..., None]
        worst = max(worst, float(abs(difference).max()))
    return worst
