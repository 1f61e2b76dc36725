"""Traced calls, compiled without a graph break, exported or on fake tensors: the bits and checks of a plain call."""

import dataclasses
import inspect
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import rollout
from bench.providers.chains import compiler_problem
from rollout_kernels import Method, operators, ops
from tests.support.cases import random_gradients, random_maps, random_qk, same_bits

B, H, S, L = 2, 3, 7, 3
LENGTHS = torch.tensor([7, 4])
WEIGHTS = Method(head_fusion=torch.tensor([0.5, 2.0, -0.25]), residual=0.25, attention=1)
MASK = torch.arange(B * S).view(B, S).remainder(3).ne(1)
MAPS, (QUERIES, KEYS) = random_maps(B, H, S), random_qk(B, 4, S, groups=2)
LSE = [(q @ k.repeat_interleave(2, 1).mT * 8**-0.5).logsumexp(-1) for q, k in zip(QUERIES, KEYS, strict=True)]
VALUES = {
    "values": random_maps(B, H, S), "output_weights": [torch.rand(H, S, 5) for _ in range(L)],
    "inputs": [torch.rand(B, S, 5) for _ in range(L)],
}  # fmt: skip

MAPS_CALLS: dict[str, dict[str, Any]] = {
    "row": {"query": 0},
    "own-rows": {"query": torch.tensor([3, -1]), "lengths": LENGTHS, "backend": "reference"},
    "weightings": {"query": torch.rand(B, 2, S), "method": WEIGHTS},
    "full": {"lengths": LENGTHS, "method": "pyhealth"},
    "gradients": {"query": -1, "gradients": random_gradients(MAPS), "method": "chefer", "validate": False},
    "values": {"query": 0, "lengths": LENGTHS, "method": "kobayashi", **VALUES},
    "own-path": {"query": -1, "method": Method(own_path=False)},
}
QK_CALLS: dict[str, dict[str, Any]] = {
    "row": {"query": -1, "logsumexp": LSE},
    "masks": {"query": 0, "lengths": LENGTHS, "key_mask": MASK, "query_mask": MASK, "causal": True, "window": (3, -1)},
    "full": {"bias": [None, torch.rand(S, S), torch.rand(4, 1, S)], "method": Method(start_layer=1), "scale": 0.5},
    "sinks": {"query": 0, "sinks": [torch.rand(4) for _ in range(L)], "softcap": 2.0},
    "slopes": {"query": -1, "alibi_slopes": [torch.rand(4), None, torch.rand(4)]},
    "values": {
        "query": 0,
        "method": "value_norm",
        **VALUES,
        "output_weights": [torch.rand(4, 8, 5)] * L,
        "values": KEYS,
    },
    "one-bias": {"query": torch.rand(B, S), "bias": torch.rand(S, S)},
}
CALLS = {
    **{f"maps-{name}": (rollout.attention_rollout, (MAPS,), options) for name, options in MAPS_CALLS.items()},
    **{f"qk-{name}": (rollout.attention_rollout_qk, (QUERIES, KEYS), options) for name, options in QK_CALLS.items()},
}


@pytest.fixture(autouse=True)
def _compiled_anew() -> None:
    torch._dynamo.reset()


def compiled(backend: Any, **options: Any) -> Callable[..., Tensor]:
    """A model's end around a rollout from maps, without a graph break."""
    return torch.compile(
        lambda maps, **more: 2 * rollout.attention_rollout(maps, **options, **more), fullgraph=True, backend=backend
    )


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "aot_eager") for name in CALLS), ("maps-gradients", "inductor"), ("qk-full", "inductor")],
)
def test_compiled_in_one_graph_a_call_has_its_own_bits(name: str, backend: str) -> None:
    if backend == "inductor" and (problem := compiler_problem()) is not None:
        pytest.skip(problem)
    run, given, options = CALLS[name]
    whole = torch.compile(lambda *layers: run(*layers, **options) * 2, fullgraph=True, backend=backend)
    tracked = [[layer.clone().requires_grad_() for layer in layers] for layers in given]
    found = whole(*tracked)
    assert same_bits(found, 2 * run(*given, **options))
    assert not found.requires_grad


@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_go_in_and_come_out(name: str) -> None:
    run, given, options = CALLS[name]
    wanted = run(*given, **options)
    with FakeTensorMode() as mode:
        faked = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, (given, options))
        found = run(*faked[0], **faked[1])
    assert (found.shape, found.dtype, found.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_an_exported_program_serves_any_batch(strict: bool) -> None:
    class Module(torch.nn.Module):
        def forward(self, scores: Tensor, lengths: Tensor) -> Tensor:
            return rollout.attention_rollout([scores.softmax(-1)] * L, query=-1, lengths=lengths, method=WEIGHTS)

    batch = torch.export.Dim("B", max=64)
    given = torch.randn(B, H, S, S), LENGTHS
    program = torch.export.export(Module(), given, dynamic_shapes=({0: batch}, {0: batch}), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    more = torch.randn(5, H, S, S), torch.tensor([1, 2, 3, 7, 4])
    assert same_bits(torch.export.load(file).module()(*more), Module()(*more))


def test_one_graph_serves_any_batch_and_two_any_row() -> None:
    counter = CompileCounter()
    run = compiled(counter)
    for batch in (3, 5, 9):
        maps, lengths = random_maps(batch, H, S), torch.full((batch,), 4)
        for tensor in (*maps, lengths):
            torch._dynamo.mark_dynamic(tensor, 0)
        assert same_bits(
            run(maps, query=-1, lengths=lengths), 2 * rollout.attention_rollout(maps, query=-1, lengths=lengths)
        )
    assert counter.frame_count == 1
    counter.clear()
    run = compiled(counter)
    for row in range(S):
        assert same_bits(run(MAPS, query=row), 2 * rollout.attention_rollout(MAPS, query=row))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", CALLS)
def test_the_operator_is_what_torch_asks_of_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its schema, fake implementation and dynamic shapes, on the arguments that a traced call hands over."""
    run, given, options = CALLS[name]
    operator = "_maps_operator" if name.startswith("maps") else "_qk_operator"
    real, handed = getattr(operators, operator), []
    monkeypatch.setattr(operators, operator, lambda *arguments: (handed.append(arguments), real(*arguments))[1])
    monkeypatch.setattr(ops, "is_traced", lambda tensors: True)
    assert same_bits(run(*given, **options), (monkeypatch.undo(), run(*given, **options))[1])
    found = torch.library.opcheck(real, handed[0])
    assert set(found.values()) == {"SUCCESS"}


def test_an_operator_takes_all_that_the_call_and_the_method_have() -> None:
    methods = {field.name for field in dataclasses.fields(Method)} - {"paper"}
    renamed = {
        "gradient_form": "gradients",
        "value_form": "values",
        "query_tensor": "query",
        "head_weights": "head_fusion",
        "left": "window",
        "right": "window",
    }
    for call, operator in (
        (ops.attention_rollout, operators._maps_operator),
        (ops.attention_rollout_qk, operators._qk_operator),
    ):
        taken = {argument.name for argument in operator._opoverload._schema.arguments}
        wanted = (set(inspect.signature(call).parameters) | methods) - {"method"}
        assert {renamed.get(name, name) for name in taken} == wanted


def test_values_are_checked_when_the_graph_runs() -> None:
    wrong = [layer.clone() for layer in MAPS]
    wrong[1][1, 0, 2, 3] = torch.nan
    run = compiled("aot_eager")
    with pytest.raises(
        ValueError, match=r"attentions\[1\] must be finite, got nan in layer 1, sample 1, at \[0, 2, 3\]"
    ):
        run(wrong)
    with pytest.raises(ValueError, match=r"lengths must be in 1\.\.S = 1\.\.7, got values from 4 to 9"):
        compiled("eager")(MAPS, query=0, lengths=torch.tensor([9, 4]))
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'nonsense'"):
        compiled("eager")(MAPS, query=0, backend="nonsense")


WRONG = {
    "one-tensor": (r"attentions must be a sequence of L tensors", MAPS[0], {}),
    "none-inside": (r"attentions\[1\] must be a tensor .*, got None", [MAPS[0], None], {}),
    "batch": (r"attentions\[1\] must have the B = 2 and S = 7 of attentions\[0\]", [MAPS[0], MAPS[1][:1]], {}),
    "row": (r"query must be a row in -7\.\.6, got 7", MAPS, {"query": 7}),
    "bool": (r"query must be None, an int, .* got True", MAPS, {"query": True}),
    "lengths": ("for argument .*lengths", MAPS, {"lengths": [7, 4]}),
    "method": (r"method must be one of .* got 'nonsense'", MAPS, {"method": "nonsense"}),
    "gradients": (r"gradients must be given for a gradient-weighted method", MAPS, {"method": "chefer"}),
    "function": (
        r"head_fusion must be a string or a tensor of head weights where the call is compiled .* got a Python function",
        MAPS, {"method": Method(head_fusion=lambda maps, gradients: maps.mean(1))},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_shapes_and_types_are_named_when_the_call_is_traced(name: str) -> None:
    said, maps, options = WRONG[name]
    with pytest.raises(Exception, match=said):  # the compiler's own exception, with ours in it
        compiled("eager", **options)(maps)


def test_a_plain_call_does_not_go_through_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "attention_rollout", None)
    monkeypatch.setattr(operators, "attention_rollout_qk", None)
    assert not ops.is_traced(MAPS)
    for run, given, options in CALLS.values():
        assert run(*given, **options).isfinite().all()


def test_head_weights_are_a_copy() -> None:
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    method = Method(head_fusion=weights)
    weights.zero_()
    assert method.head_weights(1, 2).tolist() == [[0.25, 0.75]]
