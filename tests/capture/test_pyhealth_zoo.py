"""`rollout.capture` of PyHealth's models beyond the two of its interpreters: right against their maps, or refused."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("pyhealth", reason="PyHealth's models need the pyhealth extra")

from pyhealth.models import GraphCare, graphcare
from pyhealth.models._graphcare.bat_gnn import BiAttentionGNNConv

import rollout
from rollout.pyhealth import AttentionRollout
from tests.support.capture_family import check, prepared
from tests.support.capture_pyhealth import PYHEALTH, SETS, E, H, batch, data, prompt_ehr_rollout
from tests.support.capture_table import assert_in_table, cases
from tests.support.oracles import array, assert_close, rollout_matrices


def recorded(model: Any, inputs: dict[str, Any], part: nn.Module | None = None, **options: Any) -> Any:
    """The tape of one call of the model, of all of it or of a part."""
    with torch.inference_mode(), rollout.capture(model if part is None else part, **options) as tape:
        model(**inputs)
    return tape


@pytest.mark.parametrize(("name", "kind"), cases(PYHEALTH))
def test_every_model(name: str, kind: str) -> None:
    check(PYHEALTH[name], kind)


def test_the_page_says_what_the_tests_say() -> None:
    assert_in_table(PYHEALTH, "pyhealth")


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_prompt_ehr_from_decoder_to_prompt(kind: str) -> None:
    """Each position of the decoder over its own inputs, and over soft prompt and codes of the encoder."""
    model, inputs = prepared(PYHEALTH["PromptEHR (BART)"], kind)
    tape = recorded(model, inputs, cross_attention=True)
    above, below = "bart.model.decoder.layers", "bart.model.encoder.layers"
    got = tape.encoder_decoder_rollout()
    wanted, _ = prompt_ehr_rollout(model, inputs)
    seq = got[above].shape[-1]
    assert_close(got[above], wanted[..., :seq], "qk")
    assert_close(got[below], wanted[..., seq:], "qk")
    row = tape.encoder_decoder_rollout(query=2)
    assert (array(row[below])[:, : model.prompt_length] > 0).all()
    assert_close(row[below], wanted[:, 2, seq:], "qk")


def test_med_link_of_unequal_records() -> None:
    """Padding of queries and of the corpus is masked, each in its own stream."""
    family = PYHEALTH["MedLink"]
    model, inputs = prepared(family, "plain")
    inputs |= {"s_q": [["a"], ["b", "c", "a"], ["d", "e"]], "s_p": [["e", "d", "c", "b"], ["a", "b"], ["c"]]}
    tape = recorded(model, inputs)
    maps = family.maps(copy.deepcopy(model), inputs, tape)
    assert [tape.layers(stream)[0].key_mask.sum(1).tolist() for stream in tape.streams] == [[4, 2, 1], [1, 3, 2]]
    for stream, full in tape.rollout().items():
        wanted = rollout_matrices(maps[stream], rollout.METHODS["rollout"])
        for b, length in enumerate(tape.layers(stream)[0].key_mask.sum(1)):
            assert_close(full[b : b + 1, :length], wanted[b : b + 1, :length], "qk")


def test_con_care_by_its_part() -> None:
    """Its attention over features, between a pooling over time and one over features: the refusal's advice is true."""
    model, inputs = prepared(PYHEALTH["ConCare"], "plain")
    with pytest.raises(rollout.CaptureError, match="capture the part of the model that holds the other attentions"):
        recorded(model, inputs)
    part = model.concare["labs"].MultiHeadedAttention
    tape = recorded(model, inputs, part)
    assert tape.layers(tape.streams[0])[0].queries.shape == (3, H, 5, E // H)
    assert_close(tape.maps(0), part.attn, "qk")


def test_mole_rec_by_its_part() -> None:
    """One set for the whole batch: that of the substructures."""
    model, inputs = prepared(PYHEALTH["MoleRec (its layer)"], "plain")
    with pytest.raises(rollout.CaptureError, match="AttnAgg at combination_feature_aggregator ran"):
        recorded(model, inputs)
    part = model.substructure_interaction_module
    tape = recorded(model, inputs, part)
    given: list[Tensor] = []
    with torch.inference_mode(), part.register_forward_pre_hook(lambda _, args: given.append(args[0])):
        model(**inputs)
    sets = PYHEALTH["MoleRec (its set attention)"]
    (maps,) = sets.maps(nn.Sequential(part), {**SETS, "input": given[0]}, tape)["layers"]
    assert maps.shape == (1, 2, 5, 5)
    assert_close(tape.maps(0), maps, "qk")


def test_graph_care_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its messages along edges are no attention of every position to every other; what it needs of torch-geometric
    stands in here."""

    def propagate(layer: Any, edges: Tensor, x: Tensor, edge_attr: Tensor, attn: Tensor) -> Tensor:
        messages = layer.message(x_j=x[edges[0]], edge_attr=edge_attr, attn_j=attn[edges[0]])
        return torch.zeros_like(x).index_add(0, edges[1], messages)

    def added(x: Tensor, graph_of: Tensor) -> Tensor:
        return x.new_zeros(int(graph_of.max()) + 1, x.shape[1]).index_add(0, graph_of, x)

    stand_ins = {
        "HAS_PYG": True,
        "global_add_pool": added,
        "global_mean_pool": lambda x, graph_of: added(x, graph_of) / added(torch.ones_like(x), graph_of),
        "pyg_softmax": lambda x, graph_of: x.exp() / added(x.exp(), graph_of)[graph_of],
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(graphcare, name, value, raising=False)
    monkeypatch.setattr(BiAttentionGNNConv, "propagate", propagate, raising=False)
    knowledge = SimpleNamespace(num_entities=6, num_relations=2, node_features=None)
    model = GraphCare(data("pairs")[0], knowledge, hidden_dim=E, num_layers=2).eval()
    ring = torch.stack([torch.arange(9), (torch.arange(9) + 1) % 9])
    ids = {"node_ids": torch.arange(9) % 6, "edge_type": torch.arange(9) % 2, "batch": torch.arange(9) // 3}
    graph = SimpleNamespace(edge_index=ring, **ids)
    inputs = {**batch("pairs"), "codes": graph, "d_codes": graph}
    with torch.no_grad():
        assert model(**inputs)["y_prob"].shape == (3, 1)
    with pytest.raises(rollout.CaptureError, match=r"BiAttentionGNNConv at gnn_layers.0 ran, and no softmax attention"):
        recorded(model, inputs)
    with pytest.raises(TypeError, match=r"got GraphCare. Missing"):
        AttentionRollout(model)
