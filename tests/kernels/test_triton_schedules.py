"""The kernels whose programs wait for one another, under adversarial schedules of the interpreter.

However programs take turns, and however few are resident, there is no race, no stale read, no deadlock, and the bits
are those of programs run one after another. Every mutant, a kernel with one fault put in, is caught as what it is.
Runs in a process of its own, started by test_triton_lanes.py; by hand:
`TRITON_INTERPRET=1 pytest tests/kernels/test_triton_schedules.py`.
"""

import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from rollout import METHODS
from rollout_kernels import _problem, ops
from rollout_kernels.method import Method
from tests.support.memory_model import Fault, Race, StaleRead
from tests.support.mutants import mutated
from tests.support.schedules import Deadlock
from tests.support.triton_cases import INTERPRETING, MARKS, bounds_of_loops, poison

pytestmark = MARKS
__all__ = ["bounds_of_loops", "poison"]  # fixtures
if INTERPRETING:
    from rollout_kernels import _triton
    from rollout_kernels._triton import inputs, launch, qk_inputs, tickets
    from rollout_kernels._triton.rows_split import rows_split  # noqa: F401 (its module is looked up below)
    from tests.support.scheduled_interpreter import schedule

    # The package's names `rows_split` and `columns` are functions: their modules, by name.
    ROWS = sys.modules["rollout_kernels._triton.rows_split"]
    COLUMNS = sys.modules["rollout_kernels._triton.qk_columns"]

RESIDENT = (1, 3, 8, None)  # programs at once; None: all
Run = Callable[[ModuleType], Tensor]


class OtherBits(Fault):
    """The result hangs on the schedule."""


def rows(query: int | Tensor) -> Run:
    """Rows from maps by a module's `rows_split`: 3 layers, so that a buffer of partials is used again; of 3 blocks
    of rows one part has two; a shorter sample."""
    torch.manual_seed(0)
    maps = [torch.randn(2, 1, 12, 12).softmax(-1) for _ in range(3)]
    problem = ops.maps_problem(maps, query=query, lengths=torch.tensor([12, 7]))
    config = launch.RowsLaunch(rows=4, padded=32, parts=2, stages=1, num_warps=4, maxnreg=128)

    def run(module: ModuleType) -> Tensor:
        arguments = inputs.map_inputs(problem)
        arguments.out.zero_()
        module.rows_split(arguments, config)
        return arguments.out

    return run


def columns(method: Method) -> Run:
    """Rows from Q and K by a module's `columns`: 3 blocks of columns, 3 layers, causal, a shorter sample."""
    torch.manual_seed(1)
    queries, keys, values, slopes = ([torch.randn(2, 1, 40, 16) for _ in range(3)] for _ in range(4))
    lse = [torch.randn(2, 1, 40) + 3 for _ in range(3)]
    problem = ops.qk_problem(
        queries, keys, query=torch.rand(2, 40), lengths=torch.tensor([40, 17]), causal=True, logsumexp=lse,
        values=values, output_gradients=slopes, method=method,
    )  # fmt: skip

    def run(module: ModuleType) -> Tensor:
        arguments = qk_inputs.qk_inputs(problem, True)
        module.columns(arguments, launch.ScoresLaunch(block_m=16, block_n=16, num_warps=4, num_stages=1))
        return arguments.out

    return run


def cases() -> dict[str, tuple[ModuleType, Run]]:
    """A module and what runs it, by name."""
    if not INTERPRETING:
        return {}
    torch.manual_seed(2)
    return {
        "rows_split one-hot": (ROWS, rows(-1)),
        "rows_split weights": (ROWS, rows(torch.randn(2, 1, 12))),
        "columns": (COLUMNS, columns(Method())),
        "columns of chefer": (COLUMNS, columns(METHODS["chefer"])),
    }


CASES = cases()


@cache
def in_order(case: str) -> Tensor:
    """The result with programs run one after another."""
    module, run = CASES[case]
    return run(module)


def explore(case: str, module: ModuleType, seed: int, resident: int | None) -> None:
    """One schedule. Raises what it brings to light."""
    with schedule(seed, resident):
        result = CASES[case][1](module)
    if not torch.equal(result, in_order(case)):
        raise OtherBits(f"schedule {seed} with {resident} resident gives other bits")


@pytest.mark.parametrize("resident", RESIDENT)
@pytest.mark.parametrize("case", CASES)
def test_no_schedule_finds_a_fault(case: str, resident: int | None) -> None:
    for seed in range(2):
        explore(case, CASES[case][0], seed, resident)


@pytest.mark.slow
@pytest.mark.parametrize("resident", RESIDENT)
@pytest.mark.parametrize("case", CASES)
def test_no_schedule_of_hundreds_finds_a_fault(case: str, resident: int | None) -> None:
    for seed in range(2, 100):
        explore(case, CASES[case][0], seed, resident)


WAITS = '    while tl.atomic_add(counter_ptr, 0, sem="acquire") < value:\n        pass\n'
BARRIER_OF_WAIT = "        pass\n    tl.debug_barrier()\n"
BARRIER_OF_ARRIVAL = "    tl.debug_barrier()  # every thread's stores come before the one release\n"
ARRIVES = 'sem="acq_rel"'
TICKETS = {  # of the device code that both kernels share
    "no wait": ({WAITS: ""}, Race),
    "wait relaxed": ({'sem="acquire"': 'sem="relaxed"'}, Race),
    "wait without barrier": ({BARRIER_OF_WAIT: "        pass\n"}, Race),
    "arrival without barrier": ({BARRIER_OF_ARRIVAL: ""}, Race),
    "arrival relaxed": ({ARRIVES: 'sem="relaxed"'}, Race),
    "arrival acquires only": ({ARRIVES: 'sem="acquire"'}, Race),
    "no arrival": ({"tl.atomic_add(counter_ptr, amount,": "tl.atomic_add(counter_ptr, amount * 0,"}, Deadlock),
}
IN_ORDER_OF_START = {'tl.atomic_add(ticket_ptr, 1, sem="relaxed")': "tl.program_id(0)"}
ONE_COUNTER = {
    "ready_ptr += step.to(tl.int64) * chains + chain": "ready_ptr += chain",
    "wait_for(ready_ptr - chains,": "wait_for(ready_ptr,",
}
SPLIT = {
    "tickets by program": (IN_ORDER_OF_START, Deadlock),
    "first-level cache": ({', cache_modifier=".cg"': ""}, StaleRead),
    "one buffer": ({"half = chains.to(tl.int64) * (PARTS * SP)": "half = chains.to(tl.int64) * 0"}, Race),
    "one counter for all steps": (ONE_COUNTER | {"== parts - 1)": "== parts * L - 1)"}, Race),
    "waits for one part less": ({"- chains, parts_before)": "- chains, parts_before - 1)"}, Race),
    "waits for one part more": ({"- chains, parts_before)": "- chains, parts_before + 1)"}, Deadlock),
    "every step writes out": ({"(step == L - 1) & (arrived": "(arrived"}, Race),
    "the last part writes out": ({"(arrived == parts - 1)": "(part == parts - 1)"}, Race),
    "summed as they come": (
        {
            "(step == L - 1) & (arrived == parts - 1)": "step == L - 1",
            "w_out = sum_partials(partials_ptr, parts, offs_j, n, PARTS, SP)": "w_out = total / 3",
            "tl.store(out_ptr + offs_j, w_out, mask=offs_j < S)":
                'tl.atomic_add(out_ptr + offs_j, w_out, mask=offs_j < S, sem="relaxed")',
        }, OtherBits,
    ),
}  # fmt: skip
FROM_QK = {
    "tickets by program": (IN_ORDER_OF_START, Deadlock),
    "first-level cache": ({', cache_modifier=".cg"': ""}, StaleRead),
    "one buffer": ({"w_ptr + (1 - step % 2) * half": "w_ptr + (step % 2) * half"}, Race),
    "one counter for all steps": (ONE_COUNTER, Race),
    "waits for one block less": ({"tl.cdiv(n, BLOCK_N))": "tl.cdiv(n, BLOCK_N) - 1)"}, Race),
    "padding arrives too": ({"arrive(ready_ptr, (column < n).to(tl.int32))": "arrive(ready_ptr, 1)"}, Race),
}
MUTANTS = [
    *(("rows_split weights", name, True) for name in TICKETS),
    *(("columns", name, True) for name in TICKETS),
    *(("rows_split weights", name, False) for name in SPLIT),
    *(("columns", name, False) for name in FROM_QK),
]


def mutant(case: str, name: str, shared: bool, folder: Path) -> tuple[ModuleType, type[Fault]]:
    """A kernel's module with a fault of its own, or one in the device code it shares; and what the fault is."""
    module = CASES[case][0]
    if not shared:
        changes, kind = (SPLIT if module is ROWS else FROM_QK)[name]
        return mutated(module, changes, folder), kind
    changes, kind = TICKETS[name]
    return on_tickets(module, changes, folder), kind


def on_tickets(module: ModuleType, changes: dict[str, str], folder: Path) -> ModuleType:
    """A copy of a kernel's module that waits and arrives by mutated device code."""
    broken, made = mutated(tickets, changes, folder), mutated(module, {}, folder)
    made.wait_for, made.arrive = broken.wait_for, broken.arrive
    return made


def caught(case: str, module: ModuleType, seeds: range) -> list[Fault]:
    """What each schedule found of a mutant. Few are resident in every other one."""
    found = []
    for seed in seeds:
        try:
            explore(case, module, seed, None if seed % 2 else 2)
        except Fault as fault:
            found.append(fault)
    return found


@pytest.mark.parametrize(("case", "name", "shared"), MUTANTS)
def test_every_mutant_is_caught(case: str, name: str, shared: bool, tmp_path: Path) -> None:
    module, kind = mutant(case, name, shared, tmp_path)
    found = caught(case, module, range(2))
    assert [type(fault) for fault in found if not isinstance(fault, kind)] == []
    assert found, "no schedule caught it"


@pytest.mark.slow
@pytest.mark.parametrize(("case", "name", "shared"), MUTANTS)
def test_a_mutant_is_caught_by_most_schedules(case: str, name: str, shared: bool, tmp_path: Path) -> None:
    module, kind = mutant(case, name, shared, tmp_path)
    found = caught(case, module, range(2, 32))
    assert [type(fault) for fault in found if not isinstance(fault, kind)] == []
    assert len(found) >= 12  # a fault that needs few residents has every other schedule


@pytest.mark.parametrize("case", ["columns", "rows_split weights"])
def test_an_arrival_may_release_only_where_nothing_is_read_after_it(case: str, tmp_path: Path) -> None:
    """A program of the columns ends with its arrival: it reads nothing of what others did, so it has nothing to
    acquire. The last part to arrive of the rows adds the partials of the others: that is a race without an acquire."""
    module = on_tickets(CASES[case][0], {ARRIVES: 'sem="release"'}, tmp_path)
    found = caught(case, module, range(4))
    assert [type(fault) for fault in found] == ([] if case == "columns" else [Race] * 4)


def test_a_fault_says_who_where_and_what(tmp_path: Path) -> None:
    module, _ = mutant("rows_split weights", "no wait", True, tmp_path)
    (fault, *_) = caught("rows_split weights", module, range(2))
    line = r"\(rows_split_mutant\.py:\d+\)"
    assert re.match(rf"program \d+ \w+ partials_ptr\[\d+\] {line}, which program \d+ \w+ {line}", str(fault))


def calls() -> dict[str, tuple[Callable[[], Tensor], set[str]]]:
    """Calls of the package, and the kernels that each launches."""
    torch.manual_seed(3)
    maps = [torch.randn(2, 2, 12, 12).softmax(-1) for _ in range(2)]
    queries, keys, *handed = ([torch.randn(1, 2, 20, 16) for _ in range(2)] for _ in range(4))
    by_gradients = {"values": handed[0], "output_gradients": handed[1], "method": METHODS["chefer_normalised"]}
    whole, row, above = ops.maps_problem(maps), ops.maps_problem(maps, query=3), Method(head_fusion="max")

    def from_qk(query: int | None, **options: object) -> _problem.QKProblem:
        return ops.qk_problem(queries, keys, query=query, **options)

    return {
        "full": (lambda: _triton.full_from_maps(whole), {"fuse_heads_kernel", "matrix_product_kernel"}),
        "resident": (lambda: _triton.rows_from_maps(row, split=False), {"rows_resident_kernel"}),
        "split": (lambda: _triton.rows_from_maps(row, split=True), {"rows_split_kernel"}),
        "Q,K": (lambda: _triton.rows_from_qk(from_qk(3)), {"logsumexp_kernel", "columns_kernel"}),
        "Q,K max": (
            lambda: _triton.rows_from_qk(from_qk(3, method=above)),
            {"logsumexp_kernel", "row_sums_kernel", "columns_kernel"},
        ),
        "Q,K chefer normalised": (
            lambda: _triton.rows_from_qk(from_qk(3, **by_gradients)),
            {"logsumexp_kernel", "row_sums_kernel", "columns_kernel"},
        ),
        "Q,K full": (
            lambda: _triton.full_from_qk(from_qk(None)),
            {"logsumexp_kernel", "qk_matrix_kernel", "matrix_product_kernel"},
        ),
    }


@pytest.mark.parametrize("seed", range(2))
def test_every_kernel_of_the_package_passes(seed: int) -> None:
    """Those too whose programs depend on no other: they read what is given, or what earlier launches wrote."""
    seen = set()
    for run, kernels in calls().values():
        wanted = run()
        with schedule(seed, 3) as launches:
            result = run()
        assert {each.kernel for each in launches} == kernels | {"prepare_kernel"}
        assert torch.equal(result, wanted)
        seen |= kernels | {"prepare_kernel"}
    files = Path(_triton.__file__).parent.glob("*.py")
    assert seen == {
        name for file in files for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
