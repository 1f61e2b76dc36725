"""Device code for programs that depend on one another within a launch."""

import triton
import triton.language as tl


@triton.jit
def wait_for(counter_ptr, value):
    """Spins until a counter that only grows has reached `value`; what was written before that is then visible."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < value:
        pass
    tl.debug_barrier()


@triton.jit
def arrive(counter_ptr, amount):
    """Adds to a counter, after every store this program has made; returns what it was before."""
    tl.debug_barrier()  # every thread's stores come before the one release
    before = tl.atomic_add(counter_ptr, amount, sem="acq_rel")
    tl.debug_barrier()
    return before
