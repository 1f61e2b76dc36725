"""Tiny random models of many families of transformers, and what a capture must say of each."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.support.capture_family import Family, Maps
from tests.support.cases import generator

B, S = 3, 9
IDS = torch.randint(5, 90, (B, S), generator=generator(1))
MASK = (torch.arange(S) < torch.tensor([9, 5, 2])[:, None]).long()
PIXELS = torch.randn(2, 3, 32, 32, generator=generator(2))
MIXED = "positions are mixed by something else"


def handed_out(*fields: str) -> Callable[[Any, dict[str, Tensor], Any], Maps]:
    """The maps in the fields of a model's output, one for each stream."""

    def maps(model: Any, inputs: dict[str, Tensor], tape: Any) -> Maps:
        if model.config._attn_implementation != "eager":
            model.set_attn_implementation("eager")
        with torch.no_grad():
            output = model(**inputs, output_attentions=True)
        found = [[layer for layer in output[field] if layer is not None] for field in fields]
        return dict(zip(tape.streams, found, strict=True))

    return maps


def family(
    make: Callable[[str], Any], inputs: dict[str, Tensor], *, eager: tuple[str, ...] = ("attentions",), **options: Any
) -> Family:
    """A family whose maps are in the fields `eager` of its output."""
    return Family(make, inputs, handed_out(*eager), **options)


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
    "BERT": family(hugging_face("Bert", **TEXT), TOKENS, implementations=TWO),
    "ALBERT": family(hugging_face("Albert", embedding_size=16, **TEXT), TOKENS, implementations=TWO, shared=True),
    "RoFormer": family(hugging_face("RoFormer", embedding_size=32, **TEXT), TOKENS),
    "DeBERTa": family(
        hugging_face("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"], **TEXT), TOKENS
    ),
    "DeBERTa-v2": family(
        hugging_face("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], **TEXT), TOKENS
    ),
    "I-BERT": family(hugging_face("IBert", **TEXT), TOKENS),
    "MPNet": family(hugging_face("MPNet", **TEXT), TOKENS),
    "OpenAI GPT": family(hugging_face("OpenAIGPT", **CLASSIC), TOKENS),
    "CTRL": family(hugging_face("CTRL", dff=48, **CLASSIC), TOKENS),
    "GPT-J": family(hugging_face("GPTJ", rotary_dim=4, n_inner=48, **CLASSIC), TOKENS),
    "GPT-NeoX": family(hugging_face("GPTNeoX", **TEXT), TOKENS, implementations=TWO),
    "BLOOM (ALiBi)": family(hugging_face("Bloom", vocab_size=99, hidden_size=32, n_layer=3, n_head=4), TOKENS),
    "Falcon": family(hugging_face("Falcon", **TEXT), TOKENS),
    "MPT (ALiBi)": family(
        hugging_face("Mpt", vocab_size=99, d_model=32, n_heads=4, n_layers=3, max_seq_len=64, expansion_ratio=2), TOKENS
    ),
    "XGLM": family(
        hugging_face("XGLM", vocab_size=99, d_model=32, ffn_dim=48, num_layers=3, attention_heads=4),
        TOKENS,
        single=True,
    ),
    "Mistral (window)": family(
        hugging_face("Mistral", sliding_window=3, **GROUPED), TOKENS, implementations=TWO, single=True
    ),
    "Mixtral": family(
        hugging_face("Mixtral", num_local_experts=4, num_experts_per_tok=2, **GROUPED), TOKENS,
        implementations=TWO, single=True,
    ),
    "DeepSeek-V3 (latent)": family(hugging_face("DeepseekV3", **LATENT), TOKENS, implementations=TWO, single=True),
    "DeepSeek-V3.2 (sparse)": family(
        hugging_face("DeepseekV32", **SPARSE), TOKENS, implementations=TWO, single=True, sparse=True
    ),
    "Perceiver": family(
        hugging_face(
            "Perceiver", num_latents=6, d_latents=32, d_model=16, num_blocks=1, num_self_attends_per_block=3,
            num_self_attention_heads=4, num_cross_attention_heads=4,
        ),
        {"inputs": torch.randn(2, 9, 16, generator=generator(4))},
    ),
    "BART": family(hugging_face("Bart", **PAIR), BOTH, eager=STREAMS, implementations=TWO),
    "Marian": family(hugging_face("Marian", **PAIR), BOTH, eager=STREAMS),
    "T5 (relative bias)": family(
        hugging_face("T5", decoder_start_token_id=0, **T5), BOTH, eager=STREAMS, implementations=TWO
    ),
    "Whisper": family(
        hugging_face("Whisper", **{**PAIR, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 16}),
        {"input_features": torch.randn(B, 8, 24, generator=generator(5)), "decoder_input_ids": IDS},
        eager=STREAMS,
    ),
    "ViT": family(hugging_face("ViT", **IMAGE), VIEW, implementations=TWO),
    "BEiT (relative bias)": family(hugging_face("Beit", use_relative_position_bias=True, **IMAGE), VIEW),
    "SigLIP": family(hugging_face("SiglipVision", **IMAGE), VIEW, implementations=TWO),
    "wav2vec 2.0": family(hugging_face("Wav2Vec2", **SOUND), WAVE),
    # Refused, by what they do.
    "Jamba": family(
        hugging_face(
            "Jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2,
            num_experts_per_tok=1, use_mamba_kernels=False, mamba_d_state=4, **{**GROUPED, "num_hidden_layers": 4},
        ),
        TOKENS, refused=MIXED, single=True,
    ),
    "Bamba": family(
        hugging_face("Bamba", attn_layer_indices=[1, 3], **MAMBA, **{**GROUPED, "num_hidden_layers": 4}),
        TOKENS, refused=MIXED,
    ),
    "Zamba": family(
        hugging_face(
            "Zamba", attention_head_dim=16, n_mamba_heads=2, mamba_d_state=4, use_mamba_kernels=False,
            attn_layer_period=2, attn_layer_offset=1, **{**TEXT, "num_hidden_layers": 6, "num_key_value_heads": 4},
        ),
        TOKENS, refused=MIXED,
    ),
    "Falcon-H1": family(
        hugging_face("FalconH1", mamba_d_ssm=64, **MAMBA, **GROUPED), TOKENS, refused=MIXED, implementations=TWO
    ),
    "Granite hybrid": family(
        hugging_face(
            "GraniteMoeHybrid", layer_types=["attention", "mamba", "attention"], num_local_experts=0, **MAMBA, **GROUPED
        ),
        TOKENS, refused=MIXED,
    ),
    "RecurrentGemma": family(
        hugging_face(
            "RecurrentGemma", lru_width=32, attention_window_size=16,
            **{**GROUPED, "num_hidden_layers": 6, "num_key_value_heads": 1},
        ),
        TOKENS, refused=MIXED, stateful=True, implementations=("sdpa",),
    ),
    "LFM2": family(
        hugging_face(
            "Lfm2", layer_types=["conv", "full_attention"] * 2, **{**GROUPED, "num_hidden_layers": 4}
        ),
        TOKENS, refused=MIXED, implementations=TWO,
    ),
    "Conformer": family(hugging_face("Wav2Vec2Conformer", **SOUND), WAVE, refused=MIXED),
    "Nyströmformer": family(hugging_face("Nystromformer", **TEXT), TOKENS, refused=MIXED),
    "ConvBERT": family(hugging_face("ConvBert", embedding_size=32, **TEXT), TOKENS, refused=MIXED),
    "Gemma 2 (soft-capping)": family(hugging_face("Gemma2", attn_logit_softcapping=2.0, **GROUPED), TOKENS),
    "GPT-OSS (sinks)": family(
        hugging_face("GptOss", num_local_experts=2, num_experts_per_tok=1, **GROUPED),
        TOKENS, single=True,
    ),
    "Gemma 3n (shared keys)": family(
        hugging_face(
            "Gemma3nText", vocab_size_per_layer_input=99, hidden_size_per_layer_input=8, num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2, laurel_rank=4, altup_num_inputs=2,
            activation_sparsity_pattern=[0.0] * 4, **{**GROUPED, "num_hidden_layers": 4},
        ),
        {"input_ids": IDS}, refused="keys made of an earlier layer's state", implementations=TWO,
    ),
    "DiffLlama": family(
        hugging_face("DiffLlama", **GROUPED), TOKENS, refused="parts of one attention", implementations=TWO
    ),
    "WavLM": family(hugging_face("WavLM", **SOUND), WAVE, refused="multi_head_attention_forward itself"),
    "Longformer": family(
        hugging_face("Longformer", attention_window=4, **TEXT), TOKENS, refused="no softmax attention"
    ),
    "Swin": family(
        hugging_face("Swin", image_size=32, patch_size=2, embed_dim=16, window_size=4, depths=[2, 2], num_heads=[2, 4]),
        VIEW, refused="32 sequences for inputs of 2", implementations=TWO,
    ),
    "SegFormer": family(
        hugging_face("Segformer", depths=[1] * 4, hidden_sizes=[8, 16, 16, 16], num_attention_heads=[1, 2, 2, 2]),
        VIEW, refused="keys of a shortened sequence|no softmax attention", implementations=TWO,
    ),
    "FNet": family(hugging_face("FNet", **TEXT), {"input_ids": IDS}, refused="none was seen"),
    "Mamba": family(hugging_face("Mamba", **TEXT), {"input_ids": IDS}, refused="none was seen"),
}  # fmt: skip
