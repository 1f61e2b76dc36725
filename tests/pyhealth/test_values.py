"""The value-aware methods on PyHealth's own models, beside an explicit computation from PyHealth's own maps."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("pyhealth", reason="the PyHealth drop-in needs the pyhealth extra")

import rollout
from rollout.pyhealth import AttentionRollout
from rollout.pyhealth.merged import merged_blocks
from tests.capture.test_pyhealth_models import masked_batch, to_dtype
from tests.support.capture_state import assert_nothing_left, state
from tests.support.pyhealth_models import HookOnly, Stock, batch, codes, maps_of, stage_net, transformer

NAMES = ("value_norm", "kobayashi")
MASKS = ["first id 0", "nothing valid", "holes", "mask of holes", "mask without any", "all valid"]


def seen(model: Any, data: dict[str, Any]) -> dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """Per feature and layer A [B, H, S, S], v [B, H, S, D], W_O [H, D, E] and x [B, S, E], with hooks of our own."""
    found: dict[str, list[Any]] = {key: [] for key in model.feature_keys}
    maps, handles = maps_of(model, data), []

    def watch(mha: Any, key: str, before: nn.Module) -> None:
        def heads(x: Tensor) -> Tensor:
            return mha.linear_layers[2](x).unflatten(-1, (mha.h, -1)).transpose(1, 2)

        inputs: list[Tensor] = []
        handles.append(before.register_forward_pre_hook(lambda module, args: inputs.append(args[0])))
        handles.append(
            mha.register_forward_pre_hook(
                lambda module, args: found[key].append((heads(args[2]), mha.output_linear.weight, inputs.pop()))
            )
        )

    for key in model.feature_keys:
        if hasattr(model, "stagenet"):
            mha = model.stagenet[key].mha
            watch(mha, key, mha)
        else:
            for block in model.transformer[key].transformer:
                watch(block.attention, key, block.input_sublayer)
    with torch.no_grad():
        model(**data)
    for handle in handles:
        handle.remove()
    return {
        key: [
            (attention.detach(), v, torch.stack(weight.T.chunk(v.shape[1])), x)
            for attention, (v, weight, x) in zip(maps[key], layers, strict=True)
        ]
        for key, layers in found.items()
    }


def matrices(layers: list[tuple[Tensor, Tensor, Tensor, Tensor]], name: str) -> Tensor:
    """M_L · … · M_1 with a vector [E] for every pair; a row of no length keeps its own place."""
    product = torch.eye(layers[0][0].shape[-1], dtype=torch.float64)
    for attention, v, weights, x in layers:
        vectors = torch.einsum("bhjd,hde->bhje", v, weights)
        own = torch.eye(x.shape[1], dtype=torch.float64)
        if name == "value_norm":
            matrix = torch.einsum("bhij,bhj->bij", attention, vectors.norm(dim=-1)) + own * x.norm(dim=-1)[:, :, None]
        else:
            mixed = torch.einsum("bhij,bhje->bije", attention, vectors)
            matrix = (mixed + own[None, :, :, None] * x[:, :, None]).norm(dim=-1)
        sums = matrix.sum(-1, keepdim=True)
        product = torch.where(sums > 0, matrix / sums, own) @ product
    return product


def assert_explicit(model: Any, data: dict[str, Any], name: str, read: Callable[[str, Tensor], Tensor]) -> None:
    """The drop-in's scores are the row that is read of the explicit product."""
    ours = AttentionRollout(model, method=name).attribute(**data)
    for key, layers in seen(model, data).items():
        wanted = read(key, matrices(layers, name))
        score = ours[key] if ours[key].dim() == 2 else ours[key][:, :, 0]
        torch.testing.assert_close(score[:, : wanted.shape[1]], wanted, atol=1e-10, rtol=0)
        assert torch.count_nonzero(score[:, wanted.shape[1] :]) == 0
        torch.testing.assert_close(wanted.sum(1), torch.ones(len(wanted), dtype=torch.float64))


@pytest.fixture
def in_double() -> Iterator[None]:
    """A StageAttentionNet makes its states in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def doubled(kind: str, make: Callable[..., Any] = transformer, **options: Any) -> tuple[Any, dict[str, Any]]:
    return make(kind, **options).double().eval(), to_dtype(batch(kind), torch.float64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["flat", "nested", "gaps", "stagenet_tensor", "half_empty"])
def test_a_transformers_row_0(kind: str, name: str) -> None:
    """Flat and nested features, first visits without codes, several streams, and records without any code."""
    model, data = doubled(kind, heads=4)
    assert_explicit(model, data, name, lambda key, product: product[:, 0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", MASKS)
def test_every_kind_of_mask(case: str, name: str) -> None:
    """Position 0 that may not be attended is uniform over all positions, and their values count."""
    model, data = transformer("flat").double().eval(), to_dtype(masked_batch(case), torch.float64)
    assert_explicit(model, data, name, lambda key, product: product[:, 0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["nested", "gaps", "stagenet_tensor"])
def test_a_stage_attention_nets_last_visit(kind: str, name: str, in_double: None) -> None:
    """Beside what PyHealth's own readout picks of the explicit product."""
    model, data = doubled(kind, stage_net)
    product = {key: matrices(layers, name) for key, layers in seen(model, data).items()}
    read = model.get_relevance_tensor(product, **data)
    assert_explicit(model, data, name, lambda key, product: read[key])


def test_the_numbers_are_not_those_of_plain_rollout() -> None:
    model, data = doubled("flat")
    found = {name: AttentionRollout(model, method=name).attribute(**data) for name in ("rollout", *NAMES)}
    for key in model.feature_keys:
        for one, other in (("rollout", "value_norm"), ("value_norm", "kobayashi")):
            assert float((found[one][key] - found[other][key]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "method",
    [
        replace(rollout.METHODS["value_norm"], own_path=False),
        replace(rollout.METHODS["value_norm"], residual=0.5, renormalize=False, start_layer=1),
        rollout.METHODS["kobayashi"],
    ],
    ids=["own path", "start layer", "kobayashi"],
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_backends_and_methods_beside_the_oracle_on_maps(method: rollout.Method, backend: str) -> None:
    model, data = doubled("flat")
    ours = AttentionRollout(model, method=method, backend=backend).attribute(**data)
    for key, layers in seen(model, data).items():
        maps, values, weights, inputs = (list(part) for part in zip(*layers, strict=True))
        wanted = rollout.attention_rollout(
            maps, query=0, values=values, output_weights=weights, inputs=inputs, method=method, backend="reference"
        )
        torch.testing.assert_close(ours[key], wanted, atol=1e-10, rtol=0)


def test_a_readout_of_its_own_gets_the_whole_matrix() -> None:
    model, data = doubled("flat")
    model.get_relevance_tensor = lambda R, **data: {key: r.mean(1) for key, r in R.items()}
    assert_explicit(model, data, "value_norm", lambda key, product: product.mean(1))


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_and_nothing_left(name: str) -> None:
    model, data = transformer("flat").eval().requires_grad_(False), batch("flat")
    before, wanted = state(model), seen(copy.deepcopy(model).double(), data)
    ours = AttentionRollout(model, method=name).attribute(**data)
    assert_nothing_left(model, before)
    for key, layers in wanted.items():
        assert ours[key].dtype == torch.float32
        product = matrices(layers, name)[:, 0]
        torch.testing.assert_close(ours[key].double(), product, atol=3e-6, rtol=0)


def test_rows_are_not_merged_for_them() -> None:
    model = transformer("flat").eval()
    with pytest.raises(ValueError, match="the method measures values"):
        merged_blocks(model, rollout.METHODS["value_norm"], "auto")
    assert AttentionRollout(model, method="value_norm").describe_path().endswith("the method measures values")


# Where they are refused.


def nothing(*args: Any) -> None:
    """A hook that does nothing."""


def block_of(model: Any) -> Any:
    return model.transformer["drugs"].transformer[1]


def half(model: Any) -> None:
    model.bfloat16()


def watched(model: Any) -> None:
    block_of(model).attention.attention.register_forward_hook(nothing)


def projected_otherwise(model: Any) -> None:
    block_of(model).attention.output_linear.register_forward_hook(lambda module, args, out: 2 * out)


def mixed_otherwise(model: Any) -> None:
    block_of(model).attention.register_forward_hook(lambda module, args, out: 2 * out)


def added_otherwise(model: Any) -> None:
    sublayer = block_of(model).input_sublayer
    sublayer.forward = lambda x, layer: sublayer.norm(x) + layer(sublayer.norm(x))


def another_block(model: Any) -> None:
    block = block_of(model)
    block.forward = lambda x, mask=None, register_hook=False: block.attention(x, x, x, mask)


def another_output(model: Any) -> None:
    block_of(model).attention.output_linear = nn.Sequential(nn.Linear(16, 16, bias=False))


REFUSED = [
    (half, "half precision, autocast, dropout, or someone else's eyes on the attention"),
    (watched, "half precision, autocast, dropout, or someone else's eyes on the attention"),
    (projected_otherwise, "of 'drugs' layer 1 is not all PyHealth's own, or has a hook between"),
    (mixed_otherwise, "of 'drugs' layer 1"),
    (added_otherwise, "of 'drugs' layer 1"),
    (another_block, "of 'drugs' layer 1"),
    (another_output, "of 'drugs' layer 1"),
]


@pytest.mark.parametrize(("change", "why"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_model_of_which_they_are_not_seen_is_refused_before_it_runs(change: Callable[[Any], None], why: str) -> None:
    """When the interpreter is made, and when the model was changed after it."""
    model, ran = transformer("flat").eval(), []
    interpreter = AttentionRollout(model, method="value_norm")
    change(model)
    model.register_forward_hook(lambda *args: ran.append(args))
    for call in (lambda: AttentionRollout(model, method="value_norm"), lambda: interpreter.attribute(**batch("flat"))):
        with pytest.raises(ValueError, match=r"method must not measure values for this Transformer") as error:
            call()
        assert why in str(error.value)
    assert ran == []


def test_a_stage_attention_net_that_attends_to_something_else_is_refused() -> None:
    model = stage_net("nested")
    model.stagenet["visits"].mha.register_forward_pre_hook(lambda module, args: tuple(2 * x for x in args))
    with pytest.raises(ValueError, match="of 'visits' layer 0 is not all PyHealth's own"):
        AttentionRollout(model, method="kobayashi")


def test_models_by_protocol_are_refused() -> None:
    with pytest.raises(ValueError, match=r"this HookOnly.*is not PyHealth's own; use method='rollout'"):
        AttentionRollout(HookOnly(), method="kobayashi")
    assert torch.isfinite(AttentionRollout(HookOnly()).attribute(codes=codes())["codes"]).all()


def test_a_mask_that_is_not_of_valid_positions_is_refused() -> None:
    model = transformer("flat")
    attention = block_of(model).attention.attention
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: (args, dict(kwargs, mask=kwargs["mask"].tril())), with_kwargs=True
    )
    with pytest.raises(ValueError, match="a mask is not made of valid positions"):
        AttentionRollout(model, method="value_norm").attribute(**batch("flat"))
    Stock(model).attribute(**batch("flat"))
