"""`rollout.capture`, the tape and `register_capture`: numbers, what is left behind, streams, refusals."""

import gc
import math
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rollout
from rollout import Method, Record
from rollout._capture_mask import structure
from rollout._capture_streams import stream_names
from rollout.tape import Tape
from tests.capture_state import assert_nothing_left, state
from tests.cases import generator, random_qk, random_weights, same_bits
from tests.oracles import assert_close, rollout_matrices, softmax_maps, take_rows

ROLLOUT = rollout.METHODS["rollout"]
B, S, E, H = 3, 6, 8, 2


class Mixer(nn.Module):
    """An attention nobody knows; it keeps its maps for the test."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(E, E), nn.Linear(E, E)
        self.maps: list[Tensor] = []

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (H, -1)).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = self.split(self.q(x)) @ self.split(self.k(x)).transpose(-1, -2) * 0.7
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -math.inf)
        maps = scores.softmax(-1)
        self.maps = [maps]
        return x + (maps @ self.split(x)).transpose(1, 2).flatten(2)


class Cousin(Mixer):
    pass


class Model(nn.Module):
    def __init__(self, layers: int = 3, kind: type[Mixer] = Mixer) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(layers))
        self.fail = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask=mask)
        if self.fail:
            raise RuntimeError("the model raises")
        return x


def read_mixer(module: Mixer, x: Tensor, mask: Tensor | None = None) -> Record:
    return Record(queries=module.split(module.q(x)), keys=module.split(module.k(x)), key_mask=mask, scale=0.7)


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    rollout.register_capture(Mixer, read_mixer)
    yield
    rollout.register_capture(Mixer, None)


def model_and_input(layers: int = 3) -> tuple[Model, Tensor, Tensor]:
    torch.manual_seed(0)
    mask = torch.tensor([[True] * 6, [True, False, True, True, False, False], [True] * 3 + [False] * 3])
    return Model(layers).double().eval(), torch.randn(B, S, E, generator=generator(1), dtype=torch.float64), mask


def expected(model: Model) -> Any:
    return rollout_matrices([block.maps[0] for block in model.blocks], ROLLOUT)


def test_numbers_of_every_form():
    model, x, mask = model_and_input()
    for given in (None, mask):
        plain = model(x, mask=given)
        with rollout.capture(model) as tape, torch.inference_mode():
            output = model(x, mask=given)
        assert same_bits(output.clone(), plain.detach())
        full = expected(model)
        for query in (None, 0, -1, torch.tensor([2, 0, 1]), random_weights(B, S), random_weights(B, 2, S)):
            result = tape.rollout(query)
            assert list(result) == ["blocks"]
            assert_close(result["blocks"], take_rows(full, query), "qk")
        for method in ("pyhealth", "chefer_rollout", Method(head_fusion="max"), Method(start_layer=2)):
            matrices = rollout_matrices([b.maps[0] for b in model.blocks], rollout.method.get_method(method))
            for backend in ("torch", "reference"):
                assert_close(tape.rollout(0, method=method, backend=backend)["blocks"], matrices[:, 0], "qk")


def test_maps_on_demand():
    model, x, mask = model_and_input()
    with rollout.capture(model) as tape:
        model(x, mask=mask)
    for layer in (0, 2, -1):
        assert_close(tape.maps(layer), model.blocks[layer].maps[0], "qk")
        assert_close(tape.maps(layer, "blocks"), model.blocks[layer].maps[0], "qk")
    for layer in (3, -4):
        with pytest.raises(IndexError, match=r"Tape.maps: layer must be one of the stream's 3 layers, got"):
            tape.maps(layer)
    with pytest.raises(KeyError, match=r"stream must name one of the streams \['blocks'\]"):
        tape.maps(0, "other")


def test_tape_stays_after_the_block_and_frees():
    model, x, _ = model_and_input()
    with rollout.capture(model) as tape:
        model(x)
        inside = tape.rollout(0)["blocks"]
    assert same_bits(tape.rollout(0)["blocks"], inside)
    per_layer = 2 * B * S * E * 8
    assert tape.nbytes == 3 * per_layer
    assert tape.modules() == ("blocks.0", "blocks.1", "blocks.2")
    held = [weakref.ref(layer.queries) for layer in tape.layers()]
    tape.clear()
    assert tape.nbytes == 0
    assert all(ref() is None for ref in held)
    with pytest.raises(ValueError, match=r"Tape.rollout: the tape must hold a forward pass"):
        tape.rollout(0)
    with rollout.capture(model) as tape:
        model(x)
    held = [weakref.ref(layer.keys) for layer in tape.layers()]
    del tape
    assert all(ref() is None for ref in held)


def test_the_model_can_be_freed():
    model, x, _ = model_and_input()
    with rollout.capture(model) as tape:
        model(x)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    assert tape.rollout(0)["blocks"].shape == (B, S)


def test_memory_two_records_share_counts_once():
    both = torch.randn(2, 5, 2, 2, 4)
    record = Record(queries=both[:, :, 0].transpose(1, 2), keys=both[:, :, 1].transpose(1, 2))
    tape = Tape()
    tape.add("a", "x", record)
    tape.add("a", "y", record)
    assert tape.nbytes == both.numel() * 4
    assert repr(tape) == "Tape(a: 2 layers; 640 bytes)"


def quiet(model: nn.Module) -> dict[str, Any]:
    """The model's state without what the models here keep for the tests."""
    return {k: v for k, v in state(model).items() if not k.endswith((":maps", ":fail"))}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nothing_is_left_after_success(mode: Any):
    model, x, mask = model_and_input()
    before = quiet(model)
    with rollout.capture(model) as tape, mode():
        output = model(x, mask=mask)
    assert quiet(model) == before
    assert not any(t.requires_grad for layer in tape.layers() for t in layer.tensors())
    assert output.requires_grad == (mode is torch.enable_grad)
    assert_close(tape.rollout(0)["blocks"], expected(model)[:, 0], "qk")


def test_nothing_is_left_after_errors():
    model, x, _ = model_and_input()
    before = quiet(model)
    model.fail = True
    with pytest.raises(RuntimeError, match=r"the model raises"), rollout.capture(model) as tape:
        model(x)
    assert len(tape.layers()) == 3  # what ran before is there
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied"), rollout.capture(model):
        model(x[..., :3])
    with pytest.raises(TypeError), rollout.capture(model):
        model()
    with pytest.raises(KeyboardInterrupt), rollout.capture(model):
        raise KeyboardInterrupt
    model.fail = False
    assert quiet(model) == before
    with rollout.capture(model) as tape:
        model(x)
    assert_close(tape.rollout(0)["blocks"], expected(model)[:, 0], "qk")
    assert quiet(model) == before


def test_an_instance_forward_is_put_back():
    model, x, _ = model_and_input()
    calls = []
    own = model.blocks[1].forward
    replaced = lambda *args, **kwargs: (calls.append(1), own(*args, **kwargs))[1]  # noqa: E731
    model.blocks[1].forward = replaced
    with rollout.capture(model) as tape:
        model(x)
    assert model.blocks[1].forward is replaced
    assert "forward" not in vars(model.blocks[0])
    assert calls == [1]
    assert_close(tape.rollout(0)["blocks"], expected(model)[:, 0], "qk")


def test_nested_reentered_and_second_calls():
    model, x, mask = model_and_input()
    before = quiet(model)
    with rollout.capture(model) as outer:
        model(x)
        first = outer.rollout(0)["blocks"]
        with rollout.capture(model) as inner:
            model(x, mask=mask)
        assert_close(inner.rollout(0)["blocks"], expected(model)[:, 0], "qk")
        assert same_bits(outer.rollout(0)["blocks"], inner.rollout(0)["blocks"])  # a second call replaces the first
        assert not torch.equal(first, inner.rollout(0)["blocks"])
        model(x)
        assert same_bits(outer.rollout(0)["blocks"], first)
        assert not torch.equal(inner.rollout(0)["blocks"], first)  # closed: it keeps what it has
    with rollout.capture(model.blocks[1]) as part, rollout.capture(model) as whole:
        model(x)
    assert part.modules() == ("",)
    assert same_bits(part.layers()[0].queries, whole.layers()[1].queries)
    again = rollout.capture(model)
    with again as one:
        model(x)
        with again as two:
            model(x, mask=mask)
    with again as three:
        pass
    assert one is not two
    assert same_bits(one.rollout(0)["blocks"], two.rollout(0)["blocks"])
    assert three.streams == ()
    assert quiet(model) == before


def test_another_model_in_the_block_is_not_recorded():
    model, x, _ = model_and_input()
    other = Model().double().eval()
    with rollout.capture(model) as tape:
        model(x)
        other(x)
    assert len(tape.layers()) == 3
    assert_close(tape.rollout(0)["blocks"], expected(model)[:, 0], "qk")


def test_each_thread_records_its_own():
    model, x, mask = model_and_input()
    before = quiet(model)
    inputs = [x + i for i in range(4)]
    alone = []
    for one in inputs:
        with rollout.capture(model) as tape:
            model(one)
        alone.append(tape.rollout(0)["blocks"])
    barrier, results, stray = threading.Barrier(5), [None] * 4, []

    def work(i: int) -> None:
        barrier.wait()
        for _ in range(10):
            with rollout.capture(model) as tape, torch.inference_mode():
                model(inputs[i])
            results[i] = tape.rollout(0)["blocks"]

    def bystander() -> None:
        barrier.wait()
        for _ in range(40):
            stray.append(model(x, mask=mask).detach())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)] + [threading.Thread(target=bystander)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_bits(result, wanted) for result, wanted in zip(results, alone, strict=True))
    plain = model(x, mask=mask).detach()
    assert len(stray) == 40
    assert all(same_bits(output, plain) for output in stray)
    assert quiet(model) == before


def test_a_thread_that_does_not_capture_is_not_recorded():
    model, x, mask = model_and_input()
    with rollout.capture(model) as tape:
        thread = threading.Thread(target=lambda: model(x, mask=mask))
        thread.start()
        thread.join()
        assert tape.streams == ()
        with pytest.raises(ValueError, match=r"no attention module ran in this thread"):
            tape.rollout(0)


def test_registered_function():
    model, x, _ = model_and_input()
    rollout.register_capture(Mixer, None)
    with (
        pytest.raises(
            rollout.CaptureError,
            match=r"Model has none: no module with attention in its name was found.*register_capture",
        ),
        rollout.capture(model),
    ):
        pass
    rollout.register_capture(Mixer, lambda module, x, mask=None: None)
    with rollout.capture(model) as tape:
        model(x)
    assert tape.streams == ()
    rollout.register_capture(Mixer, lambda module, x, mask=None: (x, x))
    with (
        pytest.raises(
            TypeError, match=r"register_capture: the function of Mixer must return a rollout.Record or None, got tuple"
        ),
        rollout.capture(model),
    ):
        model(x)
    for wrong in (int, "Mixer", model):
        with pytest.raises(TypeError, match=r"module_type must be a subclass of torch.nn.Module"):
            rollout.register_capture(wrong, read_mixer)
    with pytest.raises(TypeError, match=r"function must be callable, got int"):
        rollout.register_capture(Mixer, 3)
    rollout.register_capture(Mixer, read_mixer)
    derived = Model(2, Cousin).double().eval()
    with rollout.capture(derived) as tape:
        derived(x)
    assert_close(tape.rollout(0)["blocks"], expected(derived)[:, 0], "qk")


def test_unknown_attention_is_named():
    class WindowAttention(nn.Module):
        pass

    model = nn.Sequential(nn.Linear(3, 3), *[WindowAttention() for _ in range(10)])
    with (
        pytest.raises(
            rollout.CaptureError, match=r"attention-like modules found: 1 \(WindowAttention\), .* and 2 more"
        ),
        rollout.capture(model),
    ):
        pass
    with pytest.raises(TypeError, match=r"capture: model must be a torch.nn.Module, got function"):
        rollout.capture(paths)


def test_streams_of_mixed_attention_are_refused():
    class OtherAttention(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return x

    model, x, _ = model_and_input()
    model.blocks.append(OtherAttention())
    before = quiet(model)
    with (
        pytest.raises(
            rollout.CaptureError,
            match=r"stream 'blocks' must all be of a known kind, got Mixer and, at blocks.3, OtherAttention",
        ),
        rollout.capture(model),
    ):
        model(x)
    assert quiet(model) == before


def test_a_module_that_attends_twice():
    class Universal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Mixer()

        def forward(self, x: Tensor) -> Tensor:
            self.every = []
            for _ in range(3):
                x = self.block(x)
                self.every.append(self.block.maps[0])
            return x

    torch.manual_seed(0)
    model, x = Universal().double().eval(), random_weights(B, S, E).double()
    with (
        pytest.raises(
            rollout.CaptureError, match=r"must attend once in a call of the model, block did twice.*shared_layers=True"
        ),
        rollout.capture(model),
    ):
        model(x)
    with rollout.capture(model, shared_layers=True) as tape:
        model(x)
    assert_close(tape.rollout(0)["layers"], rollout_matrices(model.every, ROLLOUT)[:, 0], "qk")


def test_a_part_called_alone():
    model, x, _ = model_and_input()
    with rollout.capture(model) as tape:
        model.blocks[0](x)
        with pytest.raises(rollout.CaptureError, match=r"call the model, not a part of it"):
            model.blocks[0](x)
        model(x)
    assert_close(tape.rollout(0)["blocks"], expected(model)[:, 0], "qk")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_dropout_compiled_and_scripted_models_are_refused():
    model, x, _ = model_and_input()
    model.drop = nn.Dropout(0.3)
    model.train()
    before = quiet(model)
    with (
        pytest.raises(
            rollout.CaptureError, match=r"must be in eval mode, got dropout 0.3 on in Dropout at drop: call model.eval"
        ),
        rollout.capture(model),
    ):
        pass
    model.eval()
    with rollout.capture(model):
        model.train()
        with pytest.raises(rollout.CaptureError, match=r"eval mode"):
            model(x)
    model.drop.p = 0.0
    with rollout.capture(model) as tape:  # training mode without dropout is the same model
        model(x)
    assert_close(tape.rollout(0)["blocks"], expected(model)[:, 0], "qk")
    model.drop.p = 0.3
    assert quiet(model) == before
    model.eval()
    with (
        pytest.raises(rollout.CaptureError, match=r"must not be compiled, got OptimizedModule"),
        rollout.capture(torch.compile(model)),
    ):
        pass
    parallel = nn.DataParallel(model)
    parallel.device_ids = [0, 1]
    with pytest.raises(rollout.CaptureError, match=r"got DataParallel at the root.*capture and call its .module"):
        rollout.capture(parallel).__enter__()
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(rollout.CaptureError, match=r"must run as Python"), rollout.capture(scripted):
        pass


@pytest.mark.parametrize("name", ["chefer", "grad_rollout", "product"])
def test_methods_that_need_maps_say_so(name: str):
    model, x, _ = model_and_input()
    with rollout.capture(model) as tape:
        model(x)
    with pytest.raises(
        ValueError, match=rf"Tape.rollout: method must form M_l from Q and K alone; '{name}' needs .*attention_rollout"
    ):
        tape.rollout(0, method=name)
    with pytest.raises(ValueError, match=r"method must be one of"):
        tape.rollout(0, method="other")


def record_of(layer: int, given: dict[str, Any], queries: list[Tensor], keys: list[Tensor]) -> Record:
    fields = {name: values[layer] for name, values in given.items()}
    return Record(queries=queries[layer], keys=keys[layer], **fields)


MASK = torch.tensor([[True] * 5, [True, True, False, True, False]])
PER_LAYER: dict[str, dict[str, list[Any]]] = {
    "same": {"causal": [True] * 3, "key_mask": [MASK, MASK.clone(), MASK], "scale": [0.3] * 3},
    "scales": {"scale": [0.3, None, -0.2]},
    "causal-differs": {"causal": [True, False, True]},
    "windows-differ": {"window": [(1, None), None, (2, 1)], "causal": [True, True, False]},
    "masks-differ": {"key_mask": [MASK, None, MASK.flip(1)], "scale": [1.0, 0.0, 1.0]},
    "query-masks": {"query_mask": [MASK, MASK, MASK]},
    "query-masks-differ": {"query_mask": [None, MASK, MASK.flip(0)], "causal": [False, True, False]},
    "bias-and-masks": {
        "bias": [random_weights(4, 1, 5), None, random_weights(2, 1, 1, 5)],
        "key_mask": [MASK, None, MASK],
    },
}


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("case", PER_LAYER)
def test_layers_may_differ_in_everything(case: str, groups: int):
    """Each layer's maps by the loops, by `Tape.maps`, and the chain from what is passed for all layers at once."""
    given = PER_LAYER[case]
    queries, keys = random_qk(2, 4, 5, groups=groups, dtype=torch.float64)
    tape, maps = Tape(), []
    for layer in range(3):
        record = record_of(layer, given, queries, keys)
        tape.add("a", f"a.{layer}", record)
        alone, _ = softmax_maps(
            [queries[layer]], [keys[layer]], key_mask=record.key_mask, causal=record.causal,
            window=record.window or (None, None), bias=[record.bias], scale=record.scale,
        )  # fmt: skip
        if record.query_mask is not None:
            alone[0][~record.query_mask.numpy().astype(bool)[:, None].repeat(4, 1)] = 1 / 5
        maps.append(alone[0])
        assert_close(tape.maps(layer), alone[0], "qk")
    full = rollout_matrices(maps, ROLLOUT)
    for query in (None, 0, random_weights(2, 3, 5)):
        for backend in ("torch", "reference"):
            assert_close(tape.rollout(query, backend=backend)["a"], take_rows(full, query), "qk")


def test_streams_queries_and_lengths_by_name():
    tape, full = Tape(), {}
    lengths = torch.tensor([4, 2])
    for stream, seq, seed in (("a", 5, 0), ("b", 4, 1)):
        queries, keys = random_qk(2, 4, seq, dtype=torch.float64, seed=seed)
        for layer in range(3):
            tape.add(stream, f"{stream}.{layer}", Record(queries=queries[layer], keys=keys[layer]))
        ends = lengths.tolist() if stream == "b" else None
        full[stream] = rollout_matrices(softmax_maps(queries, keys, ends)[0], ROLLOUT, ends)
    result = tape.rollout({"b": torch.tensor([3, 1]), "a": -1}, lengths={"b": lengths})
    assert list(result) == ["b", "a"]
    assert_close(result["b"], take_rows(full["b"], torch.tensor([3, 1]), [4, 2]), "qk")
    assert_close(result["a"], full["a"][:, -1], "qk")
    assert not result["b"][1, 2:].any()
    assert list(tape.rollout({"a": 0})) == ["a"]
    assert list(tape.rollout(0)) == ["a", "b"]
    with pytest.raises(KeyError, match=r"query must name one of the streams \['a', 'b'\]"):
        tape.rollout({"c": 0})
    with pytest.raises(KeyError, match=r"lengths must name one"):
        tape.rollout(0, lengths={"c": lengths})
    with pytest.raises(ValueError, match=r"Tape.layers: stream must be one of \['a', 'b'\], got None"):
        tape.layers()


def test_a_stream_is_one_sequence():
    tape = Tape()
    queries, keys = random_qk(2, 4, 5)
    tape.add("a", "a.0", Record(queries=queries[0], keys=keys[0]))
    with pytest.raises(
        ValueError, match=r"layers of stream 'a' must see one sequence; a.1 ran on \(B, S\) = \(2, 4\), a.0 on \(2, 5\)"
    ):
        tape.add("a", "a.1", Record(queries=queries[0][:, :, :4], keys=keys[0][:, :, :4]))


def test_records_are_checked():
    queries, keys = (t[0] for t in random_qk(2, 4, 5))
    mask = torch.ones(2, 5, dtype=torch.bool)
    for fields, error, message in (
        ({"queries": queries[0]}, ValueError, r"queries must be \[B, H, S, D\]"),
        ({"keys": keys[:, :, :4]}, ValueError, "with the same B, S and D"),
        ({"keys": keys[:, :3]}, ValueError, "H must be a multiple of H_kv, got 4 and 3"),
        ({"key_mask": mask.float()}, ValueError, "key_mask must be bool"),
        ({"query_mask": mask[:1]}, ValueError, "query_mask must be bool"),
        ({"bias": 3}, TypeError, "bias must be a tensor, got int"),
    ):
        with pytest.raises(error, match=f"Record: .*{message}|Record: {message}"):
            Record(**{"queries": queries, "keys": keys, **fields})


def paths(*names: str) -> dict[str, nn.Module]:
    every = {""}
    for name in names:
        parts = name.split(".")
        every |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    return {name: nn.ModuleList() if name.endswith(("layers", "blocks")) else nn.Module() for name in sorted(every)}


@pytest.mark.parametrize(
    "wanted",
    [
        {"encoder.layers.0.attn": "encoder.layers", "encoder.layers.1.attn": "encoder.layers"},
        {"encoder.layers.layer_0.attn": "encoder.layers", "encoder.layers.layer_1.attn": "encoder.layers"},
        {"block.0.layer.0.Attn": "block", "block.1.layer.0.Attn": "block", "block.0.layer.1.ff": "block.0.layer"},
        {"towers.0.layers.0.attn": "towers.0.layers", "towers.1.layers.0.attn": "towers.1.layers"},
        {"to.0.layers.0.a": "to.0.layers", "to.0.layers.1.a": "to.0.layers", "to.1.layers.0.a": "to.1.layers"},
        {"blocks.0.attn.0.fn": "blocks", "blocks.1.attn.0.fn": "blocks"},
        {"blocks.0.attn": "blocks"},
        {"model.attn1": "model", "model.attn2": "model"},
        {"0.attn": "layers", "1.attn": "layers"},
        {"attention": "layers"},
        {"text.attention": "text"},
    ],
    ids=lambda wanted: next(iter(wanted)),
)  # fmt: skip
def test_stream_names(wanted: dict[str, str]):
    found = stream_names(paths(*wanted))
    assert {name: found[name][0] for name in wanted} == wanted


def additive(mask: Tensor, low: float) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, low)


@pytest.mark.parametrize("low", [None, -math.inf, torch.finfo(torch.float32).min], ids=["bool", "inf", "min"])
def test_masks_are_taken_apart_exactly(low: float | None):
    seq = 7
    i, j = torch.arange(seq)[:, None], torch.arange(seq)
    keys = torch.tensor([[True] * 7, [False, False, True, True, True, False, True]])
    patterns = {
        "causal": (j <= i, {"causal"}),
        "causal-window": ((j <= i) & (j >= i - 2), {"causal", "window"}),
        "window": ((j <= i + 1) & (j >= i - 2), {"window"}),
        "all": (torch.ones(seq, seq, dtype=torch.bool), set()),
        "packed": ((i // 4) == (j // 4), {"bias"}),
        "future": (j >= i, {"window"}),
    }
    for pattern, names in patterns.values():
        for padded in (False, True):
            mask = (pattern & keys[:, None] if padded else pattern.expand(1, seq, seq))[:, None]
            fields = structure(mask if low is None else additive(mask, low), 2)
            if "bias" not in fields:
                assert fields.keys() - {"key_mask"} == names
                assert ("key_mask" in fields) == padded
            else:
                assert names == {"bias"}
            record = Record(queries=torch.zeros(2, 1, seq, 4), keys=torch.zeros(2, 1, seq, 4), **fields)
            wanted = mask.float() / mask.sum(-1, keepdim=True).clamp(min=1)
            wanted = torch.where(mask.any(-1, keepdim=True), wanted, 1 / seq).expand(2, 1, seq, seq)
            assert torch.allclose(record.maps(), wanted, atol=1e-7)
    other = torch.randn(2, 1, seq, seq, generator=generator(0))
    assert structure(other, 2)["bias"] is other
    per_head = patterns["causal"][0].expand(2, 4, seq, seq)
    assert torch.equal(structure(per_head, 2)["bias"] == 0, per_head)


def test_state_helper_sees_what_is_left():
    """The check of leftovers itself fails when something is left."""
    model, _, _ = model_and_input()
    for change in (
        lambda: model.blocks[0].register_forward_hook(print),
        lambda: setattr(model.blocks[1], "forward", print),
        lambda: setattr(model, "flag", True),
        lambda: model.train(),
    ):
        before = state(model)
        change()
        with pytest.raises(AssertionError):
            assert_nothing_left(model, before)
