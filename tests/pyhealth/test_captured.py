"""The drop-in for PyHealth's models without readout methods: against the maps they make themselves, in float64."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from pyhealth import models
from pyhealth.datasets import create_sample_dataset, get_dataloader
from pyhealth.models import MoleRec, TransformersModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import AlbertConfig, AlbertModel

import rollout
from rollout.pyhealth import AttentionRollout, MissingFeatureError
from tests.support.capture_family import Family, prepared
from tests.support.capture_pyhealth import (
    CODES,
    PYHEALTH,
    SWIN,
    E,
    H,
    batch,
    bert,
    data,
    model_of,
    prompt_ehr_rollout,
    text_batch,
    text_model,
    vision_model,
)
from tests.support.capture_state import assert_nothing_left, state
from tests.support.oracles import array, assert_close, rollout_matrices

TEXT, VIT, DEID = "TransformersModel (BERT)", "TorchvisionModel (ViT)", "TransformerDeID (BERT)"
PROMPT = "PromptEHR (BART)"
ALBERT = Family(
    text_model("text", TransformersModel, "model", partial(bert, AlbertConfig, AlbertModel)),
    partial(text_batch, "text"), PYHEALTH[TEXT].maps,
)  # fmt: skip
QUERIES = {DEID: -1, "GPT2": -1, "HALO": 2, PROMPT: 2, "MedLink": 1}


def made(family: Family | str, kind: str | None = None) -> tuple[Any, dict[str, Any]]:
    found = PYHEALTH[family] if isinstance(family, str) else family
    return prepared(found, kind or found.implementations[-1])


def matrix(family: Family | str, model: Any, inputs: dict[str, Any], method: str = "pyhealth") -> Any:
    """The rollout of the model's own maps, of its one stream."""
    found = PYHEALTH[family] if isinstance(family, str) else family
    (maps,) = found.maps(copy.deepcopy(model), inputs, None).values()
    return rollout_matrices(maps, rollout.METHODS[method])


@pytest.mark.parametrize("method", ["pyhealth", "discard"])
@pytest.mark.parametrize(("family", "kind"), [(TEXT, "eager"), (TEXT, "sdpa"), (ALBERT, "eager")])
def test_text_is_read_at_its_first_token(family: Any, kind: str, method: str) -> None:
    model, inputs = made(family, kind)
    if method == "discard":  # it looks at the whole map, padding included
        inputs = {**inputs, "text": inputs["text"][:1], "label": inputs["label"][:1]}
        inputs["attention_mask"] = inputs["attention_mask"][:1, :6]
    ours = AttentionRollout(model, method=method).attribute(**inputs)
    assert list(ours) == ["text"]
    assert_close(ours["text"], matrix(family, model, inputs, method)[:, 0], "qk")
    assert (array(ours["text"])[inputs["attention_mask"].numpy() == 0] == 0).all()
    assert ours["text"].dtype == torch.float64
    assert not ours["text"].is_inference()


@pytest.mark.parametrize("method", ["pyhealth", "discard", "chefer_rollout"])
def test_padding_changes_nothing(method: str) -> None:
    model, inputs = made(TEXT)
    interpreter = AttentionRollout(model, method=method)
    together = interpreter.attribute(**inputs)["text"]
    for b, text in enumerate(inputs["text"]):
        (row,) = interpreter.attribute(text=[text], label=inputs["label"][b : b + 1])["text"]
        assert_close(together[b : b + 1, : len(row)], row[None], "qk")


def test_an_image_is_read_at_its_class_token() -> None:
    model, inputs = made(VIT)
    wanted = torch.tensor(matrix(VIT, model, inputs)[:, 0, 1:]).view(3, 1, 4, 4)
    interpreter = AttentionRollout(model)
    assert_close(interpreter.attribute(**inputs, interpolate=False)["image"], wanted, "qk")
    full = functional.interpolate(wanted, size=(16, 16), mode="bilinear", align_corners=False)
    assert_close(interpreter.attribute(**inputs)["image"], full, "qk")


@pytest.mark.parametrize("query", [-1, 1, torch.tensor([2, -2, 3])], ids=["last", "second", "each"])
def test_de_identification_by_the_token_named(query: Any) -> None:
    model, inputs = made(DEID)
    ours = AttentionRollout(model, query=query).attribute(**inputs)["text"]
    lengths = inputs["attention_mask"].sum(1)
    assert lengths.tolist() == [6, 4, 7]
    rows = torch.as_tensor(query).expand(3)
    rows = torch.where(rows < 0, rows + lengths, rows)
    assert_close(ours, matrix(DEID, model, inputs)[torch.arange(3), rows], "qk")


@pytest.mark.parametrize("most", [32, 5])
def test_gpt2_gives_each_code_its_own(most: int) -> None:
    """Also of records that are cut: what the model did not read gets 0."""
    model = model_of("stream", models.GPT2, embed_dim=E, n_heads=H, n_layers=3, max_len=most)("").double()
    visits = batch("stream")["visits"]
    ids, mask, _ = model._encode_visits(visits)
    family = PYHEALTH["GPT2"]
    full = matrix(family, model, {**batch("stream"), "attention_mask": mask})
    ours = AttentionRollout(model, query=-2).attribute(**batch("stream"))["visits"]
    assert ours.shape == visits.shape
    for b in range(3):
        cells = visits[b].nonzero().tolist()
        row, read = full[b, int(mask[b].sum()) - 2], (ids[b] * mask[b]).tolist()
        codes = [place for place, number in enumerate(read) if 0 < number < model.code_vocab_size]
        assert len(codes) == (len(cells) if most == 32 else 3)
        wanted = torch.zeros_like(ours[b])
        for (visit, column), place in zip(cells, codes, strict=False):
            wanted[visit, column] = float(row[place])
        assert_close(ours[b], wanted, "qk")


def test_halo_gives_a_visit_to_its_codes() -> None:
    model, inputs = made("HALO")
    full = PYHEALTH["HALO"].maps(copy.deepcopy(model), inputs, None)["halo_model.transformer.h"]
    wanted = rollout_matrices(full, rollout.METHODS["pyhealth"])
    assert inputs["visits"].any(-1).sum(1).tolist() == [2, 3, 1]
    for query, rows in ((-1, [3, 4, 2]), (2, [2, 2, 2])):
        ours = AttentionRollout(model, query=query).attribute(**inputs)["visits"]
        assert ours.shape == inputs["visits"].shape
        for b, row in enumerate(rows):
            assert_close(ours[b], torch.tensor(wanted[b, row, 2:5])[:, None].expand(ours[b].shape), "qk")


@pytest.mark.parametrize("static", [None, "age"])
def test_con_care_by_the_weights_of_its_pooling(static: str | None) -> None:
    """Two features, codes among them, and static ones, which are a position of their own."""
    schema = {"labs": "tensor", "codes": "sequence", **({"age": "tensor"} if static else {})}
    samples = [
        {"patient_id": f"p{i}", "labs": data("labs")[0][i]["labs"].tolist(), "codes": CODES[i], "label": i % 2}
        | ({"age": [0.1 * i, 1.0]} if static else {})
        for i in range(3)
    ]
    dataset = create_sample_dataset(samples, schema, {"label": "binary"}, dataset_name="both")
    inputs = next(iter(get_dataloader(dataset, batch_size=3, shuffle=False)))
    torch.manual_seed(0)
    model = models.ConCare(dataset, static, hidden_dim=E, num_head=H).eval()
    ours = AttentionRollout(model).attribute(**inputs)
    assert sorted(ours) == ["codes", "labs"]
    for key, columns in (("labs", 5), ("codes", 1)):
        pooling, weights = model.concare[key].FinalAttentionQKV, []
        with pooling.register_forward_hook(lambda *seen, kept=weights: kept.append(seen[2][1])), torch.no_grad():
            model(**inputs)
        maps = model.concare[key].MultiHeadedAttention.attn.mean(1)
        chain = 0.5 * torch.eye(columns + bool(static)) + 0.5 * maps
        wanted = (weights[0][:, None] @ chain)[:, 0, :columns]
        assert ours[key].shape == inputs[key].shape
        in_steps = wanted[:, None].expand(ours[key].shape) if key == "labs" else wanted.expand(3, 3)
        assert_close(ours[key], in_steps, "qk")


def test_prompt_ehr_by_decoder_and_encoder() -> None:
    model, inputs = made(PROMPT)
    wanted, labels = prompt_ehr_rollout(model, inputs)
    ends = (labels != -100).sum(1) - 1
    assert ends.unique().numel() > 1
    ours = AttentionRollout(model, query=-1).attribute(**inputs)
    seq = ours["bart.model.decoder.layers"].shape[-1]
    assert_close(torch.cat(list(ours.values()), -1), wanted[torch.arange(3), ends], "qk")
    assert len(ours) == 2
    assert seq == labels.shape[1]


@pytest.mark.parametrize("query", [-1, {"s_q": 0}, {"s_p": torch.tensor([0, 1, -1]), "s_q": -1}], ids=str)
def test_med_link_by_queries_and_corpus(query: Any) -> None:
    model, inputs = made("MedLink")
    inputs |= {"s_q": [["a"], ["b", "c", "a"], ["d", "e"]], "s_p": [["e", "d", "c", "b"], ["a", "b"], ["c"]]}
    with torch.inference_mode(), rollout.capture(model) as tape:
        model(**inputs)
    maps = PYHEALTH["MedLink"].maps(copy.deepcopy(model), inputs, tape)
    ours = AttentionRollout(model, query=query).attribute(**inputs)
    assert sorted(ours) == sorted(query if isinstance(query, dict) else ["s_q", "s_p"])
    for key, row in ours.items():
        (stream,) = (name for name in maps if name.startswith({"s_q": "bwd", "s_p": "fwd"}[key]))
        full, lengths = rollout_matrices(maps[stream], rollout.METHODS["pyhealth"]), [len(one) for one in inputs[key]]
        wanted = torch.as_tensor(query[key] if isinstance(query, dict) else query).expand(3).tolist()
        for b in range(3):
            assert_close(row[b], full[b, wanted[b] % lengths[b]], "qk")


@pytest.mark.parametrize("name", [TEXT, VIT, "ConCare", *QUERIES])
def test_nothing_is_left(name: str) -> None:
    model, inputs = made(name)
    inputs.pop("attention_mask", None)
    model.requires_grad_(False)
    weight = next(model.parameters())
    weight.grad = torch.ones_like(weight)
    forget = (lambda: vars(model.concare["labs"].MultiHeadedAttention).update(attn=None)) if name == "ConCare" else dict
    forget()  # a ConCare keeps the map of each of its calls, captured or not
    before = state(model)
    interpreter = AttentionRollout(model, query=QUERIES.get(name))
    with torch.no_grad():
        first = interpreter.attribute(**inputs)
    with torch.inference_mode():
        second = interpreter.attribute(target_class_idx=1, **inputs)
    assert all(torch.equal(first[key], second[key]) for key in first)
    forget()
    assert_nothing_left(model, before)
    assert bool((weight.grad == 1).all())

    def fail(*_: Any) -> None:
        raise RuntimeError("out of order")

    deepest = list(model.modules())[-1]
    deepest.forward = fail
    broken = state(model)
    with pytest.raises(RuntimeError, match="out of order"):
        interpreter.attribute(**inputs)
    forget()
    assert_nothing_left(model, broken)
    with pytest.raises(MissingFeatureError, match="AttentionRollout: the batch must hold every feature"):
        interpreter.attribute(label=torch.zeros(3))


@pytest.mark.parametrize("name", QUERIES)
def test_a_position_must_be_named(name: str) -> None:
    model, inputs = made(name)
    kind = type(model).__name__
    with pytest.raises(ValueError, match=f"query must name a position for a {kind}, got None: each of its positions"):
        AttentionRollout(model)
    with pytest.raises(ValueError, match=r"query must be a (position of every sample|row in -3..2), got 31"):
        AttentionRollout(model, query=31).attribute(**inputs)
    if name != "MedLink":
        with pytest.raises(ValueError, match=f"query must be one for a {kind}, got"):
            AttentionRollout(model, query={"s_q": 1})


@pytest.mark.parametrize("query", [True, "last", 1.0], ids=str)
def test_a_position_is_a_number(query: Any) -> None:
    with pytest.raises(TypeError, match=r"query must be an int, long \[B\] or float"):
        AttentionRollout(made("GPT2")[0], query=query)


def test_positions_are_of_the_batch() -> None:
    model, inputs = made(DEID)
    with pytest.raises(ValueError, match=r"query must name a position of each of 3 samples, got \[2\]"):
        AttentionRollout(model, query=torch.tensor([1, 2])).attribute(**inputs)
    weights = torch.zeros(3, 7, dtype=torch.float64)
    weights[:, 0], weights[:, 2] = 0.25, 2.0
    full = matrix(DEID, model, inputs)
    ours = AttentionRollout(model, query=weights).attribute(**inputs)["text"]
    assert_close(ours, 0.25 * full[:, 0] + 2.0 * full[:, 2], "qk")


def test_a_position_must_not_be_named_where_one_is_read() -> None:
    with pytest.raises(ValueError, match=r"of a TransformersModel reads position 0 \(a token of its tokenizer"):
        AttentionRollout(made(TEXT)[0], query=0)
    with pytest.raises(ValueError, match="which row a Transformer reads, its get_relevance_tensor says, got 0"):
        AttentionRollout(model_of("pairs", models.Transformer, embedding_dim=E)(""), query=0)
    with pytest.raises(ValueError, match="readout='forward' needs PyHealth's own Transformer"):
        AttentionRollout(made(VIT)[0], readout="forward")
    with pytest.raises(ValueError, match="method must not measure values for a TransformersModel"):
        AttentionRollout(made(TEXT)[0], method="value_norm")


class Pooled(nn.Module):
    """A pooler of another kind."""

    def __init__(self, read: str) -> None:
        super().__init__()
        self.read = read

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[:, 1] if self.read == "second" else hidden[:, :2].mean(1)


@pytest.mark.parametrize("read", ["second", "two"])
def test_text_that_is_pooled_otherwise_is_refused(read: str) -> None:
    model, _ = made(TEXT)
    model.model.pooler = Pooled(read)
    with pytest.raises(ValueError, match="the TransformersModel's BertModel cannot be explained: the model reads pos"):
        AttentionRollout(model)


class OwnForward(TransformersModel):
    """It may read what it likes."""

    def forward(self, **data: Any) -> dict[str, Tensor]:
        return super().forward(**data)


def test_who_is_not_known_gets_pyhealths_error() -> None:
    plain = r"Missing: .*with rollout.capture\(model\) as tape: model\(\*\*batch\); tape.rollout\(0\)$"
    swin = vision_model("swin_t", SWIN)("")
    for model in (model_of("text", OwnForward, bert())(""), swin, model_of("visits", models.RETAIN)("")):
        with pytest.raises(TypeError, match=plain):
            AttentionRollout(model)
    with pytest.raises(TypeError, match="the same for every patient"):
        AttentionRollout(MoleRec.__new__(MoleRec))
