"""A cohort without PyHealth: records of codes, a small attention model, and how it is explained.

Everything is made from the record's number, so that another process makes the same.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import rollout
from rollout.cohort.explain import Explained

CODES = 40
NASTY = [
    '<script>alert("x")</script>',
    "line\nbreak",
    "quote'\"`",
    "Ünïcödé 病 \u202e🫀",
    "",
    "a,b;c\td",
    "&amp; %s {0}",
]
VOCABULARIES: dict[str, dict[str, int] | None] = {
    "codes": {"<pad>": 0} | {(NASTY[k] if k < len(NASTY) else f"c{k}"): k + 1 for k in range(CODES)},
    "labs": None,
}


class Records:
    """`count` records: codes int64 [n], labs float32 [m], label; every third patient has one record, else two."""

    def __init__(self, count: int, spoiled: Mapping[int, str] | None = None) -> None:
        self.count, self.spoiled = count, dict(spoiled or {})

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        rng = np.random.default_rng(number)
        sample = {
            "patient_id": f"p{number // 2} {NASTY[number % len(NASTY)]}",
            "visit_id": None if number % 5 == 0 else number,
            "codes": torch.from_numpy(rng.integers(1, CODES + 1, 1 + number * 7 % 23)),
            "labs": torch.from_numpy(rng.normal(size=1 + number % 4).astype(np.float32)),
            "label": torch.tensor([float(number % 3 == 0)]),
        }
        spoiled = self.spoiled.get(number)
        if spoiled == "unreadable":
            raise OSError("block 7 cannot be read")
        if spoiled == "nan":
            sample["labs"][0] = float("nan")
        elif spoiled == "bad tensor":
            sample["codes"] = sample["codes"].float()[:, None].expand(-1, 2)
        elif spoiled == "unknown code":
            sample["codes"][0] = CODES + 99
        return sample


class Attention(nn.Module):
    """Two streams of two attention layers; the prediction reads position 0 of each."""

    def __init__(self, width: int = 8, heads: int = 2, seed: int = 0) -> None:
        super().__init__()
        self.heads = heads
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(CODES + 1, width)
            self.lift = nn.Linear(1, width)
            self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
            self.head = nn.Linear(2 * width, 1)

    def layers(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the output [B, S, E] and the two maps [B, H, S, S]."""
        batch, seq, _ = x.shape
        masked = torch.arange(seq) >= lengths[:, None]
        maps = []
        for _ in range(2):
            q, k = (p(x).view(batch, seq, self.heads, -1).transpose(1, 2) for p in (self.query, self.key))
            scores = (q @ k.transpose(-1, -2)).masked_fill(masked[:, None, None], -1e9)
            maps.append(scores.softmax(-1))
            x = x + (maps[-1].mean(1) @ x)
        return x, maps


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pad the codes with 0 and the labs with 0."""
    return {key: pad_sequence([sample[key] for sample in samples], batch_first=True) for key in ("codes", "labs")} | {
        "lengths": {key: torch.tensor([len(sample[key]) for sample in samples]) for key in ("codes", "labs")},
        "label": torch.stack([sample["label"] for sample in samples]),
    }


def explain(model: Attention, batch: Mapping[str, Any]) -> Explained:
    """Roll position 0 of each stream out, and predict."""
    with torch.inference_mode():
        streams = {"codes": model.embed(batch["codes"]), "labs": model.lift(batch["labs"][..., None])}
        relevance, read = {}, []
        for key, x in streams.items():
            output, maps = model.layers(x, batch["lengths"][key])
            read.append(output[:, 0])
            relevance[key] = rollout.attention_rollout(maps, query=0, lengths=batch["lengths"][key], validate=False)
        probability = torch.sigmoid(model.head(torch.cat(read, 1)))
    return Explained(relevance, probability, batch["label"])


def attribute(out: Path, count: int = 90, **settings: Any) -> Any:
    """Run the cohort: small parts and batches, so that there are many."""
    chosen: dict[str, Any] = {
        "model": Attention(), "dataset": Records(count), "collate": collate, "vocabularies": VOCABULARIES,
        "explain": explain, "part_samples": 20, "batch_tokens": 120, "progress": False, **settings,
    }  # fmt: skip
    model, dataset = chosen.pop("model"), chosen.pop("dataset")
    return rollout.attribute_cohort(model, dataset, out, **chosen)


def rows(out: Path, kind: str = "attributions") -> pl.DataFrame:
    """Everything written of a kind, in order."""
    return pl.read_parquet(out / kind / "*.parquet")


def contents(out: Path) -> dict[str, pl.DataFrame]:
    """Rows of every kind that is there."""
    kinds = ("attributions", "predictions", "failures")
    return {kind: rows(out, kind) for kind in kinds if list((out / kind).glob("*.parquet"))}


def assert_same(left: Path, right: Path) -> None:
    """The same rows in the same order, bit for bit."""
    one, other = contents(left), contents(right)
    assert one.keys() == other.keys()
    for kind in one:
        assert one[kind].schema == other[kind].schema
        assert one[kind].equals(other[kind], null_equal=True), kind
