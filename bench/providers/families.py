"""One model of each family with random weights, and how its users get relevance from it; nothing is downloaded."""

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import rollout
from bench.machine import host
from bench.providers import oracle
from rollout.bench import end_to_end, naive_chain
from rollout.bench.chains import NAIVE

# B, S (of images, of the side), H, L, E; small in the quick run.
TEXT, TEXT_SMALL = (16, 256, 8, 4, 256), (2, 16, 2, 2, 16)
IMAGE, IMAGE_SMALL = (16, 224, 3, 12, 192), (2, 32, 2, 2, 16)  # ViT-tiny's
BERT_BASE, BERT_SMALL = (16, 512, 12, 12, 768), (4, 64, 4, 3, 64)
PATCH = 16


@dataclass(frozen=True, eq=False)
class Family:
    """A model and its input. Relevance of each sample's read row, [B, S] or in one vector, comes three ways.

    `theirs()`: as its users compute it, by stored maps and the naive chain or PyHealth's interpreter; `ours()`; and
    `exact()`, the float64 oracle. `forward()` is the model's output alone, as the model runs it.
    """

    peer: str  # who computes `theirs`
    model: nn.Module
    theirs: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    forward: Callable[[], Tensor]
    exact: Callable[[], Tensor]
    shape: dict[str, int]


def of_maps(
    model: nn.Module, forward: Callable[[], Any], maps: Callable[[], list[Tensor]], stream: str, *sizes: int
) -> Family:
    """A family whose users keep every map and multiply them, and read the row of position 0."""

    def ours() -> Tensor:
        with rollout.capture(model) as tape:
            forward()
        return tape.rollout(0)[stream]

    shape = dict(zip("BSHLE", sizes, strict=True))
    return Family(NAIVE, model, lambda: naive_chain(maps()), ours, forward, lambda: oracle.from_maps(maps()), shape)


def eager_copy(model: nn.Module, sites: str) -> tuple[Any, list[Any], list[Tensor]]:
    """A copy for its maps: it, its attentions, each as `sites` names it, and the list that their hooks fill."""
    eager = copy.deepcopy(model)
    return eager, [module for name, module in eager.named_modules() if name.endswith(sites)], []


def taken(run: Callable[[], Any], kept: list[Tensor]) -> list[Tensor]:
    """What the hooks kept of a call; they hold on to nothing."""
    run()
    found = kept[:]
    kept.clear()
    return found


def torch_encoder(quick: bool) -> Family:
    """`nn.TransformerEncoder`; its maps by hooks that ask each attention for its weights."""
    batch, seq, heads, layers, width = sizes = TEXT_SMALL if quick else TEXT
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval().to(host.DEVICE)
    x = torch.randn(batch, seq, width).to(host.DEVICE)
    eager, sites, kept = eager_copy(model, "self_attn")
    ask = {"need_weights": True, "average_attn_weights": False}
    for site in sites:
        site.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs | ask), with_kwargs=True)
        site.register_forward_hook(lambda module, args, output: kept.append(output[1]))
    return of_maps(model, lambda: model(x), lambda: taken(lambda: eager(x), kept), "layers", *sizes)


@cache
def make_bert(batch: int, seq: int, *sizes: int) -> Family:
    inputs = {"input_ids": torch.randint(1000, 30000, (batch, seq)).to(host.DEVICE)}
    return _hugging_face("Bert", inputs, "encoder.layer", batch, seq, *sizes)


def vit(quick: bool) -> Family:
    batch, side, *sizes = IMAGE_SMALL if quick else IMAGE
    inputs = {"pixel_values": torch.randn(batch, 3, side, side).to(host.DEVICE)}
    shape = batch, 1 + (side // PATCH) ** 2, *sizes
    return _hugging_face("ViT", inputs, "layers", *shape, image_size=side, patch_size=PATCH)


def _hugging_face(kind: str, inputs: dict[str, Tensor], stream: str, *shape: int, **config: int) -> Family:
    """Plain attention with `output_attentions` for theirs, fused attention for ours."""
    import transformers

    *_, heads, layers, width = shape
    config |= {"hidden_size": width, "intermediate_size": 4 * width}
    config |= {"num_attention_heads": heads, "num_hidden_layers": layers}
    made = getattr(transformers, f"{kind}Config")(**config)
    model = getattr(transformers, f"{kind}Model")(made, add_pooling_layer=False).eval().to(host.DEVICE)
    eager = copy.deepcopy(model)
    model.set_attn_implementation("sdpa")
    eager.set_attn_implementation("eager")

    def maps() -> list[Tensor]:
        return list(eager(**inputs, output_attentions=True).attentions)

    return of_maps(model, lambda: model(**inputs)[0], maps, stream, *shape)


def timm_vit(quick: bool) -> Family:
    """timm's ViT; its maps by hooks on the dropout of unfused attention."""
    from timm.models.vision_transformer import VisionTransformer

    batch, side, heads, layers, width = IMAGE_SMALL if quick else IMAGE
    model = VisionTransformer(img_size=side, patch_size=PATCH, embed_dim=width, depth=layers, num_heads=heads)
    model = model.eval().to(host.DEVICE)
    image = torch.randn(batch, 3, side, side).to(host.DEVICE)
    eager, sites, kept = eager_copy(model, ".attn")
    for site in sites:
        site.fused_attn = False
        site.attn_drop.register_forward_hook(lambda module, args, output: kept.append(output))
    sizes = batch, 1 + (side // PATCH) ** 2, heads, layers, width
    return of_maps(model, lambda: model(image), lambda: taken(lambda: eager(image), kept), "blocks", *sizes)


@cache
def pyhealth_transformer(quick: bool) -> Family:
    """The model of the suite "PyHealth end to end"."""
    batch, seq, heads, layers = (2, 12, 2, 2) if quick else (16, 256, 8, 4)
    model = end_to_end.make_model(heads, layers, host.DEVICE)
    batches = end_to_end.make_batches(f"S={seq}", batch, host.DEVICE)
    exact = partial(end_to_end.exact, model, batches)
    return _pyhealth(model, batches[0], exact, B=batch, H=heads, S=seq, L=layers, E=end_to_end.EMBEDDING)


def pyhealth_stage_net(quick: bool) -> Family:
    """One feature of visits with times; the oracle is PyHealth's own in float64."""
    from pyhealth.datasets import create_sample_dataset, get_dataloader
    from pyhealth.interpret.methods import AttentionRollout as Theirs
    from pyhealth.models import StageAttentionNet

    batch, seq, heads, width = (2, 6, 2, 8) if quick else (16, 64, 4, 64)
    visits = [([0.5 * k for k in range(seq)], [[f"c{(7 * i + k) % 97}", f"c{k % 89}"] for k in range(seq)])
              for i in range(batch)]  # fmt: skip
    samples = [{"patient_id": f"p{i}", "visit_id": "v", "codes": each, "label": i % 2} for i, each in enumerate(visits)]
    dataset = create_sample_dataset(samples, {"codes": "stagenet"}, {"label": "binary"}, dataset_name="bench")
    data = next(iter(get_dataloader(dataset, batch_size=batch, shuffle=False)))
    model = StageAttentionNet(dataset, embedding_dim=width, chunk_size=width // 4, levels=3, num_heads=heads)
    model = model.eval().to(host.DEVICE)

    def exact() -> Tensor:
        wide = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, data)
        return end_to_end.attribute(Theirs(copy.deepcopy(model).double()), [wide])

    return _pyhealth(model, data, exact, B=batch, H=heads, S=seq, L=1, E=width)


def _pyhealth(model: Any, data: dict[str, Any], exact: Callable[[], Tensor], **shape: int) -> Family:
    """PyHealth's interpreter against ours."""
    from pyhealth.interpret.methods import AttentionRollout as Theirs

    from rollout.pyhealth import AttentionRollout

    theirs, ours = (partial(end_to_end.attribute, kind(model), [data]) for kind in (Theirs, AttentionRollout))
    return Family(end_to_end.STOCK, model, theirs, ours, partial(end_to_end.plain_forward, model, [data]), exact, shape)


# Name → how it is made, and the library it needs beside torch.
FAMILIES: dict[str, tuple[Callable[[bool], Family], str]] = {
    "torch encoder": (torch_encoder, "torch"),
    "BERT": (lambda quick: make_bert(*(TEXT_SMALL if quick else TEXT)), "transformers"),
    "ViT": (vit, "transformers"),
    "timm ViT": (timm_vit, "timm"),
    "PyHealth Transformer": (pyhealth_transformer, "pyhealth"),
    "PyHealth StageAttentionNet": (pyhealth_stage_net, "pyhealth"),
}


@cache
def make(name: str, quick: bool) -> Family | None:
    """The model and its input, small in the quick run; None where its library is not installed."""
    maker, library = FAMILIES[name]
    if importlib.util.find_spec(library) is None:
        return None
    torch.manual_seed(0)
    return maker(quick)
