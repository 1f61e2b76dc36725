"""Tiny random models of timm's families, and what a capture must say of each."""

import copy
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models import (
    beit,
    cait,
    convit,
    crossvit,
    deit,
    efficientformer,
    eva,
    hiera,
    levit,
    mvitv2,
    naflexvit,
    nest,
    pit,
    pvt_v2,
    tnt,
    twins,
    volo,
    xcit,
)
from timm.models import vision_transformer as vit
from timm.models import vision_transformer_relpos as relative
from timm.models import vision_transformer_sam as sam
from torch import Tensor, nn

from tests.support.capture_family import Family, Maps
from tests.support.cases import generator

SMALL, LARGE = ({"x": torch.randn(2, 3, size, size, generator=generator(2))} for size in (32, 64))
PATCHES = {
    "x": torch.randn(2, 16, 8 * 8 * 3, generator=generator(3)),
    "patch_coord": torch.stack([torch.arange(16) // 4, torch.arange(16) % 4], -1).expand(2, -1, -1),
    "patch_valid": torch.arange(16) < torch.tensor([[16], [9]]),
}
MIXED, WINDOWS, SHORTENED = "positions are mixed by something else", "parts of a sample", "keys of a shortened sequence"
NOT_KNOWN, UNSEEN = "scores or maps that cannot be recorded exactly", "no softmax attention of it was seen"
VIT: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5
}  # fmt: skip
PYRAMID: dict[str, Any] = {
    "img_size": 32, "patch_size": 4, "embed_dims": (16, 32), "num_heads": (2, 2), "mlp_ratios": (2, 2),
    "depths": (1, 1), "sr_ratios": (2, 1), "num_classes": 5,
}  # fmt: skip
SHIFTED: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}


def model_of(kind: Callable[..., nn.Module], *args: Any, **options: Any) -> Callable[[str], nn.Module]:
    """Makes a `kind` whose attention is fused or plain."""

    def make(implementation: str) -> nn.Module:
        torch.manual_seed(0)
        model = kind(*args, **copy.deepcopy(options)).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
        return _set_fused(model, implementation == "fused")

    return make


def named(name: str, **options: Any) -> Callable[[str], nn.Module]:
    """Makes the model of timm's that has this name, made small."""
    return model_of(timm.create_model, name, pretrained=False, **options)


def _set_fused(model: nn.Module, fused: bool) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model


def dropped(model: nn.Module, inputs: dict[str, Tensor], tape: Any) -> Maps:
    """The maps that go through the dropout of each attention, when it is not fused."""
    maps: Maps = {stream: [] for stream in tape.streams}
    for stream in tape.streams:
        for path in tape.modules(stream):
            model.get_submodule(path).attn_drop.register_forward_hook(
                lambda module, args, result, stream=stream: maps[stream].append(result)
            )
    with torch.no_grad():
        _set_fused(model, False)(**inputs)
    return maps


def right(make: Callable[[str], Any], inputs: dict[str, Tensor] = SMALL) -> Family:
    """A family that is captured."""
    return Family(make, inputs, dropped, implementations=("fused", "plain"), padding="patch_valid")


def refused(
    make: Callable[[str], Any], message: str, inputs: dict[str, Tensor] = SMALL, implementation: str = "fused"
) -> Family:
    """A family that is refused."""
    return Family(make, inputs, dropped, message, implementations=(implementation,))


def shifted(name: str) -> Callable[[str], nn.Module]:
    return named(name, img_size=32, patch_size=2, window_size=4, **SHIFTED)


TIMM: dict[str, Family] = {
    "ViT": right(model_of(vit.VisionTransformer, **VIT)),
    "ViT (registers, layer scale, QK norm)": right(
        model_of(vit.VisionTransformer, reg_tokens=4, init_values=0.1, qk_norm=True, no_embed_class=True, **VIT)
    ),
    "ViT (attention and MLP in parallel)": right(
        model_of(vit.VisionTransformer, block_fn=vit.ParallelScalingBlock, **VIT)
    ),
    "ViT (normalisation after)": right(
        model_of(vit.VisionTransformer, block_fn=vit.ResPostBlock, init_values=0.1, **VIT)
    ),
    "ViT (relative position bias)": right(model_of(relative.VisionTransformerRelPos, **VIT)),
    "ViT hybrid (ResNet stem)": right(
        named("vit_tiny_r_s16_p8_224", img_size=64, embed_dim=32, depth=2, num_heads=4), LARGE
    ),
    "DeiT (distilled)": right(model_of(deit.VisionTransformerDistilled, **VIT)),
    "BEiT (relative bias)": right(model_of(beit.Beit, use_rel_pos_bias=True, **VIT)),
    "EVA": right(model_of(eva.Eva, **VIT)),
    "EVA-02 (RoPE)": right(
        model_of(eva.Eva, use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, qkv_fused=False, **VIT)
    ),
    "DINOv3 (RoPE, registers)": right(
        model_of(
            eva.Eva, use_rot_pos_emb=True, rope_type="dinov3", num_reg_tokens=4, init_values=0.1,
            use_abs_pos_emb=False, **VIT,
        )
    ),
    "SigLIP (attention pooling)": right(
        model_of(vit.VisionTransformer, class_token=False, global_pool="map", **VIT)
    ),
    "FlexiViT": right(named("flexivit_small", **VIT)),
    "NaFlexViT (padded)": right(
        model_of(
            naflexvit.NaFlexVit, naflexvit.NaFlexVitCfg(patch_size=8, embed_dim=32, depth=3, num_heads=4),
            num_classes=5, img_size=32,
        ),
        PATCHES,
    ),
    "PiT (a stream a stage)": right(
        model_of(
            pit.PoolingVisionTransformer, img_size=64, patch_size=8, stride=8, base_dims=(8, 8, 8), depth=(2, 2, 2),
            heads=(2, 4, 4), mlp_ratio=2, num_classes=5,
        ),
        LARGE,
    ),
    "Swin (one window)": right(
        named("swin_tiny_patch4_window7_224", img_size=32, patch_size=8, window_size=4, embed_dim=16, depths=(3,),
              num_heads=(2,), num_classes=5)
    ),
    "ViT (attentions in parallel)": refused(
        model_of(vit.VisionTransformer, block_fn=vit.ParallelThingsBlock, **VIT), "they run side by side"
    ),
    "ViT (differential attention)": refused(
        model_of(vit.VisionTransformer, attn_layer="diff", **VIT), "parts of one attention"
    ),
    "ViT of SAM (windows)": refused(
        model_of(
            sam.VisionTransformerSAM, img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=4, window_size=4,
            global_attn_indexes=(1,), neck_chans=16,
        ),
        WINDOWS,
    ),
    "CaiT (talking heads)": refused(model_of(cait.Cait, **VIT), NOT_KNOWN),
    "ConViT (gated positions)": refused(
        model_of(convit.ConVit, local_up_to_layer=2, use_pos_embed=True, **VIT), NOT_KNOWN, implementation="plain"
    ),
    "XCiT (attention over channels)": refused(
        model_of(xcit.Xcit, **VIT), "attends over 8 positions in each of 2, and its stack works on 16"
    ),
    "EdgeNeXt (attention over channels)": refused(
        named("edgenext_xx_small", dims=(8, 16, 24, 32), depths=(1, 2, 2, 2), heads=(4,) * 4, num_classes=5),
        r"attends over 4 positions, and its stack works on images \[2, 8, 8, 8\]",
    ),
    "Swin": refused(shifted("swin_tiny_patch4_window7_224"), WINDOWS),
    "Swin v2": refused(shifted("swinv2_tiny_window8_256"), WINDOWS),
    "MaxViT": refused(
        named("maxvit_rmlp_pico_rw_256", img_size=64, embed_dim=(32, 64), depths=(1, 1), stem_width=8, num_classes=5),
        WINDOWS, LARGE,
    ),
    "CoAtNet": refused(
        named("coatnet_0_224", img_size=64, embed_dim=(8, 8, 32, 32), depths=(1, 1, 1, 1), stem_width=8, num_classes=5),
        "and its stack works on images", LARGE,
    ),
    "EfficientFormer (pooling)": refused(
        model_of(
            efficientformer.EfficientFormer, depths=(1, 1, 1, 2), embed_dims=(8, 8, 16, 32), num_vit=1, num_classes=5
        ),
        MIXED, {"x": torch.randn(2, 3, 224, 224, generator=generator(5))}, "plain",
    ),
    "MobileViT": refused(named("mobilevit_xxs", num_classes=5), WINDOWS, LARGE),
    "CrossViT": refused(
        model_of(
            crossvit.CrossVit, img_size=48, img_scale=(1.0, 1.0), patch_size=(12, 16), embed_dim=(16, 32),
            depth=((1, 2, 0), (1, 2, 0)), num_heads=(2, 2), mlp_ratio=(2, 2, 1), num_classes=5,
        ),
        "got 1 queries and 10 keys", {"x": torch.randn(2, 3, 48, 48, generator=generator(4))},
    ),
    "LeViT": refused(
        model_of(levit.Levit, img_size=64, embed_dim=(16, 32), key_dim=8, depth=(2, 2), num_heads=2, num_classes=5),
        SHORTENED, LARGE, "plain",
    ),
    "Twins-SVT": refused(model_of(twins.Twins, wss=(4, 4), **PYRAMID), "within parts of a sequence"),
    "Twins-PCPVT": refused(model_of(twins.Twins, wss=None, **PYRAMID), SHORTENED),
    "PVT v2": refused(
        model_of(
            pvt_v2.PyramidVisionTransformerV2, embed_dims=(8, 8, 16, 16), depths=(1,) * 4, num_heads=(1, 2, 2, 2),
            num_classes=5,
        ),
        SHORTENED,
    ),
    "MViT v2": refused(
        model_of(
            mvitv2.MultiScaleVit,
            mvitv2.MultiScaleVitCfg(depths=(1, 2), embed_dim=16, num_heads=1, stride_q=((1, 1), (2, 2))),
            img_size=64, num_classes=5,
        ),
        SHORTENED, LARGE, "plain",
    ),
    "VOLO": refused(
        model_of(
            volo.VOLO, layers=(1,) * 4, img_size=64, embed_dims=(16, 32, 32, 32), num_heads=(2,) * 4, num_classes=5
        ),
        UNSEEN, LARGE,
    ),
    "TNT": refused(
        model_of(
            tnt.TNT, img_size=32, patch_size=8, embed_dim=32, inner_dim=8, depth=2, num_heads_inner=2,
            num_heads_outer=4, num_classes=5,
        ),
        WINDOWS, implementation="plain",
    ),
    "Hiera": refused(
        model_of(hiera.Hiera, img_size=(64, 64), embed_dim=16, num_heads=1, stages=(1, 2, 1, 1), num_classes=5),
        "within parts of a sequence", LARGE,
    ),
    "NesT": refused(
        model_of(
            nest.Nest, img_size=32, patch_size=4, num_levels=2, embed_dims=(16, 32), num_heads=(2, 2), depths=(2, 2),
            num_classes=5,
        ),
        "within parts of a sequence",
    ),
}  # fmt: skip
