"""Tiny random sequence classifiers of transformers over event codes, saved as a user would have them."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from rollout.runfile.toml import write_toml
from tests.support.meds_folder import CODES, write_meds

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VOCABULARY = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *CODES[:-2]])}
"""Without the last two codes, which are then unknown."""
_TEXT = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, **SIZES}
_MODERN = {
    **_TEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "cls_token_id": 2,
    "sep_token_id": 3,
    "local_attention": 4,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {**_TEXT, "max_position_embeddings": 64}),
    "roberta": ("Roberta", {**_TEXT, "max_position_embeddings": 64}),
    "distilbert": (
        "DistilBert",
        {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    ),
    "modernbert": ("ModernBert", {**_MODERN, "num_hidden_layers": 4, "classifier_pooling": "cls"}),
    "modernbert-mean": ("ModernBert", {**_MODERN, "num_hidden_layers": 4, "classifier_pooling": "mean"}),
    "albert": ("Albert", {**_TEXT, "embedding_size": 16, "max_position_embeddings": 64}),
    "mistral": ("Mistral", {**_TEXT, "num_key_value_heads": 1, "sliding_window": 4}),
    "llama": ("Llama", {**_TEXT, "num_key_value_heads": 1}),
}
READS = {
    "bert": "first",
    "roberta": "first",
    "distilbert": "first",
    "modernbert": "first",
    "modernbert-mean": "mean",
    "albert": "first",
    "mistral": "last",
    "llama": "last",
}


def classifier(kind: str = "bert", **config: Any) -> Any:
    name, options = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(transformers, f"{name}Config")(**{**options, **config})
        model = getattr(transformers, f"{name}ForSequenceClassification")(made).eval()
        for parameter in model.parameters():  # large enough that attention is far from uniform
            parameter.data.add_(0.15 * torch.randn(parameter.shape))
    return model


def home(folder: Path, kind: str = "bert", tables: dict[str, dict[str, Any]] | None = None, **config: Any) -> Path:
    """A folder with `meds`, `model`, `vocabulary.json` and the `run.toml` that is returned."""
    write_meds(folder / "meds")
    classifier(kind, **config).save_pretrained(folder / "model")
    (folder / "vocabulary.json").write_text(json.dumps(VOCABULARY))
    given = tables or {}
    model = {
        "class": "transformers:AutoModelForSequenceClassification", "weights": "model",
        "vocabulary": "vocabulary.json", "arguments": {"first": "[CLS]", "last": "[SEP]"},
    }  # fmt: skip
    written = {
        "model": model,
        "dataset": {"class": "MEDS", "root": "meds"},
        "task": {"labels": "meds/labels/dies.parquet"},
        "run": {"output": "attributed", "batch_tokens": 200},
    }
    return write_toml({name: {**table, **given.get(name, {})} for name, table in written.items()}, folder / "run.toml")
