"""`capture(model, values=True)` of libraries' models: what each layer adds up is taken by hooks on their modules."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import rollout
from rollout.errors import CaptureError
from tests.support.capture_values import METHODS, Taken, agree
from tests.support.cases import generator, same_bits


@contextmanager
def inputs_of(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """What modules are called with."""
    found: list[Tensor] = []
    handles = [
        each.register_forward_pre_hook(
            lambda _, args, kwargs: found.append((args[0] if args else kwargs["hidden_states"]).clone()),
            with_kwargs=True,
        )
        for each in modules
    ]
    yield found
    for handle in handles:
        handle.remove()


def bert(model: Any) -> tuple[list[nn.Module], list[nn.Module], list[Tensor], Callable[[Tensor, int], Tensor]]:
    """The modules called with x, those called with what V is made of, W_O, and V."""
    layers = [layer.attention for layer in model.encoder.layer]
    attending = [layer.self for layer in layers]
    return layers, attending, [layer.output.dense.weight.T for layer in layers], lambda x, at: attending[at].value(x)


def gpt2(model: Any) -> Any:
    attending = [block.attn for block in model.h]
    return list(model.h), attending, [each.c_proj.weight for each in attending], (
        lambda x, at: attending[at].c_attn(x).chunk(3, -1)[2]
    )  # fmt: skip


def llama(model: Any) -> Any:
    attending = [layer.self_attn for layer in model.layers]
    return list(model.layers), attending, [each.o_proj.weight.T for each in attending], (
        lambda x, at: attending[at].v_proj(x)
    )  # fmt: skip


def neox(model: Any) -> Any:
    attending = [layer.attention for layer in model.layers]
    return list(model.layers), attending, [each.dense.weight.T for each in attending], (
        lambda x, at: attending[at].query_key_value(x).unflatten(-1, (4, 3, -1))[..., 2, :].flatten(2)
    )  # fmt: skip


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("kind", "options", "parts"),
    [
        ("Bert", {}, bert),
        ("GPT2", {}, gpt2),
        ("Llama", {"num_key_value_heads": 2}, llama),
        ("GPTNeoX", {"use_parallel_residual": True}, neox),
    ],
    ids=["BERT", "GPT-2", "Llama", "GPT-NeoX"],
)
def test_hugging_face(
    kind: str, options: dict[str, Any], parts: Any, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    # Written out, some of its models round their maps to float32.
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: torch.softmax(x, dim))
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=50, hidden_size=32, num_attention_heads=4, num_hidden_layers=3, intermediate_size=64,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}Model")(config).double().eval()
    for name, parameter in model.named_parameters():
        if "embed" not in name:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    ids = torch.randint(1, 50, (2, 9), generator=generator(5))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    data = {"input_ids": ids, "attention_mask": mask}
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        plain = model(**data).last_hidden_state
        with rollout.capture(model, values=True) as tape:
            output = model(**data).last_hidden_state
        model.set_attn_implementation("eager")
        adding, attending, weights, values = parts(model)
        with inputs_of(adding) as x, inputs_of(attending) as states:
            maps = model(**data, output_attentions=True).attentions
    assert same_bits(output, plain)
    layers = [
        Taken(maps[at], values(states[at], at).unflatten(-1, (-1, 8)).transpose(1, 2), w.reshape(4, 8, 32), x[at])
        for at, w in enumerate(weights)
    ]
    agree(tape, layers, [9, 6])


@pytest.mark.parametrize("name", ["block", "layer scale", "parallel"])
def test_timm(name: str) -> None:
    vit = pytest.importorskip("timm.models.vision_transformer", reason="timm is not installed")
    torch.manual_seed(0)
    kind = vit.ParallelScalingBlock if name == "parallel" else vit.Block
    model = vit.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3, block_fn=kind,
        init_values=0.5 if name == "layer scale" else None,
    ).double().eval()  # fmt: skip
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=generator(2))
    blocks = list(model.blocks)
    with torch.no_grad(), inputs_of(blocks) as x:
        with rollout.capture(model, values=True) as tape:
            model(image)
        layers = []
        for block, state in zip(blocks, x, strict=True):
            if name == "parallel":
                fused = functional.linear(block.in_norm(state), block.in_proj.weight, block.in_proj.bias)
                q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in fused[..., -48:].chunk(3, -1))
                weight = block.attn_out_proj.weight.T
            else:
                joint = block.attn.qkv(block.norm1(state))
                q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in joint.chunk(3, -1))
                weight = block.attn.proj.weight.T * (block.ls1.gamma if name == "layer scale" else 1.0)
            layers.append(Taken((q @ k.mT * 8**-0.5).softmax(-1), v, weight.reshape(2, 8, 16), state))
    agree(tape, layers)


def test_timm_with_a_norm_behind_is_refused() -> None:
    vit = pytest.importorskip("timm.models.vision_transformer", reason="timm is not installed")
    model = vit.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, block_fn=vit.ResPostBlock
    ).eval()
    with (
        torch.no_grad(),
        pytest.raises(CaptureError, match=r"blocks.0.attn hands W_O·o to layer_norm"),
        rollout.capture(model, values=True),
    ):
        model(torch.zeros(2, 3, 16, 16))


@pytest.mark.parametrize("method", METHODS)
def test_pyhealth(method: str) -> None:
    """What its drop-in gives, which has a way of its own."""
    pytest.importorskip("pyhealth", reason="PyHealth is not installed")
    from rollout.pyhealth import AttentionRollout
    from tests.support.merged_records import repeated
    from tests.support.pyhealth_models import transformer

    model, data = transformer("flat", heads=4, num_layers=3).double().eval(), repeated()
    data["conditions"][1, 12:] = data["drugs"][2, 5:] = 0
    data["label"] = data["label"].double()
    with torch.no_grad(), rollout.capture(model, values=True) as tape:
        model(**data)
    found, wanted = tape.rollout(query=0, method=method), AttentionRollout(model, method=method).attribute(**data)
    assert found.keys() == wanted.keys()
    for key, row in wanted.items():
        torch.testing.assert_close(found[key], row, atol=1e-12, rtol=1e-10)
