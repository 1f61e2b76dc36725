"""What the schedules are made of: toy kernels with a known fault, and what is left of the interpreter afterwards.

Runs in the interpreter's process; the memory model alone is tested in test_memory_model.py.
"""

import pytest
import torch
from torch import Tensor

from tests.support.memory_model import Race, StaleRead
from tests.support.schedules import Deadlock
from tests.support.triton_cases import INTERPRETING, MARKS, bounds_of_loops

pytestmark = MARKS
__all__ = ["bounds_of_loops"]  # a fixture
if INTERPRETING:
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    from tests.support.scheduled_interpreter import HOOKS, schedule

    @triton.jit
    def fill(out_ptr, WIDTH: tl.constexpr):
        place = tl.program_id(0) * WIDTH + tl.program_id(1)
        tl.store(out_ptr + place, place.to(tl.float32))

    @triton.jit
    def write_by_table(table_ptr):
        """Both programs write one element of memory that only a table knows."""
        tl.store(tl.load(table_ptr).to(tl.pointer_type(tl.float32)), 1.0)

    @triton.jit
    def overlap(out_ptr):
        """Program 0 writes four bytes, program 1 the third of them."""
        if tl.program_id(0) == 0:
            tl.store(out_ptr.to(tl.pointer_type(tl.int32)), 7)
        else:
            tl.store(out_ptr.to(tl.pointer_type(tl.int8)) + 2, 1)

    @triton.jit
    def wait_volatile(flag_ptr, out_ptr):
        """Program 1 polls, with plain loads, a flag that program 0 sets only if it is let: a race, or for ever."""
        if tl.program_id(0) == 1:
            while tl.load(flag_ptr, volatile=True) == 0:
                pass
            tl.store(out_ptr, 1.0)

    @triton.jit
    def hand_over(flag_ptr, data_ptr, out_ptr, CACHE: tl.constexpr):
        """Program 0 writes data and sets the flag; program 1 waits and reads."""
        if tl.program_id(0) == 0:
            tl.store(data_ptr, 5.0)
            tl.debug_barrier()
            tl.atomic_xchg(flag_ptr, 1, sem="release")
        else:
            while tl.atomic_cas(flag_ptr, 1, 1, sem="acquire") == 0:
                pass
            tl.debug_barrier()
            tl.store(out_ptr, tl.load(data_ptr, cache_modifier=CACHE))

    @triton.jit
    def fail(out_ptr):
        tl.store(out_ptr, tl.load(out_ptr) + undefined_name)  # noqa: F821

    @triton.jit
    def nothing(out_ptr):
        tl.debug_barrier()


def zeros(count: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(count, dtype=dtype)


@pytest.mark.parametrize("resident", [1, 4, None])
def test_every_program_of_a_grid_of_two_axes_runs_once(resident: int | None) -> None:
    out = zeros(15)
    with schedule(0, resident) as launches:
        fill[(3, 5)](out, WIDTH=5)
    assert torch.equal(out, torch.arange(15.0))
    assert [(each.kernel, each.programs, len(each.events)) for each in launches] == [("fill", 15, 15)]


def test_programs_start_in_another_order_with_another_seed() -> None:
    orders = []
    for seed in (0, 0, 1):
        with schedule(seed, 1) as launches:
            fill[(4, 1)](zeros(4), WIDTH=1)
        orders.append([event.program for event in launches[0].events])
    assert orders[0] == orders[1] != orders[2]


def test_memory_behind_a_table_is_seen() -> None:
    hidden = zeros()
    with schedule(0), pytest.raises(Race, match="memory that no argument holds"):
        write_by_table[(2,)](torch.tensor([hidden.data_ptr()]))


def test_elements_of_different_sizes_that_overlap_are_seen() -> None:
    with schedule(0), pytest.raises(Race, match=r"out_ptr\[0\]"):
        overlap[(2,)](zeros())


def test_a_loop_that_polls_for_ever_is_a_deadlock() -> None:
    with schedule(0), pytest.raises(Deadlock, match=r"programs 1 wait, 0 have not started"):
        wait_volatile[(2,)](zeros(1, torch.int32), zeros())


@pytest.mark.parametrize("seed", range(3))
def test_a_hand_over_by_exchange_and_comparison_passes(seed: int) -> None:
    out = zeros()
    with schedule(seed):
        hand_over[(2,)](zeros(1, torch.int32), zeros(), out, CACHE=".cg")
    assert float(out) == 5.0


def test_a_read_through_the_first_level_cache_is_stale_even_in_order() -> None:
    with schedule(0), pytest.raises(StaleRead, match=r"program 1 loads data_ptr\[0\]"):
        hand_over[(2,)](zeros(1, torch.int32), zeros(), zeros(), CACHE="")


def test_an_error_of_a_kernel_is_not_taken_for_a_schedule_s() -> None:
    with schedule(0), pytest.raises(Exception, match="undefined_name"):
        fail[(2,)](zeros())


def test_a_kernel_of_which_nothing_was_seen_is_an_error() -> None:
    with schedule(0), pytest.raises(RuntimeError, match="nothing touched no memory"):
        nothing[(2,)](zeros())


def test_the_interpreter_is_left_as_it_was() -> None:
    before = vars(interpreter.InterpreterBuilder).copy(), interpreter.GridExecutor.__call__, interpreter._patch_lang
    with pytest.raises(Race), schedule(0):
        overlap[(2,)](zeros())
    after = vars(interpreter.InterpreterBuilder).copy(), interpreter.GridExecutor.__call__, interpreter._patch_lang
    assert before == after
    out = zeros(2)
    fill[(1, 2)](out, WIDTH=2)
    assert torch.equal(out, torch.arange(2.0))


@pytest.mark.parametrize("name", HOOKS if INTERPRETING else [])
def test_an_interpreter_that_moved_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not HOOKS[name]:
        monkeypatch.delattr(interpreter.InterpreterBuilder, name)
    else:
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, lambda self, other: None)
    with pytest.raises(RuntimeError, match=f"is not as tests/support knows it.*{name}"), schedule(0):
        pass
