"""From a MEDS folder to a Hugging Face classifier and the run file that attributes with it.

    python examples/meds_classifier.py OUT [MEDS LABELS]

Without a folder of your own, a synthetic cohort is written and converted first. A small ModernBERT is trained for three
passes over all records, enough for a model to attribute with, not for one to learn from. OUT gets what `rollout
attribute OUT/run.toml` needs: `model/` (config.json and safetensors), `vocabulary.json`, `run.toml`. Under a minute on
two CPU cores. Needs the extras `cohort` and `hf`.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import ModernBertConfig, ModernBertForSequenceClassification

from rollout.data.meds import MedsDataset, fit_vocabulary
from rollout.data.meds.convert import convert_mimic
from rollout.data.synthetic import write_synthetic_cohort

LONGEST, PASSES, BATCH, FIRST = 254, 3, 32, "[CLS]"
RUN = """\
[model]
class = "transformers:AutoModelForSequenceClassification"
weights = "model"
vocabulary = "vocabulary.json"
arguments = {{ first = "{first}" }}

[dataset]
class = "MEDS"
root = '{root}'
arguments = {{ max_events = {longest} }}

[task]
labels = '{labels}'

[run]
output = "attributed"
"""


def main(out: Path, root: Path | None = None, labels: Path | None = None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if root is None or labels is None:
        root = out.absolute() / "meds"
        labels = root / "labels" / "mortality.parquet"
        write_synthetic_cohort(out / "tables", patients=600)
        convert_mimic(out / "tables", root)
    vocabulary = fit_vocabulary(root)
    vocabulary[FIRST] = len(vocabulary)
    data = MedsDataset(root, labels, vocabulary, max_events=LONGEST)
    torch.manual_seed(0)
    model = ModernBertForSequenceClassification(
        ModernBertConfig(
            vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=LONGEST + 2, classifier_pooling="cls", pad_token_id=0,
            cls_token_id=vocabulary[FIRST], bos_token_id=None, eos_token_id=None, sep_token_id=None,
        )
    )  # fmt: skip
    train(model, data, vocabulary[FIRST])
    model.save_pretrained(out / "model")
    (out / "vocabulary.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    said = RUN.format(first=FIRST, longest=LONGEST, root=root.absolute(), labels=labels.absolute())
    (out / "run.toml").write_text(said, encoding="utf-8")
    print(f"rollout attribute {out / 'run.toml'}")


def train(model: ModernBertForSequenceClassification, data: MedsDataset, first: int) -> None:
    """A few passes over every record, in batches of like length."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    lengths = [len(data[number]["codes"][1]) for number in range(len(data))]
    order = sorted(range(len(data)), key=lambda number: lengths[number])
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    for number in range(PASSES):
        losses = []
        for place in torch.randperm(len(batches)).tolist():
            batch = data.collate([data[number] for number in batches[place]])
            loss = model(**tokens(batch["codes"][1], first), labels=batch["label"][:, 0].long()).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        print(f"pass {number + 1}: loss {sum(losses) / len(losses):.3f}")


def tokens(codes: Tensor, first: int) -> dict[str, Tensor]:
    """Each record of codes [B, S] after the token that begins it, and which positions are there."""
    ids = torch.cat([codes.new_full((len(codes), 1), first), codes], 1)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


if __name__ == "__main__":
    if len(sys.argv) not in (2, 4):
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
