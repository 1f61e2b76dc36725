"""A Hugging Face classifier over event tokens through `explain=` and `--entry`: its rows are those of its own maps."""

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification

import rollout
from rollout.cli import main
from rollout.cohort.explain import Explained
from rollout.results.verify import verify_folder

VOCABULARY = {"[PAD]": 0, "[CLS]": 1, **{f"c{i}": i + 2 for i in range(20)}}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def samples() -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [
        {
            "patient_id": f"p{i}",
            "codes": torch.tensor([1, *(draw.randrange(2, 22) for _ in range(draw.randint(1, 12)))]),
            "label": i % 2,
        }
        for i in range(20)
    ]


def collate(few: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = pad_sequence([one["codes"] for one in few], batch_first=True)
    return {"ids": ids, "mask": (ids != 0).long(), "labels": torch.tensor([one["label"] for one in few])}


def explain(model: Any, batch: Any) -> Explained:
    with rollout.capture(model) as tape, torch.inference_mode():
        logits = model(input_ids=batch["ids"], attention_mask=batch["mask"]).logits
    (row,) = tape.rollout(query=0).values()
    return Explained({"codes": row}, logits.softmax(-1), batch["labels"], row_sums=True)


def entry() -> tuple[Any, Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=22, **SIZES)).eval()
    return model, samples(), {"collate": collate, "vocabularies": {"codes": VOCABULARY}, "explain": explain}


def test_its_rows_are_those_of_its_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["rollout", "attribute", "--entry", f"{__name__}:entry", "--output", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (None, 0), capsys.readouterr().err
    cohort = rollout.CohortAttributions(out)
    model, records, _ = entry()
    model.set_attn_implementation("eager")
    words = list(VOCABULARY)
    for number, record in enumerate(records):
        with torch.inference_mode():
            alone = model(input_ids=record["codes"][None], output_attentions=True)
        rows = cohort.sample(number)
        assert rows["code"].to_list() == [words[one] for one in record["codes"]]
        wanted = rollout.attention_rollout(alone.attentions, query=0)[0]
        assert torch.allclose(torch.tensor(rows["attribution"].to_list()), wanted, atol=1e-6)
        assert rows["y_prob"][0].to_list() == pytest.approx(alone.logits.softmax(-1)[0].tolist(), abs=1e-6)
        assert rows["y_true"][0].to_list() == [number % 2]
    assert verify_folder(out) == []
