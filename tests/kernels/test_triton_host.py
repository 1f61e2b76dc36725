"""The host path of the Triton kernels on a stand-in for the driver: what a call launches, waits for and copies.

Nothing is computed: the kernels' numbers are the interpreter's and the GPU lane's matter.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

import triton

import rollout
from rollout import Method
from rollout_kernels import _triton, ops
from rollout_kernels._triton import inputs, launch
from rollout_kernels._triton.rows_split import rows_split
from tests.support import stand_in
from tests.support.triton_cases import INTERPRETING

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the interpreter launches nothing")
EXAMPLES = Path(__file__).parents[2] / "examples"
B, H, S, L = 3, 4, 33, 3
MANY = 2 * stand_in.PROCESSORS  # samples enough for one program each


@pytest.fixture
def card() -> Iterator[stand_in.Card]:
    with stand_in.device("sm_90") as card:
        yield card


def maps(batch: int = B, seq: int = S, layers: int = L) -> list[Tensor]:
    return [torch.rand(batch, H, seq, seq) for _ in range(layers)]


def heads(count: int = L, size: int = 16) -> list[Tensor]:
    return [torch.rand(B, H, S, size) for _ in range(count)]


def rows(query: object = 0, **options: object) -> Callable[[], object]:
    given = maps()
    return lambda: rollout.attention_rollout(given, query=query, backend="triton", validate=False, **options)


def rows_qk(query: object = 0, **options: object) -> Callable[[], object]:
    queries, keys = heads(), heads()
    return lambda: rollout.attention_rollout_qk(queries, keys, query=query, backend="triton", validate=False, **options)


LENGTHS = torch.tensor([S, 1, 20])
WEIGHTED = Method(head_fusion=torch.tensor([0.5, 2.0, -0.25, 1.0]))
stand_in.host(WEIGHTED.head_fusion)  # a method keeps its weights on the host
ROWS = ["prepare_kernel", "rows_split_kernel"]
QK = ["prepare_kernel", "logsumexp_kernel", "columns_kernel"]
FUSED = ["prepare_kernel", "fuse_heads_kernel", *["fuse_heads_kernel", "matrix_product_kernel"] * (L - 1)]
CALLS = {  # name -> the call, the kernels of Triton, those of torch
    "row": (rows(0), ROWS, []),
    "last row": (rows(-1, lengths=LENGTHS), ROWS, []),
    "rows of a tensor": (rows(torch.tensor([0, -1, 3]), lengths=LENGTHS), ROWS, []),
    "weights": (rows(torch.rand(B, 2, S)), ROWS, []),
    "head weights": (rows(0, method=WEIGHTED), ROWS, []),
    "gradients": (rows(0, method="chefer", gradients=maps()), ROWS, []),
    "full": (rows(None, lengths=LENGTHS), FUSED, []),
    "qk row": (rows_qk(0), QK, []),
    "qk last row": (rows_qk(-1, lengths=LENGTHS, causal=True), QK, []),
    "qk rows of a tensor": (rows_qk(torch.tensor([0, -1, 3]), window=(3, None)), QK, []),
    "qk weights": (rows_qk(torch.rand(B, S)), QK, ["copy_"]),
    "qk head weights": (rows_qk(0, method=WEIGHTED), QK, []),
    "qk log-sum-exp": (rows_qk(0, logsumexp=[torch.rand(B, H, S) for _ in range(L)]), [QK[0], QK[2]], []),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_a_call_neither_waits_nor_copies(card: stand_in.Card, name: str) -> None:
    """From the first call on, with no more kernels than it takes."""
    call, kernels, operations = CALLS[name]
    with stand_in.watch(card):
        call()
    assert card.waits == []
    assert card.copies == []
    assert card.kernels == kernels
    assert card.operations == operations


def test_discarding_neither_waits_nor_copies(card: stand_in.Card) -> None:
    call = rows(0, lengths=LENGTHS, method="discard")
    with stand_in.watch(card):
        call()
    assert (card.waits, card.copies) == ([], [])


def test_many_samples_take_one_program_each(card: stand_in.Card) -> None:
    given = maps(MANY, 4, 2)
    with stand_in.watch(card):
        rollout.attention_rollout(given, query=-1, backend="triton", validate=False)
    assert card.kernels == ["prepare_kernel", "rows_resident_kernel"]
    assert card.launches[1].grid == (MANY, 1, 1)
    assert (card.waits, card.copies, card.operations) == ([], [], [])


@pytest.mark.parametrize(
    ("fault", "waits", "copies"),
    [
        (lambda device, held: torch.tensor([1, 2], device=device), 0, 1),
        (lambda device, held: held.to(device), 0, 1),
        (lambda device, held: torch.ones(3) * torch.zeros(3, device=device), 0, 1),
        (lambda device, held: int(device_tensor().max()), 1, 0),
        (lambda device, held: device_tensor().nonzero(), 1, 0),
        (lambda device, held: device_tensor().tolist(), 1, 0),
        (lambda device, held: bool((device_tensor() > 1).any()), 1, 0),
        (lambda device, held: [*held.tolist(), float(held[0])], 0, 0),
        (lambda device, held: torch.zeros(3, device=device) + 1, 0, 0),
    ],
    ids=["tensor", "to", "mixed", "int", "nonzero", "tolist", "bool", "host values", "device values"],
)
def test_the_watch_sees_waits_and_copies(
    card: stand_in.Card, fault: Callable[[torch.device, Tensor], object], waits: int, copies: int
) -> None:
    with stand_in.watch(card):
        fault(torch.device("cpu"), stand_in.host(torch.ones(3)))
    assert (len(card.waits), len(card.copies)) == (waits, copies)


def device_tensor() -> Tensor:
    return torch.zeros(3, device=torch.device("cpu"))


def test_the_table_holds_addresses_and_strides(card: stand_in.Card) -> None:
    given = maps(layers=2)
    rollout.attention_rollout(given, query=0, backend="triton", validate=False)
    made = card.launches[0].arguments
    numbers = [(number - made["integers"][0] % 4 - (1 << 61)) // 4 for number in made["integers"]]
    assert numbers == [n for m in given for n in (m.data_ptr(), *m.stride()[:3], 1, H)]
    assert (made["row"], made["batch"], made["seq"], made["counters"]) == (0, B, S, 4 + 2 * B)


def test_a_batch_of_any_size_is_served_by_one_variant(card: stand_in.Card) -> None:
    """Counters, lengths and start rows start where they may: B odd and even, slices of longer tensors."""
    lengths, starts = torch.full((20,), S), torch.zeros(20, dtype=torch.long)
    for batch in range(1, 10):
        given = maps(batch)
        for query in (0, starts[batch : 2 * batch]):
            rollout.attention_rollout(
                given, query=query, lengths=lengths[batch : 2 * batch], backend="triton", validate=False
            )
    assert card.variants("rows_split_kernel") == 1
    assert card.variants("prepare_kernel") == 2  # an int, and a tensor
    for batch in range(1, 10):
        queries = [q[:1].expand(batch, H, S, 16) for q in heads()]
        rollout.attention_rollout_qk(queries, queries, query=0, backend="triton", validate=False)
    assert card.variants("columns_kernel") == 1


def test_two_hundred_layers_take_as_many_launches_as_their_table(card: stand_in.Card) -> None:
    """A launch carries 128 numbers; every one reaches its place."""
    layer = torch.rand(1, 2, 4, 4)
    method = Method(head_fusion=torch.tensor([0.25, 0.75]))
    rollout.attention_rollout([layer] * 100, query=0, method=method, backend="triton", validate=False)
    made = [each.arguments for each in card.launches if each.kernel == "prepare_kernel"]
    assert [len(each["integers"]) for each in made] == [128, 128, 128, 128, 88]
    assert [len(each["weights"]) for each in made] == [128, 72, 0, 0, 0]
    first = made[0]["table_ptr"].data_ptr()
    assert [each["table_ptr"].data_ptr() - first for each in made] == [8 * 128 * i for i in range(5)]
    assert sum((each["weights"] for each in made), ()) == (0.25, 0.75) * 100


@pytest.mark.parametrize("target", list(stand_in.TARGETS))
def test_every_target_knows_its_options(target: str) -> None:
    """AMD's compiler refuses an option that is Nvidia's alone."""
    with stand_in.device(target) as card:
        CALLS["last row"][0]()
        CALLS["full"][0]()
        CALLS["qk row"][0]()
    assert card.kernels == ROWS + FUSED + QK


def test_rows_from_maps_are_compiled_for_amd() -> None:
    """To the end, with the options and arguments of a call. (Of `columns_kernel` Triton 3.6 makes no code for AMD.)"""
    with stand_in.device("gfx942", compiles=True) as card:
        CALLS["last row"][0]()
    assert card.kernels == ROWS


def test_a_failed_pass_of_the_compiler_gives_way_to_the_other_regime(
    card: stand_in.Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(_triton, "rows_split", fail)
    with pytest.warns(RuntimeWarning, match="fail cannot run on this device.*PassManager"):
        CALLS["row"][0]()
    assert card.kernels == ["prepare_kernel", "rows_resident_kernel"]


def test_another_error_of_the_runtime_is_not_caught(card: stand_in.Card, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(_triton, "rows_split", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        CALLS["row"][0]()


def test_arguments_can_be_launched_again(card: stand_in.Card) -> None:
    """Counters are new at each launch: those of the last one are used up."""
    problem = ops.maps_problem(maps(), query=0, validate=False)
    arguments = inputs.map_inputs(problem)
    config = inputs.launch_of(problem, arguments, "sm_90")
    for _ in range(2):
        rows_split(arguments, config)
    assert card.kernels == ROWS * 2
    first, second = (each.arguments["ready_ptr"] for each in card.launches if each.kernel == "rows_split_kernel")
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize(
    ("tensor", "wanted"),
    [
        (torch.rand(2, 2, 64, 64), (4, False, True)),
        (torch.rand(2, 2, 66, 66), (2, False, True)),
        (torch.rand(2, 2, 33, 33), (1, False, True)),
        (torch.rand(2, 2, 64, 72)[..., 4:68], (4, False, True)),
        (torch.rand(2, 2, 64, 72)[..., 2:66], (2, False, True)),
        (torch.rand(2, 2, 64, 64).mT, (1, False, False)),
        (torch.rand(2, 2, 64, 64).half(), (8, False, True)),
        (torch.rand(2, 2, 36, 36).half(), (4, False, True)),
        (torch.rand(2, 2, 34, 34).half(), (2, False, True)),
        (torch.rand(2, 2, 33, 33).half(), (1, True, True)),
        (torch.rand(2, 2, 33, 33).half().mT, (1, False, False)),
        (torch.rand(2, 2, 32, 40).half()[..., 1:33], (1, False, True)),
    ],
    ids=lambda value: "x".join(map(str, (*value.shape, value.dtype))) if isinstance(value, Tensor) else "",
)
def test_loads_are_as_wide_as_strides_and_addresses_allow(tensor: Tensor, wanted: tuple[int, bool, bool]) -> None:
    problem = ops.maps_problem([tensor], query=0, validate=False)
    flags = inputs.map_inputs(problem).flags
    assert (flags["VEC"], flags["PAIRS"], flags["UNIT_COLUMN"]) == wanted


def test_the_example_of_a_graph_can_be_captured(card: stand_in.Card) -> None:
    """What it captures waits for nothing and copies nothing, and hands its own maps to the kernels."""
    spec = importlib.util.spec_from_file_location("cuda_graph", EXAMPLES / "cuda_graph.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model, x = example.Encoder(), torch.randn(2, 17, example.WIDTH)
    with stand_in.watch(card):
        result = example.explain(model, x)
    assert (card.waits, card.copies, card.kernels) == ([], [], ROWS)
    assert len(card.launches[0].arguments["integers"]) == 6 * example.LAYERS
    assert result.data_ptr() == card.launches[1].arguments["out_ptr"].data_ptr()
    assert result.shape == (2, 17)


def test_the_stand_in_leaves_nothing() -> None:
    before = launch.target, launch.rocm, triton.runtime.driver._active
    with stand_in.device("sm_80"):
        CALLS["row"][0]()
        assert triton.runtime.driver._active is not before[2]
    assert (launch.target, launch.rocm, triton.runtime.driver._active) == before
    assert launch.target(torch.device("cpu")).refusals() == ["tensors are on cpu"]


def test_the_time_of_a_call_on_the_host() -> None:
    """B = 8, H = 12, S = 197, L = 12, in launches of a kernel with next to no arguments, on a machine however busy: it
    takes 12 to 17 of them (`python -m tests.support.stand_in`), and took more than 40."""
    with stand_in.device("sm_90", compiles=True):
        launch_alone, call = stand_in.host_times([stand_in.trivial_call(), stand_in.small_call()])
    assert call < 28 * launch_alone
