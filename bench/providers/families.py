"""One model of each family with random weights, and how its users get relevance from it: for `test_families.py`.

Nothing is downloaded. A `Family` gives the relevance of each sample's read row three ways: as its users compute it
(stored maps and the naive chain, or PyHealth's interpreter), ours, and the float64 oracle.
"""

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import rollout
from bench.machine import host
from bench.providers import chains, oracle

PYHEALTH = "PyHealth"
# Name → the library it needs beside torch, and the extra that brings it.
LIBRARIES = {
    "torch encoder": None,
    "BERT": "transformers",
    "ViT": "transformers",
    "timm ViT": "timm",
    "PyHealth Transformer": "pyhealth",
    "PyHealth StageAttentionNet": "pyhealth",
}


@dataclass(frozen=True)
class Family:
    """`theirs()` and `ours()` give the relevance [B, S]; `forward()` the model's output alone; `exact()` the oracle."""

    peer: str  # who computes `theirs`
    theirs: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    forward: Callable[[], Any]
    exact: Callable[[], Tensor]
    shape: dict[str, int]


def missing(name: str) -> str | None:
    """Why a family cannot be made here, or None."""
    library = LIBRARIES[name]
    if library is None or importlib.util.find_spec(library) is not None:
        return None
    return f"{library} is not installed"


@cache
def make(name: str, quick: bool) -> Family:
    """The model and its input; small in the quick run."""
    torch.manual_seed(0)
    makers = {
        "torch encoder": torch_encoder,
        "BERT": bert,
        "ViT": vit,
        "timm ViT": timm_vit,
        "PyHealth Transformer": pyhealth_transformer,
        "PyHealth StageAttentionNet": pyhealth_stage_net,
    }
    return makers[name](quick)


def of_maps(
    model: nn.Module, forward: Callable[[], Any], maps: Callable[[], list[Tensor]], stream: str, **shape: int
) -> Family:
    """A family whose users keep every map and multiply them, and read the row of position 0."""

    def ours() -> Tensor:
        with rollout.capture(model) as tape:
            forward()
        return tape.rollout(0)[stream]

    return Family(
        chains.NAIVE, lambda: chains.naive_chain(maps()), ours, forward, lambda: oracle.from_maps(maps()), shape
    )


def torch_encoder(quick: bool) -> Family:
    """`nn.TransformerEncoder`; its maps by hooks that ask each attention for its weights."""
    batch, seq, heads, layers, width = (2, 16, 2, 2, 16) if quick else (16, 256, 8, 4, 256)
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval().to(host.DEVICE)
    x = torch.randn(batch, seq, width).to(host.DEVICE)

    def asked(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"need_weights": True, "average_attn_weights": False}

    def maps() -> list[Tensor]:
        kept: list[Tensor] = []
        hooks = []
        for each in model.layers:
            hooks.append(each.self_attn.register_forward_pre_hook(asked, with_kwargs=True))
            hooks.append(each.self_attn.register_forward_hook(lambda module, args, output: kept.append(output[1])))
        try:
            model(x)
        finally:
            for hook in hooks:
                hook.remove()
        return kept

    return of_maps(model, lambda: model(x), maps, "layers", B=batch, H=heads, S=seq, L=layers, E=width)


def bert(quick: bool) -> Family:
    import transformers

    batch, seq, heads, layers, width = (2, 16, 2, 2, 16) if quick else (16, 256, 8, 4, 256)
    config = transformers.BertConfig(
        hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=4 * width
    )
    tokens = torch.randint(1000, 30000, (batch, seq)).to(host.DEVICE)
    sizes = {"B": batch, "H": heads, "S": seq, "L": layers, "E": width}
    return _hugging_face(transformers.BertModel, config, {"input_ids": tokens}, "encoder.layer", sizes)


def vit(quick: bool) -> Family:
    """ViT-tiny's sizes."""
    import transformers

    batch, side, heads, layers, width = (2, 32, 2, 2, 16) if quick else (16, 224, 3, 12, 192)
    config = transformers.ViTConfig(
        hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=4 * width,
        image_size=side, patch_size=16,
    )  # fmt: skip
    image = torch.randn(batch, 3, side, side).to(host.DEVICE)
    sizes = {"B": batch, "H": heads, "S": 1 + (side // 16) ** 2, "L": layers, "E": width}
    return _hugging_face(transformers.ViTModel, config, {"pixel_values": image}, "layers", sizes)


def _hugging_face(kind: Any, config: Any, inputs: dict[str, Tensor], stream: str, sizes: dict[str, int]) -> Family:
    """Plain attention with `output_attentions` for theirs, fused attention for ours; the same weights."""
    models = []
    for implementation in ("eager", "sdpa"):
        chosen = copy.deepcopy(config)
        chosen._attn_implementation = implementation
        models.append(kind(chosen, add_pooling_layer=False).eval().to(host.DEVICE))
    eager, fused = models
    eager.load_state_dict(fused.state_dict())
    return of_maps(
        fused,
        lambda: fused(**inputs)[0],
        lambda: list(eager(**inputs, output_attentions=True).attentions),
        stream,
        **sizes,
    )


def timm_vit(quick: bool) -> Family:
    """timm's ViT with ViT-tiny's sizes; its maps by hooks on the dropout of unfused attention."""
    from timm.models.vision_transformer import VisionTransformer

    batch, side, heads, layers, width = (2, 32, 2, 2, 16) if quick else (16, 224, 3, 12, 192)
    model = VisionTransformer(img_size=side, patch_size=16, embed_dim=width, depth=layers, num_heads=heads)
    model = model.eval().to(host.DEVICE)
    image = torch.randn(batch, 3, side, side).to(host.DEVICE)

    def maps() -> list[Tensor]:
        kept: list[Tensor] = []
        sites = [block.attn for block in model.blocks]
        fused = [site.fused_attn for site in sites]
        hooks = [site.attn_drop.register_forward_hook(lambda m, args, out: kept.append(out)) for site in sites]
        try:
            for site in sites:
                site.fused_attn = False
            model(image)
        finally:
            for site, was in zip(sites, fused, strict=True):
                site.fused_attn = was
            for hook in hooks:
                hook.remove()
        return kept

    sizes = {"B": batch, "H": heads, "S": 1 + (side // 16) ** 2, "L": layers, "E": width}
    return of_maps(model, lambda: model(image), maps, "blocks", **sizes)


def pyhealth_transformer(quick: bool) -> Family:
    from pyhealth.models import Transformer

    batch, seq, heads, layers, width = (2, 12, 2, 2, 16) if quick else (16, 256, 8, 4, 128)
    codes = [[f"c{(7 * i + k) % 997}" for k in range(seq)] for i in range(batch)]
    dataset, data = _dataset("sequence", codes)
    model = Transformer(dataset, embedding_dim=width, heads=heads, num_layers=layers)
    return _pyhealth(model, data, B=batch, H=heads, S=seq, L=layers, E=width)


def pyhealth_stage_net(quick: bool) -> Family:
    from pyhealth.models import StageAttentionNet

    batch, seq, heads, width = (2, 6, 2, 8) if quick else (16, 64, 4, 64)
    visits = [
        ([0.5 * k for k in range(seq)], [[f"c{(7 * i + k) % 97}", f"c{k % 89}"] for k in range(seq)])
        for i in range(batch)
    ]
    dataset, data = _dataset("stagenet", visits)
    model = StageAttentionNet(dataset, embedding_dim=width, chunk_size=width // 4, levels=3, num_heads=heads)
    return _pyhealth(model, data, B=batch, H=heads, S=seq, L=1, E=width)


def _dataset(schema: str, values: list[Any]) -> tuple[Any, dict[str, Any]]:
    """A PyHealth dataset of one feature, and its samples as one batch."""
    from pyhealth.datasets import create_sample_dataset, get_dataloader

    samples = [
        {"patient_id": f"p{i}", "visit_id": "v", "codes": value, "label": i % 2} for i, value in enumerate(values)
    ]
    dataset = create_sample_dataset(samples, {"codes": schema}, {"label": "binary"}, dataset_name="bench")
    return dataset, next(iter(get_dataloader(dataset, batch_size=len(samples), shuffle=False)))


def _pyhealth(model: Any, data: dict[str, Any], **sizes: int) -> Family:
    """PyHealth's interpreter against ours; the oracle is PyHealth's own in float64."""
    from pyhealth.interpret.methods import AttentionRollout as Theirs

    from rollout.pyhealth import AttentionRollout

    model = model.eval().to(host.DEVICE)

    def by(interpreter: Any, batch: dict[str, Any]) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():  # PyHealth's needs gradients
            return interpreter.attribute(**batch)["codes"].detach().flatten(1)

    def exact() -> Tensor:
        wide = {key: _double(value) for key, value in data.items()}
        return by(Theirs(copy.deepcopy(model).double()), wide)

    theirs, ours = Theirs(model), AttentionRollout(model)
    return Family(PYHEALTH, lambda: by(theirs, data), lambda: by(ours, data), lambda: model(**data), exact, sizes)


def _double(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_double(each) for each in value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
