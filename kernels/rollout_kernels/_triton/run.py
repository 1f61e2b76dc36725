"""Launches without Triton's binder, which takes 15 to 25 µs of the host's time for a kernel of thirty arguments.

The binder finds out which variant of a kernel serves a call: from the types of its arguments, from which pointers start
on 16 bytes, from compile-time arguments and options. A caller of `run` knows that beforehand and says so in a key.
"""

from collections.abc import Callable, Hashable
from typing import Any

from triton.runtime.driver import driver

_variants: dict[Hashable, tuple[Any, tuple[object, ...]]] = {}


def run(
    kernel: Any, programs: int, arguments: tuple[object, ...], key: Hashable, constants: Callable[[], dict[str, Any]]
) -> None:
    """Launches `kernel` on a grid of `programs`.

    Args:
        kernel: a `triton.jit` function whose compile-time parameters come last.
        programs: the size of the grid.
        arguments: all but the compile-time ones. Tensors must be allocated here or stand in the kernel's
            `do_not_specialize_on_alignment`, numbers in its `do_not_specialize`.
        key: equal for calls that one variant serves: the types of `arguments` and `constants` follow from it.
        constants: the compile-time arguments and options, by name.
    """
    device = None if not hasattr(kernel, "device_caches") else driver.active.get_current_device()
    full_key = (kernel, device, key)
    found = _variants.get(full_key)
    if found is not None:
        variant, rest = found
        variant[(programs, 1, 1)](*arguments, *rest)
        return
    given = constants()
    variant = kernel[(programs,)](*arguments, **given)
    if variant is not None and driver.active.get_current_target().backend == "cuda":
        _variants[full_key] = variant, tuple(given[name] for name in kernel.arg_names[len(arguments) :])
