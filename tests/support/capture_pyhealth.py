"""PyHealth's models with attention, tiny and random, and what a capture must say of each."""

import atexit
import copy
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torchvision
from pyhealth import models
from pyhealth.datasets import create_sample_dataset, get_dataloader
from pyhealth.models.molerec import SAB, MoleRecLayer
from pyhealth.models.transformer import Attention
from pyhealth.processors import NestedMultiHotProcessor
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer
from transformers import BertConfig, BertModel, BertTokenizerFast

from tests.support.capture_family import Family, Maps
from tests.support.cases import generator
from tests.support.oracles import joint_rollout

E, H = 16, 4
TEXTS = ["fever and chest pain", "no pain", "the patient has a fever"]
VISITS = [[["a", "b"], ["c"]], [["a"], ["b", "c"], ["d"]], [["d", "e", "a"]]]
BOTH_OF = ("codes", "drugs")
CODES = [["a", "b", "c"], ["d", "a", "e"], ["e", "b", "c"]]
SEEN_NONE, UNSEEN = "none was seen", "no softmax attention of it was seen"


@cache
def data(kind: str) -> tuple[Any, dict[str, Any]]:
    """A sample dataset, and all of it as PyHealth's loader gives it."""
    draw = partial(torch.randn, generator=generator(3))
    schema, columns, labels = {
        "text": ({"text": "text"}, {"text": TEXTS}, "binary"),
        "words": ({"text": "text"}, {"text": TEXTS}, "text"),
        "images": ({"image": "tensor"}, {"image": draw(3, 3, 16, 16).tolist()}, "binary"),
        "labs": ({"labs": "tensor"}, {"labs": draw(3, 4, 5).tolist()}, "binary"),
        "stream": ({"visits": "nested_sequence"}, {"visits": VISITS}, "binary"),
        "many hot": ({"visits": NestedMultiHotProcessor}, {"visits": VISITS}, "binary"),
        "pairs": (dict.fromkeys(("codes", "d_codes"), "sequence"), {"codes": CODES, "d_codes": CODES[::-1]}, "binary"),
        "visits": (dict.fromkeys(BOTH_OF, "nested_sequence"), dict.fromkeys(BOTH_OF, VISITS), "binary"),
        "signals": (
            {"signal": "tensor", "stft": "tensor"},
            {"signal": draw(3, 2, 400).tolist(), "stft": draw(3, 2, 100, 3).tolist()},
            "binary",
        ),
    }[kind]  # fmt: skip
    samples = [
        {"patient_id": f"p{i}", "label": i % 2 if labels == "binary" else " ".join("O" for _ in TEXTS[i].split())}
        | {key: column[i] for key, column in columns.items()}
        for i in range(3)
    ]
    dataset = create_sample_dataset(samples, schema, {"label": labels}, dataset_name=kind)
    return dataset, next(iter(get_dataloader(dataset, batch_size=3, shuffle=False)))


def model_of(kind: str, cls: Any, *args: Any, **options: Any) -> Callable[[str], Any]:
    def make(_: str) -> Any:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls(data(kind)[0], *args, **options).eval()

    return make


def batch(kind: str) -> dict[str, Any]:
    return data(kind)[1]


@cache
def bert(config_class: Any = BertConfig, model_class: Any = BertModel) -> str:
    """A folder with a small random BERT, or a relative of it, and its tokenizer, gone when the process ends."""
    folder = tempfile.mkdtemp(prefix="tiny-bert-")
    atexit.register(shutil.rmtree, folder)
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = Path(folder, "vocab.txt")
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    torch.manual_seed(1)
    config = config_class(
        vocab_size=5 + len(words), hidden_size=E, num_hidden_layers=3, num_attention_heads=H, intermediate_size=2 * E,
        initializer_range=0.5,
    )  # fmt: skip
    model_class(config).save_pretrained(folder)
    return folder


def text_model(kind: str, cls: Any, part: str, folder: Callable[[], str] = bert) -> Callable[[str], Any]:
    def make(implementation: str) -> Any:
        model = model_of(kind, cls, folder())(implementation)
        getattr(model, part).set_attn_implementation(implementation)
        return model

    return make


def text_batch(kind: str) -> dict[str, Any]:
    """What the loader gives, and which tokens the model will make of it; it takes no notice of more arguments."""
    tokens = BertTokenizerFast.from_pretrained(bert())(TEXTS, padding=True, return_tensors="pt")
    return {**batch(kind), "attention_mask": tokens["attention_mask"]}


@contextmanager
def calls_of(part: Any) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments a part of a model is called with in the block."""
    calls: list[dict[str, Any]] = []
    with part.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True):
        yield calls


def hugging_face(part: str, **streams: str) -> Callable[..., Maps]:
    """The maps that the Hugging Face model inside hands out, by the names of its outputs."""

    def maps(model: Any, inputs: dict[str, Any], tape: Any) -> Maps:
        inner = getattr(model, part)
        inner.set_attn_implementation("eager")
        with torch.no_grad(), calls_of(inner) as calls:
            model(**inputs)
        with torch.no_grad():
            output = inner(**calls[0], output_attentions=True)
        return {stream: list(output[name]) for name, stream in streams.items()}

    return maps


def vision_model(name: str, make: Callable[[], nn.Module]) -> Callable[[str], Any]:
    """PyHealth's wrapper around a small model where it asks torchvision for a whole one."""

    def made(_: str) -> Any:
        with mock.patch.object(torchvision.models, "get_model", return_value=make()):
            return model_of("images", models.TorchvisionModel, name, {})("")

    return made


def small_vit() -> nn.Module:
    vit = VisionTransformer(image_size=16, patch_size=4, num_layers=3, num_heads=H, hidden_dim=E, mlp_dim=2 * E)
    with torch.no_grad():
        vit.class_token.normal_()
        for layer in vit.encoder.layers:
            layer.self_attention.in_proj_weight.mul_(3)
    return vit


def vit_maps(model: Any, inputs: dict[str, Any], tape: Any) -> Maps:
    """What each MultiheadAttention hands out when it is asked for weights.

    Not those of `forward_with_attention` of the model: it leaves out the position embedding.
    """
    maps: list[Tensor] = []
    for layer in model.model.encoder.layers:
        layer.ln_1.register_forward_hook(
            lambda _, args, x, attend=layer.self_attention: maps.append(attend(x, x, x, average_attn_weights=False)[1])
        )
    with torch.no_grad():
        model(**inputs)
    return {"model.encoder.layers": maps}


def text_embedding(_: str) -> Any:
    """It runs its BERT for one text after another."""
    torch.manual_seed(0)
    return models.TextEmbedding(bert(), E).eval()


def generator_model(cls: Any, part: str, **options: Any) -> Callable[[str], Any]:
    def make(implementation: str) -> Any:
        model = model_of("stream", cls, embed_dim=E, n_heads=H, n_layers=3, max_len=32, **options)(implementation)
        getattr(model, part).set_attn_implementation(implementation)
        return model

    return make


# No span is masked, so that each call is of the same tokens.
prompt_ehr = generator_model(models.PromptEHR, "bart", prompt_length=2, mask_prob=0.0)
gpt2 = generator_model(models.GPT2, "gpt2")


def prompt_batch() -> dict[str, Any]:
    model = prompt_ehr("eager")
    ids, mask, _ = model._encode_batch(batch("stream")["visits"])
    return {**batch("stream"), "attention_mask": model._encoder_inputs_embeds(ids, mask)[1]}


def prompt_ehr_rollout(model: Any, inputs: dict[str, Any]) -> tuple[np.ndarray, Tensor]:
    """Rows of a PromptEHR's decoder over [decoder; encoder], by the maps that its BART makes; and the labels it had."""
    twin = copy.deepcopy(model.bart)
    twin.set_attn_implementation("eager")
    with torch.inference_mode(), calls_of(model.bart) as calls:
        model(**inputs)
        maps = twin(**calls[0], output_attentions=True)
    wanted = joint_rollout(maps.encoder_attentions, maps.decoder_attentions, maps.cross_attentions)
    return wanted, calls[0]["labels"]


def gpt2_batch() -> dict[str, Any]:
    return {**batch("stream"), "attention_mask": gpt2("eager")._encode_visits(batch("stream")["visits"])[1]}


def halo_maps(model: Any, inputs: dict[str, Any], tape: Any) -> Maps:
    """By hand: causal, over the visits, with a start and an end."""
    maps: list[Tensor] = []

    def keep(attention: Any, args: Any, output: Any) -> None:
        q, k, _ = (x.unflatten(-1, (H, -1)).transpose(1, 2) for x in attention.c_attn(args[0]).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        causal = torch.ones_like(scores, dtype=torch.bool).tril()
        maps.append(scores.masked_fill(~causal, -math.inf).softmax(-1))

    for block in model.halo_model.transformer.h:
        block.attn.register_forward_hook(keep)
    with torch.no_grad():
        model(**inputs)
    return {"halo_model.transformer.h": maps}


def kept_maps(model: Any, inputs: dict[str, Any], tape: Any) -> Maps:
    """What PyHealth's own `Attention` gives beside its output, each module in the stream that the tape has it in."""
    maps: Maps = {}
    for stream in tape.streams:
        maps[stream] = []
        for path in tape.modules(stream):
            for attention in model.get_submodule(path).modules():
                if isinstance(attention, Attention):
                    attention.register_forward_hook(lambda _, args, out, held=maps[stream]: held.append(out[1]))
    with torch.no_grad():
        model(**inputs)
    return maps


def pairs() -> dict[str, Any]:
    return {"query_id": ["a", "b", "c"], "id_p": ["x", "y", "z"], "s_q": CODES, "s_p": CODES[::-1]}


def sets(_: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(SAB(E, E, 2, use_ln=True), SAB(E, E, H)).eval()


SETS = {"input": torch.randn(3, 7, E, generator=generator(4))}


def set_maps(model: Any, inputs: dict[str, Any], tape: Any) -> Maps:
    maps, x = [], inputs["input"]
    with torch.no_grad():
        for block in model:
            net = block.net
            q, k = (
                dense(x).unflatten(-1, (net.number_heads, -1)).transpose(1, 2) for dense in (net.Qdense, net.Kdense)
            )
            maps.append((q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1))
            x = block(x)
    return {"layers": maps}


def molerec(_: str) -> Any:
    torch.manual_seed(0)
    return MoleRecLayer(E, GNN_layers=2).eval()


def graph(nodes: int, graphs: int) -> dict[str, Any]:
    """So many rings of atoms."""
    edges = torch.stack([torch.arange(nodes), (torch.arange(nodes) + 1) % nodes])
    return {
        "x": torch.arange(9 * nodes).reshape(nodes, 9) % 2,
        "edge_index": edges,
        "edge_attr": torch.zeros(nodes, 3, dtype=torch.long),
        "batch": torch.arange(nodes) % graphs,
        "num_nodes": nodes,
        "num_edges": nodes,
    }


def molerec_batch() -> dict[str, Any]:
    return {
        "patient_emb": torch.randn(3, 2, 5, generator=generator(5)),
        "drugs": torch.ones(3, 4),
        "average_projection": torch.eye(4),
        "ddi_adj": torch.zeros(4, 4),
        "substructure_mask": torch.ones(4, 5),
        "substructure_graph": graph(10, 5),
        "molecule_graph": graph(8, 4),
    }


def gamenet(_: str) -> Any:
    torch.manual_seed(0)
    return models.GAMENetLayer(E, torch.ones(6, 6), torch.eye(6)).eval()


GAMENET = {
    "queries": torch.randn(3, 5, E, generator=generator(6)),
    "prev_drugs": torch.ones(3, 5, 6),
    "curr_drugs": torch.ones(3, 6),
}


def refused(
    make: Callable[[str], Any], inputs: Any, reason: str, kind: str = "plain", stateful: bool = False
) -> Family:
    inputs = partial(batch, inputs) if isinstance(inputs, str) else inputs
    no_maps: Any = lambda *args: {}  # noqa: E731
    return Family(make, inputs, no_maps, reason, (kind,), single=True, stateful=stateful)


SWIN = partial(SwinTransformer, patch_size=[2, 2], embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=[2, 2])
LAYERS = {"embed_dim": E, "n_heads": H, "n_layers": 3}
TFM = {"trans_freq_encoder_depth": 1, "trans_temporal_encoder_depth": 1, "trans_decoder_depth": 1}
BOTH = ("eager", "sdpa")
BERT = "encoder.layer"

PYHEALTH: dict[str, Family] = {
    "TransformersModel (BERT)": Family(
        text_model("text", models.TransformersModel, "model"), partial(text_batch, "text"),
        hugging_face("model", attentions=f"model.{BERT}"), implementations=BOTH,
    ),
    "TransformerDeID (BERT)": Family(
        text_model("words", models.TransformerDeID, "encoder"), partial(text_batch, "words"),
        hugging_face("encoder", attentions=f"encoder.{BERT}"), implementations=BOTH,
    ),
    "TorchvisionModel (ViT)": Family(
        vision_model("vit_b_16", small_vit), partial(batch, "images"), vit_maps, implementations=("fused",)
    ),
    "PromptEHR (BART)": Family(
        prompt_ehr, prompt_batch,
        hugging_face(
            "bart", encoder_attentions="bart.model.encoder.layers", decoder_attentions="bart.model.decoder.layers"
        ),
        implementations=BOTH,
    ),
    "GPT2": Family(
        gpt2, gpt2_batch, hugging_face("gpt2", attentions="gpt2.transformer.h"), implementations=BOTH
    ),
    "TextEmbedding (BERT)": refused(text_embedding, {"text": TEXTS}, "a module must attend once in a call", "sdpa"),
    "HALO": Family(
        model_of("many hot", models.HALO, n_ctx=8, **LAYERS), partial(batch, "many hot"), halo_maps,
        implementations=("plain",), single=True,
    ),
    "MedLink": Family(
        model_of("pairs", models.MedLink, embedding_dim=E, heads=H, num_layers=3), pairs, kept_maps,
        implementations=("plain",),
    ),
    "MoleRec (its set attention)": Family(sets, SETS, set_maps, implementations=("plain",)),
    "MoleRec (its layer)": refused(molerec, molerec_batch, UNSEEN),
    "ConCare": refused(
        model_of("labs", models.ConCare, hidden_dim=E, num_head=H), "labs", "got 1 queries and 4 keys", stateful=True
    ),
    "TorchvisionModel (Swin)": refused(
        vision_model("swin_t", SWIN), "images", "it attends within parts of a sample"
    ),
    "JambaEHR": refused(
        model_of("pairs", models.JambaEHR, embedding_dim=E, heads=2, num_transformer_layers=2, num_mamba_layers=2),
        "pairs", "positions are mixed by something else", stateful=True,
    ),
    "GAT": refused(model_of("visits", models.GAT, embedding_dim=E, nhid=E), "visits", UNSEEN),
    "BIOT (linear attention)": refused(
        model_of(
            "signals", models.BIOT, emb_size=E, heads=H, depth=2, n_channels=2, n_fft=100, hop_length=50
        ),
        "signals", UNSEEN,
    ),
    "TFMTokenizer (linear attention)": refused(
        model_of(
            "signals", models.TFMTokenizer, emb_size=E, code_book_size=32, classifier_depth=1, classifier_heads=H, **TFM
        ),
        "signals", UNSEEN, stateful=True,
    ),
    "RETAIN": refused(model_of("visits", models.RETAIN, embedding_dim=E), "visits", SEEN_NONE),
    "AdaCare": refused(model_of("visits", models.AdaCare, embedding_dim=E, hidden_dim=E), "visits", SEEN_NONE),
    "Agent": refused(
        model_of("visits", models.Agent, embedding_dim=E, hidden_dim=E), "visits", SEEN_NONE, stateful=True
    ),
    "GAMENet (its layer)": refused(gamenet, GAMENET, SEEN_NONE),
    "EHRMamba": refused(model_of("pairs", models.EHRMamba, embedding_dim=E), "pairs", SEEN_NONE),
}  # fmt: skip
