"""`capture(model, gradients=True)` beside the maps that models write out, and autograd's gradients of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rollout
from rollout.errors import CaptureError
from rollout.tape import Record

METHODS = ("chefer", "chefer_normalised", "grad_rollout")
SEQ, HEADS, LAYERS = 9, 4, 3


def agree(
    tape: Any,
    target: Tensor,
    maps: list[Tensor],
    wanted: Tensor,
    query: int | Tensor = 0,
    lengths: Tensor | None = None,
) -> None:
    """The tape's rows are those of the maps and their gradients, by the oracle, to float64's rounding."""
    tape.take_gradients(target)
    gradients = torch.autograd.grad(wanted, maps)
    for method in METHODS:
        (ours,) = tape.rollout(query=query, method=method).values()
        row = rollout.attention_rollout(
            [each.detach() for each in maps], query=query, gradients=gradients, method=method, backend="reference",
            lengths=lengths,
        )  # fmt: skip
        assert float(row.abs().sum(1).min()) > 1.0 + 1e-6 or method != "chefer", (
            "there is something beyond the identity"
        )
        torch.testing.assert_close(ours, row, atol=1e-12, rtol=1e-10)


def hugging_face(kind: str, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=50, hidden_size=32, num_attention_heads=HEADS, num_hidden_layers=LAYERS, intermediate_size=64,
        max_position_embeddings=32, pad_token_id=0, **options,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}Model")(config).double().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(1, 50, (2, SEQ), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if kind != "ModernBert":  # its local rows are no numbers where all they may attend is padding
        mask[1, 6:] = 0
    return model, {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Bert", {}),
        ("ModernBert", {"global_attn_every_n_layers": 2, "local_attention": 4, "reference_compile": False}),
        ("Llama", {"num_key_value_heads": 2}),
    ],
    ids=["BERT", "ModernBERT", "Llama"],
)
def test_hugging_face(kind: str, options: dict[str, Any], implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Written out, some of its models round their maps to float32.
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: torch.softmax(x, dim))
    model, data = hugging_face(kind, **options)
    model.set_attn_implementation(implementation)
    plain = model(**data).last_hidden_state
    with rollout.capture(model, gradients=True) as tape:
        states = model(**data).last_hidden_state
    assert torch.equal(states, plain)
    model.set_attn_implementation("eager")
    eager = model(**data, output_attentions=True)
    last = torch.arange(2), data["attention_mask"].sum(1) - 1
    agree(
        tape, states[last].tanh().sum(), list(eager.attentions), eager.last_hidden_state[last].tanh().sum(),
        query=last[1], lengths=last[1] + 1,
    )  # fmt: skip
    assert all(parameter.grad is None for parameter in model.parameters())


def encoder(norm_first: bool, batch_first: bool) -> nn.TransformerEncoder:
    torch.manual_seed(4)
    layer = nn.TransformerEncoderLayer(16, HEADS, 32, dropout=0.0, norm_first=norm_first, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.5)
    return model


def written_out(model: nn.TransformerEncoder, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The encoder on [B, S, E] as its documentation says it is, and its maps [B, H, S, S]."""
    maps = []

    def attend(attention: nn.MultiheadAttention, state: Tensor) -> Tensor:
        joint = nn.functional.linear(state, attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = joint.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        maps.append((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1))
        return attention.out_proj((maps[-1] @ value).transpose(1, 2).flatten(2))

    for layer in model.layers:
        if layer.norm_first:
            x = x + attend(layer.self_attn, layer.norm1(x))
            x = x + layer.linear2(layer.linear1(layer.norm2(x)).relu())
        else:
            x = layer.norm1(x + attend(layer.self_attn, x))
            x = layer.norm2(x + layer.linear2(layer.linear1(x).relu()))
    return x, maps


@pytest.mark.parametrize("batch_first", [True, False], ids=["B-S-E", "S-B-E"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-LN", "post-LN"])
@pytest.mark.parametrize("part", ["encoder", "layer"])
def test_torch_encoder(part: str, norm_first: bool, batch_first: bool) -> None:
    model = encoder(norm_first, batch_first)
    x = torch.randn(2, SEQ, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    given = x if batch_first else x.transpose(0, 1)
    subject = model if part == "encoder" else model.layers[0]
    with rollout.capture(subject, gradients=True) as tape:
        output = subject(given)
    if part == "layer":
        model.layers = model.layers[:1]
    wanted, maps = written_out(model, x)
    found = output if batch_first else output.transpose(0, 1)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    agree(tape, found[:, 0].tanh().sum(), maps, wanted[:, 0].tanh().sum())


def test_pyhealth() -> None:
    """What its drop-in gives, which has a way of its own."""
    pytest.importorskip("pyhealth", reason="PyHealth is not installed")
    from rollout.pyhealth import CheferRelevance
    from tests.support.merged_records import repeated
    from tests.support.pyhealth_models import transformer

    model, data = transformer("flat", heads=HEADS, num_layers=LAYERS).double().eval(), repeated()
    data["conditions"][1, 12:] = data["drugs"][2, 5:] = 0
    data["label"] = data["label"].double()
    with rollout.capture(model, gradients=True) as tape:
        logits = model(**data)["logit"]
    tape.take_gradients(logits.sum())
    found, wanted = tape.rollout(query=0, method="chefer"), CheferRelevance(model).attribute(**data)
    assert found.keys() == wanted.keys()
    for key, row in wanted.items():
        torch.testing.assert_close(found[key], row, atol=1e-12, rtol=1e-10)


class Written(nn.Module):
    """One attention written out: its heads stand last where it is an einsum, and its output may be changed in place."""

    def __init__(self, *, heads_last: bool = False, in_place: bool = False) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = nn.Linear(8, 24).double()
        self.heads_last, self.in_place = heads_last, in_place

    def forward(self, x: Tensor, kept: list[Tensor] | None = None) -> Tensor:
        query, key, value = self.embed(x).unflatten(-1, (3, 2, 4)).unbind(2)
        maps = (torch.einsum("bihd,bjhd->bhij", query, key) / 2.0).softmax(-1)
        if kept is not None:
            kept.append(maps)
        if self.heads_last:
            mixed = torch.einsum("bhij,bjhd->bihd", maps, value)
        else:
            mixed = maps @ value.transpose(1, 2)
        if self.in_place:
            mixed *= 3.0
        return mixed.flatten(2) if self.heads_last else mixed.transpose(1, 2).flatten(2)


def inputs() -> Tensor:
    return torch.randn(2, SEQ, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("options", [{"heads_last": True}, {"in_place": True}], ids=str)
def test_written_out(options: dict[str, bool]) -> None:
    model, maps = Written(**options), list[Tensor]()
    with rollout.capture(model, gradients=True) as tape:
        target = model(inputs())[:, 0].tanh().sum()
    agree(tape, target, maps, model(inputs(), maps)[:, 0].tanh().sum())


def test_a_view_changed_in_place_is_refused() -> None:
    """Autograd goes past it, and the gradient would be found 0."""
    model = Written(heads_last=True, in_place=True)
    with rollout.capture(model, gradients=True) as tape:
        target = model(inputs()).sum()
    with pytest.raises(ValueError, match="the output of Written at the root must stay as it was made"):
        tape.take_gradients(target)


def test_another_target_and_a_target_of_nothing() -> None:
    model = Written()
    with rollout.capture(model, gradients=True) as tape:
        output = model(inputs())
    found = []
    for column in (0, 1):
        tape.take_gradients(output[:, 0, column].sum(), retain_graph=True)
        found.append(tape.rollout(0, method="chefer"))
    assert not torch.allclose(*(next(iter(each.values())) for each in found), atol=1e-6)
    tape.take_gradients(torch.ones((), requires_grad=True) * 2)
    (row,) = tape.rollout(0, method="chefer").values()
    assert torch.equal(row, torch.eye(SEQ, dtype=torch.float64)[0].expand(2, -1))


def test_nothing_is_kept_that_was_not_asked_for() -> None:
    model = Written()
    sizes = []
    for asked in (False, True):
        with rollout.capture(model, gradients=asked) as tape:
            target = model(inputs()).sum()
        (record,) = tape.layers()
        assert (record.values is not None) == asked
        sizes.append(tape.nbytes)
    assert sizes[0] <= sizes[1]
    tape.take_gradients(target)
    tape.clear()
    with pytest.raises(ValueError, match="must hold a forward pass"):
        tape.take_gradients(target)


def without_autograd(model: nn.Module) -> None:
    with torch.no_grad(), rollout.capture(model, gradients=True):
        model(inputs())


def frozen(model: nn.Module) -> None:
    with rollout.capture(model.requires_grad_(False), gradients=True):
        model(inputs())


def a_function_of_ones_own(model: nn.Module) -> None:
    def read(module: nn.Module, x: Tensor) -> Record:
        query, key, _ = module.embed(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return Record(queries=query, keys=key)

    rollout.register_capture(Written, read)
    try:
        with rollout.capture(model, gradients=True):
            model(inputs())
    finally:
        rollout.register_capture(Written, None)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (without_autograd, "must be called with autograd on"),
        (frozen, "must be called with autograd on"),
        (a_function_of_ones_own, "what Written at the root hands on is not known"),
    ],
)
def test_what_is_refused_in_the_call(run: Callable[[nn.Module], None], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        run(Written())


def test_what_is_refused_of_a_tape() -> None:
    model = Written()
    with rollout.capture(model) as tape:
        target = model(inputs()).sum()
    with pytest.raises(ValueError, match=r"must be that of a capture\(model, gradients=True\)"):
        tape.take_gradients(target)
    with rollout.capture(model, gradients=True) as tape:
        output = model(inputs())
    with pytest.raises(ValueError, match=r"'chefer' needs gradients: .* Tape.take_gradients first"):
        tape.rollout(method="chefer")
    with pytest.raises(ValueError, match="one number that requires gradients"):
        tape.take_gradients(output)
    with pytest.raises(ValueError, match="one number that requires gradients"):
        tape.take_gradients(output.detach().sum())
    with pytest.raises(TypeError, match="target must be a tensor of one number, got float"):
        tape.take_gradients(1.0)
    with pytest.raises(ValueError, match=r"Record: values must be \[B, H_v, S', D_v\]"):
        Record(queries=torch.ones(1, 2, 3, 4), keys=torch.ones(1, 2, 3, 4), values=torch.ones(1, 2, 5, 4))
