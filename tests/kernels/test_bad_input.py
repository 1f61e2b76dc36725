"""Wrong input is refused before any work, by an error that names the argument, what came and what is wanted."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import rollout
from rollout import Method
from rollout_kernels import _checks, ops
from tests.support.cases import assert_refused, random_gradients, random_maps, random_qk

B, H, S, L, D = 2, 3, 5, 3, 4
Edit = Callable[[list[Tensor]], object]


def case(name: str, error: type[Exception], *said: str, **arguments: Any) -> Any:
    """One wrong call: the exception, what its message must say, and the arguments that differ from a right call."""
    return pytest.param(error, said, arguments, id=name)


def swapped(index: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Edit:
    """The tensors with one replaced."""
    return lambda given: [torch.ones(*shape).to(dtype) if i == index else t for i, t in enumerate(given)]


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> Tensor:
        raise AssertionError("work was started on a wrong input")

    monkeypatch.setattr(ops._dispatch, "run", run)


MAPS = "[B, H, S, S] or [B, S, S]"
QUERY = ("query must be", "None, an int, a long tensor [B] or a float tensor [B, S] or [B, R, S]")

WRONG_MAPS = [
    case("empty", ValueError, "attentions", "empty", MAPS, attentions=lambda m: []),
    case("none", TypeError, "attentions", "NoneType", "sequence", attentions=lambda m: None),
    case("string", TypeError, "attentions", "str", "sequence", attentions=lambda m: "maps"),
    case("dict", TypeError, "attentions", "dict", "sequence", attentions=lambda m: {"a": m[0]}),
    case("one-tensor", TypeError, "attentions", "[2, 3, 5, 5]", "sequence", "list(", attentions=lambda m: m[0]),
    case("none-inside", TypeError, "attentions[1]", "None", "attention_rollout_qk", attentions=lambda m: [m[0], None]),
    case("array-inside", TypeError, "attentions[0]", "ndarray", "tensor", attentions=lambda m: [m[0].numpy()]),
    case("rank-2", ValueError, "attentions[1]", MAPS, "[5, 5]", attentions=swapped(1, (S, S))),
    case("rank-5", ValueError, "attentions[0]", MAPS, "[1, 2, 3, 5, 5]", attentions=swapped(0, (1, B, H, S, S))),
    case(
        "not-square",
        ValueError,
        "attentions[2]",
        "equal last sizes",
        "[2, 3, 5, 6]",
        attentions=swapped(2, (B, H, S, 6)),
    ),
    case("no-positions", ValueError, "attentions[0]", "1 or more", "[2, 3, 0, 0]", attentions=swapped(0, (B, H, 0, 0))),
    case(
        "no-heads",
        ValueError,
        "attentions[1]",
        "at least one head",
        "[2, 0, 5, 5]",
        attentions=swapped(1, (B, 0, S, S)),
    ),
    case("other-batch", ValueError, "attentions[1]", "B = 2", "[4, 3, 5, 5]", attentions=swapped(1, (4, H, S, S))),
    case("other-length", ValueError, "attentions[2]", "S = 5", "[2, 6, 6]", attentions=swapped(2, (B, 6, 6))),
    case(
        "integers",
        TypeError,
        "attentions[1]",
        "float32",
        "torch.int64",
        attentions=swapped(1, (B, H, S, S), torch.int64),
    ),
    case("bools", TypeError, "attentions[0]", "float32", "torch.bool", attentions=swapped(0, (B, H, S, S), torch.bool)),
    case(
        "complex",
        TypeError,
        "attentions[0]",
        "float32",
        "complex64",
        attentions=swapped(0, (B, H, S, S), torch.complex64),
    ),
    case("meta", ValueError, "attentions[1]", "meta", attentions=lambda m: [m[0], m[1].to("meta")]),
]

WRONG_SELECTIONS = [
    case("row-high", ValueError, "query", "-5..4", "got 5", query=5),
    case("row-low", ValueError, "query", "-5..4", "got -6", query=-6),
    case("row-beyond-length", ValueError, "query", "sample 1", "length 3", "-3..2", "got 4", query=4, lengths=[5, 3]),
    case("row-below-length", ValueError, "query", "sample 1", "-3..2", "got -4", query=-4, lengths=[5, 3]),
    case("rows-high", ValueError, "query", "sample 1", "-5..4", "got 5", query=torch.tensor([0, 5])),
    case(
        "rows-beyond-length",
        ValueError,
        "query",
        "sample 0",
        "-2..1",
        "got 2",
        query=torch.tensor([2, 2]),
        lengths=[2, 3],
    ),
    case(
        "rows-below-length",
        ValueError,
        "query",
        "sample 1",
        "-3..2",
        "got -4",
        query=torch.tensor([-2, -4]),
        lengths=[2, 3],
    ),
    case("rows-shape", ValueError, "query", "[B] = [2]", "[3]", query=torch.tensor([0, 0, 0])),
    case("rows-rank", ValueError, "query", "[B] = [2]", "[2, 1]", query=torch.zeros(2, 1, dtype=torch.long)),
    case("rows-scalar", ValueError, "query", "[B] = [2]", "[]", query=torch.tensor(1)),
    case("weights-rank", ValueError, "query", "[2, 5]", "[2, R, 5]", "got [5]", query=torch.ones(5)),
    case("weights-length", ValueError, "query", "[2, 5]", "got [2, 6]", query=torch.ones(2, 6)),
    case("weights-batch", ValueError, "query", "[2, R, 5]", "got [3, 1, 5]", query=torch.ones(3, 1, 5)),
    case("weights-nan", ValueError, "query", "finite", "NaN", query=torch.tensor([[0.0, torch.nan, 0, 0, 0]] * 2)),
    case("weights-inf", ValueError, "query", "finite", "Inf", query=torch.tensor([[0.0, torch.inf, 0, 0, 0]] * 2)),
    case("query-bools", TypeError, *QUERY, "torch.bool", query=torch.tensor([True, False])),
    case("query-bool", TypeError, *QUERY, "True", query=True),
    case("query-float", TypeError, *QUERY, "0.5", query=0.5),
    case("query-string", TypeError, *QUERY, "'cls'", query="cls"),
    case("query-list", TypeError, *QUERY, "[0, 1]", query=[0, 1]),
    case("query-complex", TypeError, *QUERY, "complex64", query=torch.ones(2, 5, dtype=torch.complex64)),
    case(
        "query-device",
        ValueError,
        "query",
        "device",
        "cpu",
        "got meta",
        query=torch.zeros(2, dtype=torch.long, device="meta"),
    ),
    case("length-0", ValueError, "lengths", "1..5", "from 0 to 5", lengths=[0, 5]),
    case("length-above", ValueError, "lengths", "1..5", "from 2 to 6", lengths=[6, 2]),
    case("length-negative", ValueError, "lengths", "1..5", "from -1 to 3", lengths=[3, -1]),
    case("lengths-shape", ValueError, "lengths", "[B] = [2]", "got [3]", lengths=[5, 5, 5]),
    case("lengths-rank", ValueError, "lengths", "[B] = [2]", "got [2, 1]", lengths=[[5], [5]]),
    case("lengths-scalar", ValueError, "lengths", "[B] = [2]", "got []", lengths=torch.tensor(5)),
    case("lengths-list", TypeError, "lengths", "long tensor [B]", "list", lengths=lambda: [5, 5]),
    case("lengths-float", TypeError, "lengths", "long tensor [B]", "float32", lengths=torch.tensor([5.0, 5.0])),
    case("lengths-bool", TypeError, "lengths", "long tensor [B]", "torch.bool", lengths=torch.tensor([True, True])),
    case(
        "lengths-device",
        ValueError,
        "lengths",
        "device",
        "got meta",
        lengths=torch.ones(2, dtype=torch.long, device="meta"),
    ),
]

WRONG_METHODS = [
    case("method", ValueError, "method", "'rolout'", "chefer_rollout", method="rolout"),
    case("method-type", TypeError, "method", "rollout.METHODS", "3", method=3),
    case("method-none", TypeError, "method", "rollout.METHODS", "None", method=None),
    case("start-layer", ValueError, "start_layer", "less than L = 3", "got 3", method=Method(start_layer=3)),
    case(
        "head-weights",
        ValueError,
        "head_fusion",
        "[H] = [3]",
        "[L, H] = [3, 3]",
        "got [2]",
        method=Method(head_fusion=torch.ones(2)),
    ),
    case(
        "head-weights-layers",
        ValueError,
        "head_fusion",
        "[L, H] = [3, 3]",
        "got [2, 3]",
        method=Method(head_fusion=torch.ones(2, 3)),
    ),
]

GRADIENTS = [
    case("missing", ValueError, "gradients", "gradient-weighted", "None"),
    case("empty", ValueError, "gradients", "empty", gradients=lambda g: []),
    case("too-few", ValueError, "gradients", "3", "got 2", gradients=lambda g: g[:2]),
    case(
        "shape",
        ValueError,
        "gradients[1]",
        "attentions[1]",
        "[2, 3, 5, 5]",
        "got [2, 1, 5, 5]",
        gradients=swapped(1, (B, 1, S, S)),
    ),
    case("batch", ValueError, "gradients[2]", "B = 2", "got [1, 3, 5, 5]", gradients=swapped(2, (1, H, S, S))),
    case("rank", ValueError, "gradients[0]", MAPS, "got [5, 5]", gradients=swapped(0, (S, S))),
    case("integers", TypeError, "gradients[0]", "float32", "int32", gradients=swapped(0, (B, H, S, S), torch.int32)),
    case("none-inside", TypeError, "gradients[1]", "None", gradients=lambda g: [g[0], None, g[2]]),
]

QK = [
    case("empty", ValueError, "queries", "empty", "[B, H, S, D]", queries=lambda q: [], keys=lambda k: []),
    case("one-tensor", TypeError, "queries", "sequence", "[2, 4, 5, 4]", queries=lambda q: q[0]),
    case("no-keys", TypeError, "keys", "sequence", "NoneType", keys=lambda k: None),
    case("layers", ValueError, "keys", "3", "got 2", keys=lambda k: k[:2]),
    case("rank", ValueError, "queries[1]", "[B, H, S, D]", "got [2, 5, 4]", queries=swapped(1, (B, S, D))),
    case("keys-rank", ValueError, "keys[0]", "[B, H_kv, S, D]", "got [2, 5, 4]", keys=swapped(0, (B, S, D))),
    case("no-dimension", ValueError, "queries[0]", "1 or more", "got [2, 4, 5, 0]", queries=swapped(0, (B, 4, S, 0))),
    case("no-keys-heads", ValueError, "keys[0]", "1 or more", "got [2, 0, 5, 4]", keys=swapped(0, (B, 0, S, D))),
    case("batch", ValueError, "queries[2]", "B = 2", "got [1, 4, 5, 4]", queries=swapped(2, (1, 4, S, D))),
    case("length", ValueError, "queries[1]", "S = 5", "got [2, 4, 6, 4]", queries=swapped(1, (B, 4, 6, D))),
    case("keys-length", ValueError, "keys[0]", "[2, H_kv, 5, 4]", "got [2, 2, 6, 4]", keys=swapped(0, (B, 2, 6, D))),
    case("keys-batch", ValueError, "keys[1]", "[2, H_kv, 5, 4]", "got [3, 2, 5, 4]", keys=swapped(1, (3, 2, S, D))),
    case("keys-dimension", ValueError, "keys[1]", "[2, H_kv, 5, 4]", "got [2, 2, 5, 3]", keys=swapped(1, (B, 2, S, 3))),
    case(
        "groups", ValueError, "keys[2]", "H = 4 a multiple of H_kv", "got [2, 3, 5, 4]", keys=swapped(2, (B, 3, S, D))
    ),
    case(
        "more-keys-heads",
        ValueError,
        "keys[0]",
        "H = 4 a multiple of H_kv",
        "[2, 8, 5, 4]",
        keys=swapped(0, (B, 8, S, D)),
    ),
    case("integers", TypeError, "queries[0]", "float32", "int64", queries=swapped(0, (B, 4, S, D), torch.int64)),
    case("keys-integers", TypeError, "keys[1]", "float32", "int64", keys=swapped(1, (B, 2, S, D), torch.int64)),
    case("meta", ValueError, "keys[0]", "meta", keys=lambda k: [t.to("meta") for t in k]),
    case("mask-dtype", TypeError, "key_mask", "bool tensor [B, S]", "float32", key_mask=torch.ones(B, S)),
    case("mask-type", TypeError, "key_mask", "bool tensor [B, S]", "list", key_mask=[[True] * S] * B),
    case(
        "mask-shape",
        ValueError,
        "key_mask",
        "[B, S] = [2, 5]",
        "got [2, 1, 5]",
        key_mask=torch.ones(B, 1, S, dtype=torch.bool),
    ),
    case(
        "mask-device",
        ValueError,
        "key_mask",
        "device",
        "meta",
        key_mask=torch.ones(B, S, dtype=torch.bool, device="meta"),
    ),
    case(
        "query-mask-dtype", TypeError, "query_mask", "bool tensor [B, S]", "int64", query_mask=torch.ones(B, S).long()
    ),
    case(
        "query-mask-shape",
        ValueError,
        "query_mask",
        "[B, S] = [2, 5]",
        "got [2, 6]",
        query_mask=torch.ones(B, 6, dtype=torch.bool),
    ),
    case("causal", TypeError, "causal", "True or False", "got 1", causal=1),
    case("window-int", TypeError, "window", "(left, right)", "got 3", window=3),
    case("window-length", TypeError, "window", "(left, right)", "got (1, 2, 3)", window=(1, 2, 3)),
    case("window-float", TypeError, "window", "(left, right)", "1.5", window=(1.5, 0)),
    case("window-negative", ValueError, "window", "0 or more", "-2", window=(0, -2)),
    case(
        "bias-dtype",
        TypeError,
        "bias",
        "floating-point",
        "torch.bool",
        "key_mask",
        bias=torch.ones(S, S, dtype=torch.bool),
    ),
    case("bias-shape", ValueError, "bias[0]", "[2, 4, 5, 5]", "got [5, 6]", bias=torch.ones(S, 6)),
    case(
        "bias-layer-shape",
        ValueError,
        "bias[1]",
        "[2, 4, 5, 5]",
        "got [3, 1, 1, 5]",
        bias=[None, torch.ones(3, 1, 1, S), None],
    ),
    case("bias-layers", ValueError, "bias", "per layer (3)", "got 2", bias=[None, torch.ones(S, S)]),
    case("bias-type", TypeError, "bias", "tensor", "got float", bias=1.0),
    case("bias-inside", TypeError, "bias[1]", "floating-point", "float", bias=[None, 1.0, None]),
    case("bias-device", ValueError, "bias[0]", "device", "meta", bias=torch.ones(S, S, device="meta")),
    case("alibi-dtype", TypeError, "alibi_slopes[0]", "floating-point", "int64", alibi_slopes=torch.ones(4).long()),
    case("alibi-shape", ValueError, "alibi_slopes[0]", "[H] = [4]", "got [2, 4]", alibi_slopes=torch.ones(B, 4)),
    case("alibi-layer", ValueError, "alibi_slopes[1]", "[4]", "got [3]", alibi_slopes=[None, torch.ones(3), None]),
    case("alibi-layers", ValueError, "alibi_slopes", "per layer (3)", "got 2", alibi_slopes=[None, torch.ones(4)]),
    case("alibi-type", TypeError, "alibi_slopes", "tensor", "got float", alibi_slopes=0.5),
    case("alibi-inside", TypeError, "alibi_slopes[2]", "floating-point", "str", alibi_slopes=[None, None, "a"]),
    case("alibi-device", ValueError, "alibi_slopes[0]", "device", "meta", alibi_slopes=torch.ones(4, device="meta")),
    case("alibi-nan", ValueError, "alibi_slopes[0]", "finite", alibi_slopes=torch.tensor([1.0, torch.nan, 1.0, 1.0])),
    case("scale-type", TypeError, "scale", "real number", "'1'", scale="1"),
    case("scale-nan", ValueError, "scale", "finite", "nan", scale=float("nan")),
    case("softcap-type", TypeError, "softcap", "real number", "'1'", softcap="1"),
    case("softcap-zero", ValueError, "softcap", "more than 0", "0.0", softcap=0.0),
    case("sinks-layers", ValueError, "sinks", "3", "got 2", sinks=[torch.ones(4)] * 2),
    case("sinks-shape", ValueError, "sinks[0]", "[H] = [4]", "[1]", sinks=[torch.ones(1)] * 3),
    case("sinks-nan", ValueError, "sinks[0]", "finite or -inf", "NaN", sinks=[torch.full((4,), float("nan"))] * 3),
    case("lse-layers", ValueError, "logsumexp", "3", "got 2", logsumexp=[torch.ones(B, 4, S)] * 2),
    case(
        "lse-shape",
        ValueError,
        "logsumexp[0]",
        "[2, 4, 5]",
        "got torch.float32 [2, 5]",
        logsumexp=[torch.ones(B, S)] * 3,
    ),
    case(
        "lse-dtype", ValueError, "logsumexp[0]", "float32", "bfloat16", logsumexp=[torch.ones(B, 4, S).bfloat16()] * 3
    ),
    case("lse-tensor", TypeError, "logsumexp", "sequence", "[3, 2, 4, 5]", logsumexp=torch.ones(3, B, 4, S)),
    *(
        case(name, ValueError, "method", "use attention_rollout", method=name)
        for name in ("chefer", "grad_rollout", "product")
    ),
    case("start-layer", ValueError, "start_layer", "less than L = 3", "got 4", method=Method(start_layer=4)),
    case("head-weights", ValueError, "head_fusion", "[H] = [4]", "got [3]", method=Method(head_fusion=torch.ones(3))),
]

FIELDS = [
    case("fusion", ValueError, "head_fusion", "'mean'", "'median'", head_fusion="median"),
    case("fusion-type", TypeError, "head_fusion", "tensor", "int", head_fusion=3),
    case("weights-sum", ValueError, "head_fusion", "sum to 0", head_fusion=torch.tensor([1.0, -1.0])),
    case(
        "weights-layer-sum", ValueError, "head_fusion", "sum to 0", head_fusion=torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    ),
    case("weights-rank", ValueError, "head_fusion", "[H] or [L, H]", "[1, 1, 2]", head_fusion=torch.ones(1, 1, 2)),
    case("weights-scalar", ValueError, "head_fusion", "[H] or [L, H]", "[]", head_fusion=torch.tensor(1.0)),
    case("weights-empty", ValueError, "head_fusion", "[H] or [L, H]", "[0]", head_fusion=torch.ones(0)),
    case("weights-nan", ValueError, "head_fusion", "finite", head_fusion=torch.tensor([1.0, torch.nan])),
    case("weights-bool", TypeError, "head_fusion", "real numbers", "bool", head_fusion=torch.tensor([True, False])),
    case("discard-1", ValueError, "discard_ratio", "[0, 1)", "1.0", discard_ratio=1.0),
    case("discard-below", ValueError, "discard_ratio", "[0, 1)", "-0.1", discard_ratio=-0.1),
    case("discard-nan", ValueError, "discard_ratio", "nan", discard_ratio=float("nan")),
    case("discard-type", TypeError, "discard_ratio", "real number", "'0.5'", discard_ratio="0.5"),
    case("residual-type", TypeError, "residual", "real number", "None", residual=None),
    case("residual-inf", ValueError, "residual", "finite", "inf", residual=float("inf")),
    case("attention-nan", ValueError, "attention", "finite", "nan", attention=float("nan")),
    case("attention-bool", TypeError, "attention", "real number", "True", attention=True),
    case("start-negative", ValueError, "start_layer", "0 or more", "-1", start_layer=-1),
    case("start-float", TypeError, "start_layer", "int", "1.0", start_layer=1.0),
    case("gradients", ValueError, "gradients", "clamp_then_fuse", "'relu'", gradients="relu"),
]


def call_maps(arguments: dict[str, Any]) -> Tensor:
    given = dict(arguments)
    edit = given.pop("attentions", list)
    if isinstance(given.get("lengths"), list):
        given["lengths"] = torch.tensor(given["lengths"])
    elif callable(given.get("lengths")):
        given["lengths"] = given["lengths"]()
    return rollout.attention_rollout(edit(random_maps(B, H, S, layers=L)), **given)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("error", "said", "arguments"), WRONG_MAPS + WRONG_SELECTIONS + WRONG_METHODS)
def test_maps(error: type[Exception], said: Sequence[str], arguments: dict[str, Any]):
    assert_refused(error, ("attention_rollout: ", *said), lambda: call_maps(arguments))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", ["chefer", "grad_rollout"])
@pytest.mark.parametrize(("error", "said", "arguments"), GRADIENTS)
def test_gradients(error: type[Exception], said: Sequence[str], arguments: dict[str, Any], name: str):
    maps = random_maps(B, H, S, layers=L)
    edit = arguments.get("gradients", lambda g: None)
    slopes = edit(random_gradients(maps))
    call = lambda: rollout.attention_rollout(maps, gradients=slopes, method=name)  # noqa: E731
    assert_refused(error, ("attention_rollout: ", *said), call)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("error", "said", "arguments"), QK)
def test_queries_and_keys(error: type[Exception], said: Sequence[str], arguments: dict[str, Any]):
    queries, keys = random_qk(B, 4, S, D, groups=2)
    given = dict(arguments)
    queries, keys = given.pop("queries", list)(queries), given.pop("keys", list)(keys)
    call = lambda: rollout.attention_rollout_qk(queries, keys, **given)  # noqa: E731
    assert_refused(error, ("attention_rollout_qk: ", *said), call)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("error", "said", "arguments"), WRONG_SELECTIONS)
def test_selections_of_queries_and_keys(error: type[Exception], said: Sequence[str], arguments: dict[str, Any]):
    queries, keys = random_qk(B, H, S)
    given = dict(arguments)
    if "lengths" in given:
        value = given["lengths"]
        given["lengths"] = torch.tensor(value) if isinstance(value, list) else value() if callable(value) else value
    call = lambda: rollout.attention_rollout_qk(queries, keys, **given)  # noqa: E731
    assert_refused(error, ("attention_rollout_qk: ", *said), call)


@pytest.mark.parametrize(("error", "said", "arguments"), FIELDS)
def test_method_fields(error: type[Exception], said: Sequence[str], arguments: dict[str, Any]):
    assert_refused(error, ("Method: ", *said), lambda: Method(**arguments))


@pytest.mark.usefixtures("no_work")
def test_supplied_matrices_have_no_heads():
    call = lambda: rollout.attention_rollout(random_maps(B, H, S), method="product")  # noqa: E731
    assert_refused(ValueError, ("attentions[0]", "matrix [B, S, S]", "got [2, 3, 5, 5]"), call)


@pytest.mark.usefixtures("no_work")
def test_head_weights_need_one_number_of_heads():
    maps = [*random_maps(B, 2, S, layers=1), *random_maps(B, 3, S, layers=1)]
    call = lambda: rollout.attention_rollout(maps, method=Method(head_fusion=torch.ones(3)))  # noqa: E731
    assert_refused(ValueError, ("head_fusion", "same H in every layer", "[2, 3]"), call)


def test_layers_on_two_devices():
    """No second device here: the check itself, which every tensor of a call passes through."""
    call = lambda: _checks.same_device("f", torch.device("cuda:1"), "attentions[1]", torch.ones(1))  # noqa: E731
    assert_refused(ValueError, ("f: attentions[1]", "same device as the first layer, cuda:1", "got cpu"), call)
    maps = random_maps(1, 1, 3)
    _checks.same_device("f", torch.device("cpu"), "attentions[1]", maps[0])
